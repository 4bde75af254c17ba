"""The records of a local file, by its suffix: whole texts, JSON, tables, each perhaps compressed."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .records import columns_of

Records = Iterator[tuple[Any, str]]  # a record, and where it stands

_TEXTS = (".txt", ".text")
_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_MARKS = (  # the four bytes first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_KINDS = (  # what a file that is no text begins with, and what to do about it
    (b"\x1f\x8b", "gzip data: add .gz to its name"), (b"BZh", "bzip2 data: add .bz2 to its name"), (b"\xfd7zXZ", "xz data: add .xz to its name"),
    (b"\x28\xb5\x2f\xfd", "zstd data: add .zst to its name"), (b"PAR1", "a Parquet table: add .parquet to its name"),
    (b"PK\x03\x04", "a zip archive: unpack it"), (b"%PDF", "a PDF: extract its text"),
)  # fmt: skip
_POINTER = b"version https://git-lfs"


def _by_arrow(raw: bytes) -> bytes:
    import pyarrow

    with pyarrow.input_stream(pyarrow.BufferReader(raw), compression="zstd") as stream:
        return bytes(stream.read())


_COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress, ".zst": _by_arrow,
}  # fmt: skip
# What a folder's files must end with to be read; notes and code may lie beside them.
_DATA = (*_TEXTS, ".json", *_LINES, *_TABLES, ".parquet")
# What ends like this is meant as a file, though it may look like the name of a repository.
SUFFIXES = (*_DATA, *_COMPRESSED, *_ARCHIVES, ".md", ".py")


def is_data(path: Path) -> bool:
    """Whether a file in a folder of texts is one of them, by its suffix."""
    kind, packed = _kind(path)
    return kind in _DATA and not (packed and kind == ".parquet")


def read_records(path: Path) -> Records:
    """The records of a file: one whole text, or what is in its lines, list, or rows.

    .json holds a list, one object or an object a line; .jsonl and .ndjson an object or text a line; .csv and
    .tsv begin with a line of names; .parquet. Other suffixes are taken as text. Each but .parquet may be
    compressed and then ends with .gz, .bz2, .xz or .zst as well.

    Raises:
        LowbitError: the file cannot be read or is not what its suffix says; names the file and line, item or row.
    """
    kind, packed = _kind(path)
    if kind in _ARCHIVES:
        raise LowbitError(f"'{path}' is an archive: unpack it and give the folder.")
    if kind == ".parquet":
        if packed:
            raise LowbitError(
                f"'{path}' is a compressed Parquet file: unpack it first (Parquet compresses its columns itself)."
            )
        return _parquet(path)
    text = _decoded(path, _bytes(path, packed))
    if kind in _TABLES:
        return iter(_table(text, _TABLES[kind], path))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if kind in _LINES:
        return _lines(text, path)
    return _json(text, path) if kind == ".json" else iter([(text, str(path))])


def _kind(path: Path) -> tuple[str, str]:
    """What is in a file and how it is compressed, as suffixes."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in _COMPRESSED else (last, "")


def _needs_arrow(path: Path) -> LowbitError:
    return LowbitError(
        f"'{path}' is read through pyarrow: pip install 'lowbit[eval]', or give a .txt or .jsonl file."
    )


def _bytes(path: Path, packed: str) -> bytes:
    try:
        check_fetched(path)
        raw = path.read_bytes()
    except OSError as e:
        raise LowbitError(f"'{path}' cannot be read: {e.strerror}.") from e
    if not packed:
        return raw
    try:
        return _COMPRESSED[packed](raw)
    except ImportError as e:
        raise _needs_arrow(path) from e
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
        raise LowbitError(
            f"'{path}' cannot be unpacked ({e}). Is it a whole {packed} file? Make or download it again."
        ) from e


def check_fetched(path: Path) -> None:
    """Refuse what git-lfs leaves in place of a file that was not fetched: it reads like a text.

    Raises:
        LowbitError: the file is such a pointer.
        OSError: it cannot be read.
    """
    with path.open("rb") as f:
        if f.read(len(_POINTER)) == _POINTER:
            raise LowbitError(
                f"'{path}' is a git-lfs pointer, not the file itself: run 'git lfs pull' in its folder, "
                "or download it again."
            )


def _decoded(path: Path, raw: bytes) -> str:
    """UTF-8 with or without its mark, UTF-16 and UTF-32 with theirs."""
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8-sig")
    known = next((kind for start, kind in _KINDS if raw.startswith(start)), None)
    unmarked = encoding == "utf-8-sig"
    try:
        text = "\0" if unmarked and b"\0" in raw else raw.decode(encoding)
    except UnicodeDecodeError as e:
        if known:
            raise LowbitError(f"'{path}' is {known}.") from e
        meant = "UTF-8 text" if unmarked else f"the {encoding.upper()} text that its mark announces"
        raise LowbitError(f"'{path}' is not {meant} (byte {e.start}). Convert it first.") from e
    if "\0" in text:
        unclear = "binary data, or UTF-16 or UTF-32 without its mark: convert it to UTF-8 text first (iconv -t UTF-8)"
        raise LowbitError(
            f"'{path}' is {known}." if known else f"'{path}' holds NUL bytes: it is {unclear}."
        )
    return text


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise LowbitError(f"{where} is not valid JSON: {e}.") from e


def _lines(text: str, path: Path) -> Records:
    # Not splitlines(): it also cuts at U+2028 and others that JSON strings may hold as they are.
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {n}"
            yield _loads(line, where), where


def _json(text: str, path: Path) -> Records:
    if not text.strip():
        return iter(())
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        if (
            e.msg == "Extra data" and e.lineno > 1
        ):  # one value has ended and another begins: an object a line
            return _lines(text, path)
        raise LowbitError(f"{path} is not valid JSON: {e}.") from e
    except (ValueError, RecursionError) as e:
        raise LowbitError(f"{path} is not valid JSON: {e}.") from e
    if isinstance(found, list):
        return ((item, f"{path}, item {n}") for n, item in enumerate(found, 1))
    if not isinstance(found, dict):
        raise LowbitError(f"'{path}' must hold a list of texts or of objects, or an object a line.")
    return iter([(found, str(path))])


@contextmanager
def _long_fields() -> Iterator[None]:
    # The csv module's limit, 131072 characters a field, is one for the process and shorter than many texts.
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(text: str, separator: str, path: Path) -> list[tuple[Any, str]]:
    with _long_fields():
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        out: list[tuple[Any, str]] = []
        try:
            columns = columns_of(reader.fieldnames or (), f"'{path}'") if text.strip() else []
            for n, row in enumerate(reader, 1):
                where = f"{path}, row {n}"
                if None in row:
                    raise LowbitError(
                        f"{where} (line {reader.line_num}) has more fields than the first line names. Quote its texts."
                    )
                out.append(({k: row[k] for k in columns}, where))
        except csv.Error as e:
            raise LowbitError(f"{path}, line {reader.line_num} is not a table's row: {e}.") from e
    return out


def _parquet(path: Path) -> Records:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise _needs_arrow(path) from e
    n = 0
    try:
        check_fetched(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = columns_of(file.schema_arrow.names, f"'{path}'")
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    n += 1
                    yield row, f"{path}, row {n}"
    except (OSError, ValueError) as e:  # ArrowInvalid is a ValueError
        reason = next(iter(str(e).splitlines()), "").rstrip(".")
        raise LowbitError(f"'{path}' cannot be read as a Parquet file: {reason}.") from e
