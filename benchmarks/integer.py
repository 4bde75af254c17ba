"""A linear in 8-bit integers against floating point ones, and what quantizing its input costs, side
by side in one run.

    python benchmarks/integer.py OUT.json [OUTxIN] [TOKENS ...]

Prints a table of milliseconds (the median of repeated calls, taken in turns) and writes JSON.
"sums" is the integer product alone, "integers" with the quantization of the input before it and
scales after it. The last columns quantize only: per token, as published by CrossQuant (a scale for
every element, simulated: no integer product follows), and LLM.int8()'s.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from lowbit.grid import Affine, CrossQuant, LLMInt8, PerToken, QTensor
from lowbit.kernels import integer

_SECONDS = 1.0  # for all calls of one row


def milliseconds(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """The median time of each call, all taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while time.perf_counter() - start < _SECONDS or len(next(iter(seconds.values()))) < 5:
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            at = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - at)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def row(tokens: int, q: QTensor, device: str) -> dict[str, float]:
    """Times of one product with so many tokens."""
    x = torch.randn(tokens, q.codes.shape[1], device=device)
    x[:, :4] *= 20
    dense, narrow, half = q.decode(), q.decode().bfloat16(), x.bfloat16()
    weight, grid = integer.IntegerWeight.of(q), PerToken(8, symmetric=True, full_range=True)
    codes, _, zero = integer.quantized(x, grid)
    return milliseconds(
        {
            "float32": lambda: linear(x, dense),
            "bfloat16": lambda: linear(half, narrow),
            "sums": lambda: weight.accumulate(codes, zero, 0),
            "integers": lambda: integer.linear(x, weight, grid),
            "LLM.int8()": lambda: integer.linear(x, weight, LLMInt8()),
            "quantize: per token": lambda: grid(x),
            "CrossQuant": lambda: CrossQuant(8)(x),
            "LLM.int8() ": lambda: LLMInt8()(x),
        },
        device,
    )


def main(out: str, size: str = "4096x4096", *tokens: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width = (int(n) for n in size.split("x"))
    w = torch.randn(rows, width, device=device)
    grid = Affine(8, None, symmetric=True)
    params = grid.fit(w)
    q = QTensor(grid, grid.encode(w, params), params)
    found = {n: row(n, q, device) for n in (int(t) for t in tokens or ("1", "16", "128", "512"))}
    names = list(next(iter(found.values())))
    print(f"{device}, {torch.get_num_threads()} threads, weight {size}, milliseconds")
    print("tokens", *(f"{n:>20}" for n in names))
    for n, times in found.items():
        print(f"{n:6}", *(f"{times[k]:20.3f}" for k in names))
    Path(out).write_text(
        json.dumps(
            {
                "device": device,
                "threads": torch.get_num_threads(),
                "size": size,
                "milliseconds": found,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
