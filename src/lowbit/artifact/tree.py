"""What lies in a folder that a command makes: listed, emptied, or moved to where it belongs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from ..errors import LowbitError
from .disk import disk, write_atomic
from .lock import LOCK

REPORT = "report.json"
MOVING = "moving.json"  # names of the files that are being moved out of a folder
_LAST = ("config.json", REPORT)  # a folder without them is no model and no artifact
_NOT_OURS = ("lost+found",)  # in a mounted file system that is empty otherwise


def entries(folder: Path) -> list[str]:
    """Names of what lies in a folder, sorted, besides the lock and what a file system puts there
    itself.
    """
    with disk(folder):
        return sorted(p.name for p in folder.iterdir() if p.name not in (LOCK, *_NOT_OURS))


def emptied(folder: Path) -> None:
    """Remove everything from a folder but the lock and what a file system puts there itself."""
    with disk(folder):
        for path in (folder / name for name in entries(folder)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def move_up(partial: Path, folder: Path, notes: tuple[str, ...]) -> None:
    """Move all files of one folder to another, config.json and report.json last.

    Begun once, it can be called again after a death in between: ``partial`` holds `MOVING` then.

    Args:
        notes: patterns of files at the top of ``partial`` that stay.

    Raises:
        LowbitError: one of them is in ``folder`` already. OSError: the file system refuses.
    """
    names = sorted(_files(partial, (LOCK, MOVING, *notes)), key=_order)
    if not (partial / MOVING).is_file():
        for name in names:
            if (folder / name).exists():
                raise LowbitError(
                    f"'{folder}' was empty when the work began, now '{name}' is in it. Move it "
                    "away and run the same command."
                )
        write_atomic(partial / MOVING, json.dumps(names).encode())
    for name in names:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        _move(partial / name, target)


def take_back(partial: Path, folder: Path) -> None:
    """Remove from a folder what `move_up` has moved there; nothing if it was not begun."""
    with suppress(OSError, ValueError):
        for name in json.loads((partial / MOVING).read_text()):
            path = folder / name
            path.unlink(missing_ok=True)
            if path.parent != folder:
                with suppress(OSError):  # not empty yet
                    path.parent.rmdir()


def _files(folder: Path, notes: tuple[str, ...]) -> Iterator[str]:
    """Paths of all files in a folder, relative to it, but for those at its top that match a
    pattern.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not (
            path.parent == folder and any(fnmatch(path.name, n) for n in notes)
        ):
            yield path.relative_to(folder).as_posix()


def _order(name: str) -> tuple[int, str]:
    return (_LAST.index(name) if name in _LAST else -1), name


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError:  # on another file system
        temporary = target.with_name(target.name + ".tmp")
        try:
            shutil.copy(source, temporary)
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        source.unlink()
