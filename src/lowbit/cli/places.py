"""Checks of the files and folders that commands write at their end, before they begin."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import typer

from ..errors import LowbitError
from .sentences import option_of


def json_file(param: typer.CallbackParam, value: Optional[Path]) -> Optional[Path]:
    """Check that a file can be written; its folder will be made. Leaves nothing behind.

    Raises:
        LowbitError: it cannot, with the reason.
    """
    if value is None:
        return None
    with _refused(value, param):
        if value.exists() and not value.is_file():
            raise LowbitError(
                f"{option_of(param)} '{value}' is not a file: give the name of one, or a new one."
            )
        with _made(value.parent):
            temporary = value.with_name(value.name + ".tmp")  # as write_atomic names it
            there = temporary.exists()
            temporary.open("ab").close()
            if not there:
                temporary.unlink()
    return value


def out_folder(param: typer.CallbackParam, value: Optional[Path]) -> Optional[Path]:
    """Check that files can be written into a folder, which will be made. Leaves nothing behind.

    Raises:
        LowbitError: they cannot, with the reason.
    """
    if value is None:
        return None
    with _refused(value, param):
        if value.exists() and not value.is_dir():
            raise LowbitError(
                f"{option_of(param)} '{value}' is not a folder: give the name of one, or a new one."
            )
        with _made(value), tempfile.TemporaryFile(dir=value):
            pass
    return value


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and remove at the end what was not there before."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _refused(path: Path, param: typer.CallbackParam) -> Iterator[None]:
    """Raise what the file system refuses within as LowbitError."""
    try:
        yield
    except OSError as e:
        raise LowbitError(
            f"{option_of(param)} '{path}' cannot be written: {e.strerror or e}. Choose another "
            "place."
        ) from e


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that a command was asked for, and the folder it lies in."""
    from ..artifact.disk import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
