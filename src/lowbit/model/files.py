"""The records of a local file, by its suffix: whole texts, JSON, tables, each perhaps
compressed.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LowbitError
from .decoded import COMPRESSED, check_fetched, needs_arrow, read_lines, read_text
from .records import columns_of

_T = TypeVar("_T")
Records = Iterator[tuple[Any, str]]  # a record, and where it stands

_TEXTS = (".txt", ".text")
_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
# What a folder's files must end with to be read; notes and code may lie beside them.
_DATA = (*_TEXTS, ".json", *_LINES, *_TABLES, ".parquet")
# What ends like this is meant as a file, though it may look like the name of a repository.
SUFFIXES = (*_DATA, *COMPRESSED, *_ARCHIVES, ".md", ".py")


def is_data(path: Path) -> bool:
    """Whether a file in a folder of texts is one of them, by its suffix."""
    kind, packed = _kind(path)
    return kind in _DATA and not (packed and kind == ".parquet")


def read_records(path: Path) -> Records:
    """The records of a file, read as they are asked for where it has lines, rows or batches: one
    whole text, or what is in its lines, list, or rows.

    .json holds a list, one object or an object a line; .jsonl and .ndjson an object or text a line;
    .csv and .tsv begin with a line of names; .parquet. Other suffixes are taken as text. Each but
    .parquet may be compressed and then ends with .gz, .bz2, .xz or .zst as well.

    Raises:
        LowbitError: the file cannot be read or is not what its suffix says; names the file and
            line, item or row.
    """
    kind, packed = _kind(path)
    if kind in _ARCHIVES:
        raise LowbitError(f"'{path}' is an archive: unpack it and give the folder.")
    if kind == ".parquet":
        if packed:
            raise LowbitError(
                f"'{path}' is a compressed Parquet file: unpack it first (Parquet compresses its "
                "columns itself)."
            )
        return _parquet(path)
    if kind in _TABLES:
        return _table(path, packed, _TABLES[kind])
    if kind in _LINES:
        return _lines(read_lines(path, packed), path)
    text = read_text(path, packed).replace("\r\n", "\n").replace("\r", "\n")
    return _json(text, path) if kind == ".json" else iter([(text, str(path))])


def _kind(path: Path) -> tuple[str, str]:
    """What is in a file and how it is compressed, as suffixes."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, "")


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise LowbitError(f"{where} is not valid JSON: {e}.") from e


def _lines(lines: Iterable[str], path: Path) -> Records:
    for n, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {n}"
            yield _loads(line.rstrip("\r\n"), where), where


def _json(text: str, path: Path) -> Records:
    if not text.strip():
        return iter(())
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        # One value has ended and another begins: an object a line.
        if e.msg == "Extra data" and e.lineno > 1:
            # Not splitlines(): it also cuts at U+2028 and others that JSON strings may hold as they
            # are.
            return _lines(text.split("\n"), path)
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
    # The csv module's limit, 131072 characters a field, is one for the process and shorter than
    # many texts.
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(path: Path, packed: str, separator: str) -> Records:
    lines = _unless_blank(read_lines(path, packed))
    reader = csv.DictReader(lines, delimiter=separator, strict=True)
    held = _parsed(reader, path, lambda: reader.fieldnames)
    if held is None:
        return
    columns = columns_of(held, f"'{path}'")
    n = 0
    while (row := _parsed(reader, path, lambda: next(reader, None))) is not None:
        n += 1
        where = f"{path}, row {n}"
        if None in row:
            raise LowbitError(
                f"{where} (line {reader.line_num}) has more fields than the first line names. "
                "Quote its texts."
            )
        yield {k: row[k] for k in columns}, where


def _unless_blank(lines: Iterator[str]) -> Iterator[str]:
    """The lines, or none where all are blank."""
    begin: list[str] = []
    for line in lines:
        begin.append(line)
        if line.strip():
            return chain(begin, lines)
    return iter(())


def _parsed(reader: csv.DictReader[str], path: Path, step: Callable[[], _T]) -> _T:
    rows = reader.reader  # whose count goes on where a row fails
    before = rows.line_num
    try:
        with _long_fields():
            return step()
    except csv.Error as e:
        raise LowbitError(
            f"{path}: what begins after line {before} and ends in line {rows.line_num} is not a "
            f"table's row ({e}). Is a quote left open, or not doubled within a text?"
        ) from e


def _parquet(path: Path) -> Records:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise needs_arrow(path) from e
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
