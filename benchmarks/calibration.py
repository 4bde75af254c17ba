"""Seconds of calibration's parts on one wide random block, each next to its floor: its matrix
products at this machine's own rate.

    python benchmarks/calibration.py OUT.json [ROWS [LENGTH [HIDDEN [INNER]]]]

A Llama block with random weights and inputs, 32 x 512 tokens, hidden 1024 and 2816 unless told
otherwise; presets `awq` and `gptq` at W2A16g64, `claq` at W2A16. Prints a table in Markdown and
writes JSON. Seconds are the process's own processor time (on an accelerator those of the clock), so
that a busy machine counts for little. The floor is the flops of the part's matrix products over the
rate of one product of (tokens, hidden) by (hidden, inner) in float32, for the factor of (hidden,
hidden) in float64; for AWQ's scale search, with no candidate left early. "capture" has the sums of
x x^T in it. "all" is the methods alone, without the float target and the losses.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import random_llama
from tuning import first_block

import lowbit.methods._hessian as hessian
import lowbit.methods._sites as sites
import lowbit.methods.awq as awq
import lowbit.methods.claq as claq
import lowbit.methods.gptq as gptq
from lowbit.grid.names import parse_scheme
from lowbit.machine import pick_device
from lowbit.model.block import Block
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe.presets import load_recipe


def clock() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


class Part:
    """Adds up the seconds spent in a function, those of other parts inside it left out."""

    def __init__(self, function: Callable[..., Any], running: list[Part]) -> None:
        self.function, self.seconds, self._inside, self._running = function, 0.0, 0.0, running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start, self._inside = clock(), 0.0
        self._running.append(self)
        try:
            return self.function(*args, **kwargs)
        finally:
            self._running.pop()
            taken = clock() - start
            self.seconds += taken - self._inside
            if self._running:
                self._running[-1]._inside += taken


def rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Flops per second of a matrix product, the best of five."""
    a, b = (
        torch.randn(rows, inner, dtype=dtype, device=device),
        torch.randn(inner, columns, dtype=dtype, device=device),
    )
    best = float("inf")
    for _ in range(5):
        start = clock()
        a @ b
        best = min(best, clock() - start)
    return 2 * rows * inner * columns / best


def model(folder: str, hidden: int, inner: int) -> Path:
    return random_llama(Path(folder), hidden, inner, 2)


def floors(method: str, tokens: int, length: int, h: int, f: int) -> dict[str, float]:
    """Flops in float32 of each part's matrix products; those of the factor in float64."""
    # Causal: half of all pairs, twice.
    attention, project, mlp = (
        2 * tokens * length * h,
        2 * tokens * h * h,
        2 * tokens * h * f,
    )
    grams = 2 * tokens * (h * h + f * f)
    if method == "awq":
        # One pass to the last input; candidates run attention and the MLP, twenty times and once
        # more for what is expected, or a product with a Gram matrix.
        searched = 21 * (4 * project + attention + 3 * mlp) + 20 * 2 * h * (h * h + f * f)
        return {
            "capture": 2 * (4 * project + attention + 2 * mlp),
            "statistics": grams,
            "scale search": searched,
            "clip search": 10 * 2 * 64 * (4 * h * h + 3 * h * f),
        }
    # Inputs are collected site by site: nothing runs before attention's; then up to its output's,
    # up to the MLP's, and inside the MLP.
    capture = (3 * project + attention) + (4 * project + attention) + 2 * mlp
    loop = h * h * (4 * h + 2 * f) + h * f * f
    return {
        "capture": capture,
        "statistics": 2 * tokens * (3 * h * h + f * f),
        "factor": (3 * h**3 + f**3) * 2 / 3,
        "range search": 0.0,
        "column loop": loop,
    }


def watched(method: str) -> dict[str, tuple[Any, str]]:
    """Part -> the function that does it, where it is looked up."""
    if method == "awq":
        return {
            "capture": (awq, "collect_inputs"),
            "scale search": (awq, "best_scale"),
            "clip search": (awq, "search_clip"),
            "capture for the clip": (awq.AWQ, "_moments"),
        }
    parts: dict[str, tuple[Any, str]] = {
        "capture": (sites, "input_hessians"),
        "factor": (hessian, "inverse_factor"),
    }
    if method == "gptq":
        return {
            **parts,
            "range search": (gptq, "fit_range"),
            "column loop": (gptq, "code_in_order"),
        }
    return {**parts, "column loop": (claq, "code_in_order")}


def timed(method: str, recipe: Any, block: Block) -> dict[str, float]:
    """Seconds of each part, and of everything."""
    places = watched(method)
    kept, running = {part: getattr(*at) for part, at in places.items()}, []
    parts = {part: Part(f, running) for part, f in kept.items()}
    try:
        for part, (owner, name) in places.items():
            # A function, so that it binds as a method.
            setattr(owner, name, (lambda p: lambda *a, **k: p(*a, **k))(parts[part]))
        start = clock()
        for step in recipe.methods:
            block = step(block)
        whole = clock() - start
    finally:
        for part, (owner, name) in places.items():
            setattr(owner, name, kept[part])
    return {**{part: p.seconds for part, p in parts.items()}, "all": whole}


def main() -> None:
    out, *sizes = sys.argv[1:]
    rows, length, h, f = [int(n) for n in sizes] + [32, 512, 1024, 2816][len(sizes) :]
    torch.manual_seed(0)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        device = pick_device("auto")
        stream = ModelStream(model(folder, h, f), device)
        single, double = (
            rate(min(rows * length, 8192), h, f, torch.float32, device),
            rate(h, h, h, torch.float64, device),
        )
        x = (torch.randn(rows, length, h) * torch.exp(torch.randn(h))).to(stream.dtype)
        streams = Streams(x, x + 0.05 * torch.randn_like(x), rows)
        for method, scheme in (("awq", "W2A16g64"), ("gptq", "W2A16g64"), ("claq", "W2A16")):
            recipe = load_recipe(method, scheme=parse_scheme(scheme))
            needed = floors(method, rows * length, length, h, f)
            seconds = timed(method, recipe, first_block(stream, recipe, streams, length))
            if method == "awq":
                seconds["capture"] += seconds.pop("capture for the clip")
            needed["capture"] += needed.pop("statistics")
            for part, taken in seconds.items():
                work = sum(
                    v / (double if p == "factor" else single)
                    for p, v in needed.items()
                    if part in (p, "all")
                )
                results.append({"method": method, "part": part, "seconds": taken, "floor": work})
    about = {
        "threads": torch.get_num_threads(),
        "device": str(device),
        "rows": rows,
        "length": length,
        "hidden": h,
        "inner": f,
    }
    about |= {"float32_gflops": single / 1e9, "float64_gflops": double / 1e9}
    print(
        f"{rows} x {length} tokens, hidden {h} and {f}; {single / 1e9:.0f} GFLOP/s in float32, "
        f"{double / 1e9:.0f} in float64\n"
    )
    print("| method | part | seconds | floor | times |\n|---|---|---|---|---|")
    for r in results:
        times = f"{r['seconds'] / r['floor']:.2f}" if r["floor"] else ""
        print(f"| {r['method']} | {r['part']} | {r['seconds']:.2f} | {r['floor']:.2f} | {times} |")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps({**about, "parts": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
