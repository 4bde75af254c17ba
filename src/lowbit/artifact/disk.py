"""Files written whole or not at all, and what a file system refuses as one sentence."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from ..errors import DiskFull, LowbitError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what a file system refuses into one sentence.

    Args:
        path: what is being written, for the sentence.

    Raises:
        DiskFull: no space is left, or no more of the user's quota. LowbitError: anything else.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        number, said = getattr(e, "errno", None), str(e)
        if number in _FULL or "No space left" in said or "os error 28" in said:
            raise DiskFull(
                f"no space left on disk while writing '{path}': free some and run the same command."
            ) from e
        raise LowbitError(f"cannot write '{path}': {getattr(e, 'strerror', None) or e}.") from e


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it.

    Raises:
        LowbitError: the file system refuses.
    """
    _atomically(path, lambda f: f.write(data))


def copy_atomic(source: Path, path: Path) -> None:
    """Copy a file of any size in the same way. Raises LowbitError if the file system refuses."""
    with disk(path), open(source, "rb") as held:
        _atomically(path, lambda f: shutil.copyfileobj(held, f))


def _atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with disk(path):
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
