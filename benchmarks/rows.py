"""Recipes on given rows of tokens: perplexity, KL to the float model, seconds. The same input as
benchmarks/peers/*.py.

    python benchmarks/rows.py MODEL ROWS.json SCHEME OUT.json RECIPE
    [RECIPE[,method.option=value...] ...]

ROWS.json holds {"calibration": [[ids]], "evaluation": [[ids]]}. Prints a table and writes JSON.
"seconds" leaves imports and the evaluation rows' share of the passes out: they are fed after
tuning. "forward" is the part of them spent in forward passes of the block or of a part of it.
"processor_seconds" is the process's own processor time, which a busy machine does not stretch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import tuning

import lowbit.methods._scale_search
import lowbit.model.block
from lowbit.evaluate import Tally
from lowbit.grid.names import parse_scheme
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe.presets import load_recipe


class Clock:
    """Adds up the seconds spent in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def main() -> None:
    clock = Clock(lowbit.model.block.functional_call)
    lowbit.model.block.functional_call = lowbit.methods._scale_search.functional_call = clock
    model, rows_file, scheme, out, *recipes = sys.argv[1:]
    rows = json.load(open(rows_file))
    calibration, evaluation = torch.tensor(rows["calibration"]), torch.tensor(rows["evaluation"])
    plain = ModelStream(model)
    results = []
    for entry in recipes:
        name, *settings = entry.split(",")
        recipe = load_recipe(name, scheme=parse_scheme(scheme), settings=settings)
        begun, spent = time.perf_counter(), time.process_time()
        seen = tuning.staged(plain, recipe, calibration)
        stream, before_blocks = seen.source, time.perf_counter() - begun
        before_spent = time.process_time() - spent
        x, held = stream.embed(calibration), stream.embed(evaluation)
        float_held = held
        blocks, start, apart, clock.seconds, forward = [], time.perf_counter(), 0.0, 0.0, 0.0
        spent = time.process_time()
        made: list[Any] = []

        def show(_: int, block: Any, made: list[Any] = made) -> None:
            made.append(block)

        for i, _ in enumerate(tuning.tuned(seen, Streams(x, x, len(x)), show)):
            block = made.pop()
            pause, forward, own = time.perf_counter(), forward + clock.seconds, time.process_time()
            float_held = replace(block.exact(), input_quantizers={}).run(
                float_held, stream.block_weights(i)
            )
            held = block.run(held, block.decoded())
            blocks.append(
                {"before": block.notes["loss_before"], "after": block.notes["loss_after"]}
            )
            apart += time.perf_counter() - pause
            spent += time.process_time() - own
            clock.seconds = 0.0
        seconds = before_blocks + time.perf_counter() - start - apart
        spent = before_spent + time.process_time() - spent
        tuned, floating = Tally(), Tally()
        for at in range(0, len(evaluation), 8):
            ids = evaluation[at : at + 8]
            expected = stream.head(float_held[at : at + 8])
            floating.add(expected, ids, None)
            tuned.add(stream.head(held[at : at + 8]), ids, expected)
        found = tuned.result()
        results.append(
            {
                "recipe": entry,
                "scheme": scheme,
                "perplexity": found.perplexity,
                "kl": found.kl,
                "top1": found.top1,
                "float": floating.result().perplexity,
                "seconds": seconds,
                "processor_seconds": spent,
                "forward": forward,
                "blocks": blocks,
            }
        )
        r = results[-1]
        share = (
            f"{seconds:.1f} s ({spent:.1f} s of processor), {forward / seconds:.0%} in forward "
            "passes"
        )
        print(
            f"{entry:40} {scheme:12} float {r['float']:.4f}  perplexity {r['perplexity']:.4f}  KL "
            f"{r['kl']:.4f}  {share}",
            flush=True,
        )
        json.dump(results, open(out, "w"), indent=1)


if __name__ == "__main__":
    main()
