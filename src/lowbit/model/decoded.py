"""The text of a file as it is read, a stretch or a line at a time: unpacked, and decoded by its
mark.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import LowbitError

_AT_ONCE = 1 << 20  # bytes: a file may be larger than the memory, its lines are not
_MARKS = (  # the four bytes first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = (  # what a file that is no text begins with, and what to do about it
    (b"\x1f\x8b", "gzip data: add .gz to its name"),
    (b"BZh", "bzip2 data: add .bz2 to its name"),
    (b"\xfd7zXZ", "xz data: add .xz to its name"),
    (b"\x28\xb5\x2f\xfd", "zstd data: add .zst to its name"),
    (b"PAR1", "a Parquet table: add .parquet to its name"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"%PDF", "a PDF: extract its text"),
)
_POINTER = b"version https://git-lfs"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _by_arrow(file: BinaryIO) -> _Readable:
    import pyarrow

    stream: _Readable = pyarrow.input_stream(file, compression="zstd")
    return stream


_UNPACKED: dict[str, Callable[[BinaryIO], _Readable]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _by_arrow,
}
COMPRESSED = tuple(_UNPACKED)


def read_text(path: Path, packed: str) -> str:
    """The whole text of a file, with line ends as they are.

    Args:
        packed: a suffix of `COMPRESSED`, or "".

    Raises:
        LowbitError: the file cannot be read, is not whole, or is no text; names it and where it is
            bad.
    """
    return "".join(_decoded(path, packed))


def read_lines(path: Path, packed: str) -> Iterator[str]:
    r"""The lines of a file with their ends as they are: ``\n``, ``\r\n`` or ``\r``.

    Only the line that is asked for is held, besides a stretch of the file. Other characters that
    end lines, such as U+2028, do not: JSON strings may hold them as they are.

    Args:
        packed: a suffix of `COMPRESSED`, or "".

    Raises:
        LowbitError: see `read_text`.
    """
    begun: list[str] = []
    for stretch in _decoded(path, packed):
        for line in io.StringIO(stretch, newline=""):
            begun.append(line)
            if line.endswith(("\n", "\r")):
                yield "".join(begun)
                begun.clear()
    if begun:
        yield "".join(begun)


def check_fetched(path: Path) -> None:
    """Refuse what git-lfs leaves in place of a file that was not fetched: it reads like a text.

    Raises:
        LowbitError: the file is such a pointer.
        OSError: it cannot be read.
    """
    with path.open("rb") as f:
        if f.read(len(_POINTER)) == _POINTER:
            raise LowbitError(
                f"'{path}' is a git-lfs pointer, not the file itself: run 'git lfs pull' in its "
                "folder, "
                "or download it again."
            )


def needs_arrow(path: Path) -> LowbitError:
    """The refusal of a file that only pyarrow reads, where that is missing."""
    return LowbitError(
        f"'{path}' is read through pyarrow: pip install 'lowbit[eval]', or give a .txt or .jsonl "
        "file."
    )


def _bytes(path: Path, packed: str) -> Iterator[bytes]:
    try:
        check_fetched(path)
        file = path.open("rb")
    except OSError as e:
        raise LowbitError(f"'{path}' cannot be read: {e.strerror}.") from e
    with file:
        try:
            stream: _Readable = _UNPACKED[packed](file) if packed else file
            while some := stream.read(_AT_ONCE):
                yield some
        except ImportError as e:
            raise needs_arrow(path) from e
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
            if not packed:
                raise LowbitError(f"'{path}' cannot be read: {e}.") from e
            raise LowbitError(
                f"'{path}' cannot be unpacked ({e}). Is it a whole {packed} file? Make or download "
                "it again."
            ) from e


def _decoded(path: Path, packed: str) -> Iterator[str]:
    r"""UTF-8 with or without its mark, UTF-16 and UTF-32 with theirs; no stretch ends within a
    ``\r\n``.
    """
    stretches = _bytes(path, packed)
    some = next(stretches, b"")
    encoding = next((name for mark, name in _MARKS if some.startswith(mark)), "utf-8-sig")
    known = next((kind for start, kind in _KINDS if some.startswith(start)), None)
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder(encoding)(), translate=False
    )
    count = 0
    while True:
        count += len(some)
        # The zeros of a file in UTF-16 without its mark tell more than the bytes that are no UTF-8.
        if encoding == "utf-8-sig" and b"\0" in some:
            raise _binary(path, known)
        try:
            text = decoder.decode(some, final=not some)
        except UnicodeDecodeError as e:
            if known:
                raise LowbitError(f"'{path}' is {known}.") from e
            at = count - len(e.object) + e.start  # the object is the end of what was read so far
            raise _undecodable(path, encoding, at) from e
        if "\0" in text:
            raise _binary(path, known)
        yield text
        if not some:
            return
        some = next(stretches, b"")


def _undecodable(path: Path, encoding: str, at: int) -> LowbitError:
    unmarked = encoding == "utf-8-sig"
    meant = "UTF-8 text" if unmarked else f"the {encoding.upper()} text that its mark announces"
    return LowbitError(f"'{path}' is not {meant} (byte {at}). Convert it first.")


def _binary(path: Path, known: str | None) -> LowbitError:
    unclear = (
        "binary data, or UTF-16 or UTF-32 without its mark: convert it to UTF-8 text first (iconv "
        "-t UTF-8)"
    )
    return LowbitError(
        f"'{path}' is {known}." if known else f"'{path}' holds NUL bytes: it is {unclear}."
    )
