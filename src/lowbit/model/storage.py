"""Where activation streams live: on the compute device, in host memory, or in a memory-mapped file
that is gone with the run.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import LowbitError, in_bytes

Place = Literal["device", "host", "disk"]

_FULL = {
    errno.ENOSPC: "{} free. Free some",
    errno.EDQUOT: "more than your quota there leaves ({} free on the disk). Free some",
    errno.EFBIG: (
        "more than one file may have there (ulimit -f, or the file system; {} free). "
        "Raise the limit"
    ),
}
_WILLNEED = 3  # MADV_WILLNEED, the same number on Linux, macOS and the BSDs
_ZEROS = 1 << 22


@dataclass(frozen=True)
class Storage:
    """Makes the tensors that hold activation streams: plain ones, to be indexed, sliced and written
    like any other.

    Attributes:
        place: "device" is the memory of the compute device. "host" is CPU memory, page-locked where
            the device is an accelerator (torch rounds such an allocation up to a power of two).
            "disk" is a file in ``folder``, mapped into memory.
        device: where blocks are computed.
        folder: for the files; made if it is missing.
    """

    place: Place
    device: torch.device
    folder: Path | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary contents. On disk its space is reserved now and given back when
        the tensor dies.

        Raises:
            LowbitError: the disk has not that much room, or cannot be written or mapped; memory
                cannot be page-locked.
        """
        if self.place == "device":
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if self.place == "host":
            return self._in_memory(tuple(shape), dtype)
        count = math.prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        assert self.folder is not None
        return torch.frombuffer(_mapped(self.folder, count * dtype.itemsize), dtype=dtype).view(
            tuple(shape)
        )

    def _in_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return torch.empty(shape, dtype=dtype)
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as e:
            wanted = in_bytes(math.prod(shape) * dtype.itemsize)
            raise LowbitError(
                f"no page-locked memory for a stream of activations ({wanted}: "
                f"{str(e).splitlines()[0]}). Free some, raise 'ulimit -l', or keep "
                "them in a file (--offload disk), and run the same command: it continues after the "
                "last finished block."
            ) from e

    def prefetch(self, x: Tensor, rows: slice | Tensor) -> None:
        """Have the system start to read some rows of a stream from disk, if that is where it lives.
        A hint: nothing waits or fails.

        Args:
            x: (rows, ...) contiguous. rows: a slice of step 1, or (n,) int64 row numbers.
        """
        if self.place != "disk" or not x.is_contiguous() or x.device.type != "cpu":
            return
        size = x[:1].nbytes
        if isinstance(rows, slice):
            spans = [rows.indices(len(x))[:2]]
        else:
            spans = [(i, i + 1) for i in rows.tolist()]
        for start, stop in spans:
            if stop > start:
                _willneed(x.data_ptr() + start * size, (stop - start) * size)


def _mapped(folder: Path, size: int) -> mmap.mmap:
    """A shared mapping of a new file without a name: nothing of it is left however the process
    ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="streams-", suffix=".tmp", dir=folder)
        left = _unlinked(Path(name))
        try:
            _reserve(handle, size)
            mapping = mmap.mmap(handle, size)
        except BaseException:
            if left is not None:
                left.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)  # the mapping has a handle of its own
    except OSError as e:
        if e.errno in _FULL:
            short = _FULL[e.errno].format(in_bytes(_free(folder)))
            raise LowbitError(
                f"no room for a stream of activations in '{folder}': {in_bytes(size)} wanted, "
                f"{short}, or name a "
                "folder on another disk (--offload-dir), or keep them in memory (--offload host), "
                "and run the same command: it continues after "
                "the last finished block. Fewer --samples take less, as a run of their own."
            ) from e
        raise LowbitError(
            f"cannot keep activations in '{folder}': {e.strerror or e}. Name another folder "
            "(--offload-dir), or keep them in memory (--offload host)."
        ) from e
    if left is not None:
        weakref.finalize(mapping, left.unlink, missing_ok=True)
    return mapping


def _unlinked(path: Path) -> Path | None:
    """Take a file's name away; the path, if the system keeps the names of open files."""
    try:
        path.unlink()
    except OSError:
        return path
    return None


def lies_in_memory(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether files in a folder, which need not exist yet, take memory: on tmpfs and the like, as
    far as the system tells.

    Args:
        mounts: a file like /proc/self/mounts.
    """
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return False
    at = folder.resolve()
    over = [
        (len(Path(where).parts), kind) for _, where, kind, *_ in lines if at.is_relative_to(where)
    ]
    # Of several on one point the last one counts.
    return bool(over) and max(reversed(over), key=lambda o: o[0])[1] in (
        "tmpfs",
        "ramfs",
    )


def _reserve(handle: int, size: int) -> None:
    """Give a file its blocks on disk. A page that finds no room when it is written to is no error
    one can catch, but SIGBUS.
    """
    if sys.platform != "darwin":
        os.posix_fallocate(handle, 0, size)
        return
    for at in range(0, size, _ZEROS):  # macOS has no posix_fallocate
        os.write(handle, bytes(min(_ZEROS, size - at)))


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _willneed(address: int, size: int) -> None:
    """madvise: `mmap` objects have it too, but a tensor does not lead back to its mapping."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), _WILLNEED)
