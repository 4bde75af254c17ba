"""Which floating-point arithmetic a device is fast in, and which a run takes.

Whether a CPU that has instructions for bfloat16 is faster with them is not said by their being
there: one with AMX multiplies bfloat16 four times as fast as float32, some with AVX512-BF16 twice
as fast, others half as fast. It is measured once per machine and remembered, so that a machine
always decides alike.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .cache import cache_folder, processor
from .errors import unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")

_WORTH = 1.25  # times as fast as float32
_NARROW = 512  # hidden units below which products are not what passes spend their time on
_SHAPE = (512, 1024, 1024)  # tokens, inputs, outputs of the product that is timed
_TURNS = 5
_FILE = "bfloat16.json"


def compute_dtype(
    asked: str, device: torch.device, stored: torch.dtype, hidden: int
) -> torch.dtype:
    """The dtype of forward passes.

    Args:
        asked: one of `DTYPES`. "auto" is the checkpoint's own on an accelerator; on a CPU bfloat16
            if the checkpoint has 16 bits, its blocks are wide and the processor is faster so, else
            float32.
        stored: the checkpoint's. hidden: its hidden units.

    Raises:
        LowbitError: no such dtype.
    """
    if asked not in DTYPES:
        raise unknown("dtype", asked, DTYPES)
    if asked != "auto":
        found: torch.dtype = getattr(torch, asked)
        return found
    if device.type != "cpu":
        return stored
    gains = stored.itemsize == 2 and hidden >= _NARROW and multiplies_bfloat16(device)
    return torch.bfloat16 if gains else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are clearly faster there than in float32."""
    if device.type != "cpu":
        return True
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    return _gain() >= _WORTH


@functools.cache
def _gain() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16: as remembered, else as
    measured and then remembered if the cache can be written.
    """
    path = cache_folder() / _FILE
    key = hashlib.sha256(f"{processor()}\0{torch.__version__}".encode()).hexdigest()[:16]
    known = _remembered(path)
    if key not in known:
        known[key] = measured_gain()
        _remember(path, known)
    return known[key]


def measured_gain(clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a product in float32 over those in bfloat16, the shortest of a few turns each.

    Args:
        clock: seconds.
    """
    tokens, inputs, outputs = _SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator)
    w = torch.randn(outputs, inputs, generator=generator)
    pairs = [(x, w), (x.bfloat16(), w.bfloat16())]
    shortest = [float("inf")] * 2
    for turn in range(_TURNS + 1):
        for i, (a, b) in enumerate(pairs):
            start = clock()
            torch.nn.functional.linear(a, b)
            took = clock() - start
            if turn:  # the first one loads libraries
                shortest[i] = min(shortest[i], took)
    return shortest[0] / max(shortest[1], 1e-9)


def _remembered(path: Path) -> dict[str, float]:
    """What lies in the cache; nothing where it is no file of ours."""
    try:
        found = json.loads(path.read_text())
        return {str(k): float(v) for k, v in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember(path: Path, known: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            made.write_text(json.dumps(known))
            os.replace(made, path)
    except OSError:
        pass  # a cache that cannot be written costs a measurement
