"""One process at a time in a folder: a lock that goes with its holder, however that one dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .disk import disk

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lowbit.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """The right to write into a folder, held until `release` or the end of the process.

    The file `LOCK` in the folder carries the lock and says who holds it. On a file system without
    locks the work goes on after a warning.

    Attributes:
        folder: the locked one; to be set anew when it gets another name.
        before: the command that died in the folder; None if there was none, or nothing is locked.

    Args:
        folder: is there. command: the holder's, for whoever comes second.

    Raises:
        LowbitError: another process holds it; the folder cannot be written.
        FileNotFoundError: the folder is gone.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder = folder
        path = folder / LOCK
        while True:
            self._handle = _opened(path)
            try:
                self._holds = self._take()
                if _is_at(self._handle, path):
                    break
            except BaseException:
                os.close(self._handle)
                raise
            os.close(self._handle)  # its holder took the file away when it released it
        self.before: str | None = _said(path).get("command") if self._holds else None
        own = {"command": command, "pid": os.getpid(), "host": socket.gethostname()}
        with disk(path):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(own).encode(), 0)

    def _take(self) -> bool:
        """Lock the open file; False where the file system has no locks."""
        if fcntl is None:
            _warn(self.folder, "none on this system")
            return False
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise LowbitError(_busy(self.folder)) from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise LowbitError(f"cannot lock '{self.folder}': {e.strerror or e}.") from e
            _warn(self.folder, e.strerror or str(e))
            return False
        return True

    def release(self) -> None:
        """Take the file away and let others in."""
        try:
            (self.folder / LOCK).unlink(missing_ok=True)
        except OSError:
            pass  # a file without a lock stands in nobody's way
        finally:
            os.close(self._handle)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise LowbitError(f"cannot write into '{path.parent}': {e.strerror or e}.") from e


def _is_at(handle: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


def _said(path: Path) -> dict[str, Any]:
    """What a lock file says of its holder; nothing if it is being written or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _busy(folder: Path) -> str:
    said = _said(folder / LOCK)
    who = f"lowbit {said['command']}" if "command" in said else "another command of lowbit"
    where = "" if said.get("host") in (None, socket.gethostname()) else f" on {said['host']}"
    process = f" (process {said['pid']}{where})" if "pid" in said else ""
    return (
        f"'{folder}' is in use: {who}{process} works in it. Wait until it ends, or choose another "
        "-o."
    )


def _warn(folder: Path, why: str) -> None:
    warnings.warn(
        f"'{folder}' cannot be locked ({why}): let no other command work in it meanwhile.",
        RuntimeWarning,
        stacklevel=4,
    )
