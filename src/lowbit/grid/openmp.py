"""The threads that torch's own operations run on, for compiled code that shares them."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import torch


class Team(ctypes.Structure):
    """Entries of an OpenMP runtime, for compiled code that shares its threads; all null where there
    is none.
    """

    _fields_ = [(name, ctypes.c_void_p) for name in ("parallel", "number", "count")]


_ENTRIES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_RUNTIMES = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\w]*$")


@functools.cache
def team() -> Team:
    """The OpenMP runtime torch has loaded, on Linux."""
    torch.ones(1 << 16).add_(1)  # a parallel region, so that the runtime is surely there
    try:
        loaded = {
            line.split()[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if _RUNTIMES.search(line)
        }
    except OSError:
        return Team()
    torchs = {path for path in loaded if Path(path).is_relative_to(Path(torch.__file__).parent)}
    if len(chosen := torchs or loaded) != 1:  # none, or no telling whose threads torch uses
        return Team()
    try:
        runtime = ctypes.CDLL(chosen.pop())
        return Team(*(ctypes.cast(getattr(runtime, entry), ctypes.c_void_p) for entry in _ENTRIES))
    except (OSError, AttributeError):
        return Team()
