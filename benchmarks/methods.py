"""What every method costs on a block of a model, next to its floor.

    python benchmarks/methods.py MODEL ROWS.json SCHEME OUT.json RECIPE [RECIPE[,method.option=value]
    ...] [--block N] [--threads N]

ROWS.json is made by benchmarks/make_rows.py. The block's inputs are the float model's. Seconds are
the process's own processor time, of the recipe's methods alone: without the block's float target,
the pass to its next input and the losses that are reported. "a unit" is a million weights of the
block's quantized linears and a thousand calibration tokens. The floor is the matrix products that
`lowbit plan` counts for these methods, at the rate of a large one on this machine. Prints a table in
Markdown and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tuning import staged

from lowbit.grid.names import parse_scheme
from lowbit.methods.cost import Work
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.plan import plan_for
from lowbit.plan.speed import Speed, measure_speed
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe


def work_of(recipe: Recipe, source: ModelStream, rows: torch.Tensor) -> Work:
    """What `lowbit plan` counts of a block for the methods of a recipe."""
    plan, total = plan_for(source, recipe, *rows.shape), Work()
    for _, entry, method in recipe.entries:
        total += entry.cost(method, plan.shapes).work
    return total


def measured(
    source: ModelStream, recipe: Recipe, rows: torch.Tensor, at: int, speed: Speed
) -> dict[str, Any]:
    model = staged(source, recipe, rows)
    x = source.embed(rows)
    for i in range(at):
        block = model.begin(i, Streams(x, x, len(x)), source.block_kwargs(rows.shape[1])[i])
        x = block.target
    block = model.begin(at, Streams(x, x, len(x)), source.block_kwargs(rows.shape[1])[at])
    weights = sum(block.weight(n).numel() for n in block.grids)
    start = time.process_time()
    for _, _, method in recipe.entries:
        block = method(block)
    seconds = time.process_time() - start
    work = work_of(recipe, source, rows)
    floor = work.half / speed.half + work.single / speed.single
    return {"seconds": seconds, "floor": floor, "units": weights / 1e6 * rows.numel() / 1e3}


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("model", "rows", "scheme", "out"):
        p.add_argument(name)
    p.add_argument("recipes", nargs="+")
    p.add_argument("--block", type=int, default=1)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rows = torch.tensor(json.loads(Path(a.rows).read_text())["calibration"])
    source, speed = ModelStream(a.model), measure_speed(torch.device("cpu"))
    print(
        f"{Path(a.model).name}, block {a.block}, {a.scheme}, {len(rows)} x {rows.shape[1]} tokens, "
        f"{a.threads} thread, products in float32 at {speed.single / 1e9:.0f} GFLOP/s\n\n"
        "| recipe | seconds | ms a unit | floor, ms a unit | times |\n|---|---|---|---|---|"
    )
    results = []
    for entry in a.recipes:
        name, *settings = entry.split(",")
        recipe = load_recipe(name, scheme=parse_scheme(a.scheme), settings=settings)
        found = {"recipe": entry, **measured(source, recipe, rows, a.block, speed)}
        results.append(found)
        unit = 1e3 / found["units"]
        times = f"{found['seconds'] / found['floor']:.1f}" if found["floor"] else ""
        print(
            f"| {entry} | {found['seconds']:.2f} | {found['seconds'] * unit:.2f} | "
            f"{found['floor'] * unit:.2f} | {times} |",
            flush=True,
        )
        Path(a.out).write_text(
            json.dumps(
                {
                    "model": Path(a.model).name,
                    "block": a.block,
                    "scheme": a.scheme,
                    "rows": list(rows.shape),
                    "threads": a.threads,
                    "flops": speed.single,
                    "results": results,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
