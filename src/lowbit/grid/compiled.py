"""Plain C next to a module, compiled at first use with the machine's own compiler; None where there
is none.

Nothing depends on it: every caller has a way in torch. The library lies in the user's cache under a
name that says what it was made from, so it is built once per source and machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..cache import cache_folder, processor

# Compilers avoid vectors of 512 bits where processors once slowed down at them; here they save a
# quarter of the time.
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = (
    "-O3",
    "-march=native",
    *_WIDE,
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-std=c11",
)


@functools.cache
def library(source: Path, fused: bool = False) -> ctypes.CDLL | None:
    """The compiled form of a C file, or None if there is no compiler, or the one there is cannot
    build it.

    LOWBIT_NO_COMPILER=1 keeps to torch.

    Args:
        fused: products may be added without being rounded; else results are those of separate
            operations, whatever the compiler.
    """
    compiler = (
        shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None or os.environ.get("LOWBIT_NO_COMPILER") == "1" or os.name != "posix":
        return None
    flags = (*_FLAGS, f"-ffp-contract={'fast' if fused else 'off'}")
    made_from = "\0".join([source.read_text(), *flags, compiler, platform.machine(), processor()])
    path = (
        cache_folder() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    )
    try:
        if not path.is_file():
            _build(compiler, flags, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _build(compiler: str, flags: tuple[str, ...], source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        subprocess.run(
            [compiler, *flags, str(source), "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            timeout=120,
        )
        os.replace(made, path)


def pointer(t: Tensor) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor's data.

    Raises:
        ValueError: it is neither.
    """
    if t.device.type != "cpu" or not t.is_contiguous():
        raise ValueError("compiled code takes contiguous tensors on the CPU")
    return ctypes.c_void_p(t.data_ptr())


def threads() -> int:
    """How many threads compiled code should use: as many as torch does."""
    return torch.get_num_threads()
