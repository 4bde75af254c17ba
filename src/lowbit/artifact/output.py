"""Where a command's folder will lie, where it is made meanwhile, and who may write there.

A folder OUT that does not exist is made as OUT.partial and renamed. One that exists and is empty
may be a mount point, the current directory or somebody's subvolume, which no rename replaces: it is
made in OUT/.partial, and its files are moved up at the end, config.json and report.json last.
Until then no loader finds a model in OUT.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..errors import LowbitError
from .disk import disk
from .lock import Lock
from .tree import MOVING, REPORT, emptied, entries, move_up, take_back

INSIDE = ".partial"
_TRIES = 100


@dataclass
class Output:
    """The folder that a command makes.

    Attributes:
        given: as the user named it. folder: the same without symbolic links, "." and "..".
        partial: where it is made meanwhile, on the same file system unless a mount came in between.
        lock: held on ``partial``. None where nothing is to be made: ``folder`` is finished, or this
            process only reads what another one writes.
    """

    given: Path
    folder: Path
    partial: Path
    lock: Lock | None = None

    def publish(self, notes: tuple[str, ...] = ()) -> None:
        """Give what is in ``partial`` its final place. `is_moving` after a death in between.

        Args:
            notes: patterns of files that are not part of it.

        Raises:
            LowbitError: the file system refuses, or files have come into ``folder`` meanwhile.
        """
        with disk(self.folder):
            if not self.folder.exists():
                with suppress(OSError):  # a file system that renames no folders renames files
                    os.replace(self.partial, self.folder)
                    if self.lock is not None:
                        self.lock.folder = self.folder
                    return
                self.folder.mkdir(parents=True)
            move_up(self.partial, self.folder, notes)
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def is_moving(self) -> bool:
        """Whether a process died while it moved the finished files to their final place."""
        return (self.partial / MOVING).is_file()

    def clear(self) -> None:
        """Remove what is in ``partial``, and what was moved out of it already."""
        take_back(self.partial, self.folder)
        emptied(self.partial)


@contextmanager
def claimed(
    given: Path,
    command: str,
    *,
    finished: bool = False,
    resumes: tuple[str, ...] = (),
    writes: bool = True,
) -> Iterator[Output]:
    """A folder to be made, found possible and locked before any work.

    What is still empty at the end is removed. What is in ``partial`` stays.

    Args:
        command: whose folder it will be, for others that find it in use.
        finished: let a folder with a report in it pass, unlocked: it may be what is asked for.
        resumes: patterns of files that an unfinished run, which goes on, leaves in ``partial``.
        writes: False for a process that is told by the one that writes where it does.

    Raises:
        LowbitError: the folder holds something else, is in use, or cannot be written.
    """
    folder = _resolved(given)
    if not writes:
        yield Output(given, folder, _beside(folder))
        return
    partial, lock, made = _taken(folder, command)
    if partial is None:
        if not (finished and (folder / REPORT).is_file()):
            raise LowbitError(
                f"'{given}' exists and is not empty. Choose another -o, or remove it first."
            )
        yield Output(given, folder, folder / INSIDE)
        return
    output = Output(given, folder, partial, lock)
    try:
        if lock is not None and lock.before == "export":  # which never goes on
            output.clear()
        _must_go_on(partial, resumes)
        yield output
    finally:
        _released(lock, [partial, *made])


@contextmanager
def working(given: Path, command: str) -> Iterator[Path]:
    """A folder that a command fills in place, found possible and locked before any work.

    What was made and is still empty at the end is removed.

    Yields:
        the folder without symbolic links, "." and "..".

    Raises:
        LowbitError: it is a file, in use, or cannot be written.
    """
    folder = _resolved(given)
    lock, made = _locked(folder, command)
    try:
        yield folder
    finally:
        _released(lock, made)


# --- where ---------------------------------------------------------------------------------------


def _resolved(given: Path) -> Path:
    """The path as given, unless its last part is no name of its own: a link, "." or ".."."""
    with disk(given):
        folder = given
        if given.name in ("", "..") or given.is_symlink():
            try:
                folder = given.resolve()
            except RuntimeError as e:  # before Python 3.13, of links in a circle
                raise LowbitError(
                    f"cannot write '{given}': its symbolic links lead in a circle."
                ) from e
        if folder.is_symlink():
            raise LowbitError(f"cannot write '{given}': its symbolic links lead in a circle.")
        if folder.exists() and not folder.is_dir():
            raise LowbitError(f"'{given}' is a file, not a folder. Choose another -o.")
    return folder


def _beside(folder: Path) -> Path:
    return folder.parent / (folder.name + ".partial")


def _meanwhile(folder: Path) -> Path | None:
    """Where a folder is made, by what is there now; None if it holds something already."""
    beside, inside = _beside(folder), folder / INSIDE
    if not folder.exists():
        return beside
    if (folder / REPORT).is_file():
        return None
    found = entries(folder)
    if inside.is_dir():
        others = [n for n in found if n != INSIDE]
        if others and not (inside / MOVING).is_file():
            raise LowbitError(
                f"'{folder}' holds '{others[0]}' besides an unfinished run ('{inside}'). Move it "
                "away, "
                "or choose another -o."
            )
        return inside
    if (beside / MOVING).is_file():
        return beside
    if found:
        return None
    return beside if beside.is_dir() and any(beside.iterdir()) else inside


def _must_go_on(partial: Path, resumes: tuple[str, ...]) -> None:
    """Refuse what lies where the work is to be done, unless it is an unfinished run of this
    command.
    """
    found = [n for n in entries(partial) if not n.endswith(".tmp")]
    if found and not any(fnmatch(n, pattern) for n in found for pattern in resumes):
        raise LowbitError(
            f"'{partial}' holds files that no unfinished run of this command left there "
            f"('{found[0]}'). "
            "Remove it first, or choose another -o."
        )


def _taken(folder: Path, command: str) -> tuple[Path | None, Lock | None, list[Path]]:
    """Choose and lock the folder to work in; again if another process has finished there
    meanwhile.
    """
    while True:
        with disk(folder):
            partial = _meanwhile(folder)
        if partial is None:
            return None, None, []
        lock, made = _locked(partial, command)
        with disk(folder):
            if _meanwhile(folder) == partial:
                return partial, lock, made
        _released(lock, made)


# --- made, locked, released ----------------------------------------------------------------------


def _locked(folder: Path, command: str) -> tuple[Lock, list[Path]]:
    """Make a folder with its parents and lock it; also the folders that were made, innermost
    first.
    """
    made: list[Path] = []
    for _ in range(_TRIES):
        for missing in _missing(folder):
            with disk(folder), suppress(FileExistsError):
                missing.mkdir()
                made.insert(0, missing)
        if not folder.is_dir():
            raise LowbitError(
                f"'{folder}' is needed as a folder, but it is a file. Move it away, or choose "
                "another -o."
            )
        try:
            return Lock(folder, command), made
        except FileNotFoundError:
            continue  # another process has just removed it, as it was empty
        except BaseException:
            _removed(made)
            raise
    raise LowbitError(f"cannot write into '{folder}': it takes no files.")


def _missing(folder: Path) -> list[Path]:
    """The folders to make, outermost first."""
    with disk(folder):
        out: list[Path] = []
        for path in (folder, *folder.parents):
            if path.exists():
                break
            out.insert(0, path)
        return out


def _released(lock: Lock | None, made: list[Path]) -> None:
    if lock is not None:
        lock.release()
    _removed(made)


def _removed(made: list[Path]) -> None:
    for path in made:
        with suppress(OSError):  # not empty
            path.rmdir()
