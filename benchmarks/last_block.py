"""Ways to tune the last block, behind blocks that another recipe has quantized.

    python benchmarks/last_block.py MODEL ROWS.json SCHEME PREFIX RECIPE[,method.option=value] ...

ROWS.json is made by benchmarks/make_rows.py. PREFIX is the recipe of the blocks before, as fast as
`gptq`; every RECIPE then makes the last one. Prints processor seconds of its methods, the loss that
they report, and perplexity and KL to the float model on the evaluation rows.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tuning

from lowbit.evaluate import Tally
from lowbit.grid.names import parse_scheme
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe


def recipe_of(entry: str, scheme: str) -> Recipe:
    name, *settings = entry.split(",")
    return load_recipe(name, scheme=parse_scheme(scheme), settings=settings)


def main() -> None:
    model, rows_file, scheme, prefix, *entries = sys.argv[1:]
    rows = json.loads(Path(rows_file).read_text())
    calibration, evaluation = (torch.tensor(rows[k]) for k in ("calibration", "evaluation"))
    plain, first = ModelStream(model), recipe_of(prefix, scheme)
    seen, made = tuning.staged(plain, first, calibration), list[Any]()
    source, last = seen.source, len(plain) - 1
    x, quantized = source.embed(calibration), source.embed(evaluation)
    floating, kept = quantized, (x, x)
    for i, after in enumerate(
        tuning.tuned(seen, Streams(x, x, len(x)), lambda _, block: made.append(block))
    ):
        if i == last:
            break
        block = made.pop()
        floating = replace(block.exact(), input_quantizers={}).run(
            floating, source.block_weights(i)
        )
        quantized = block.run(quantized, block.decoded())
        if i == last - 1:
            kept = after.x.clone(), after.xq.clone()
            break
    print("| last block by | seconds | loss | perplexity | KL |\n|---|---|---|---|---|")
    for entry in entries:
        recipe = recipe_of(entry, scheme)
        own = tuning.staged(plain, recipe, calibration)
        streams = Streams(*(t.clone() for t in kept), len(x))
        kwargs = source.block_kwargs(calibration.shape[1])[last]
        block, start = own.begin(last, streams, kwargs), time.process_time()
        for _, _, method in recipe.entries:
            block = method(block)
        seconds, tally = time.process_time() - start, Tally()
        expected = replace(block.exact(), input_quantizers={}).run(
            floating.clone(), source.block_weights(last)
        )
        found = block.run(quantized.clone(), block.decoded())
        for at in range(0, len(evaluation), 8):
            part = slice(at, at + 8)
            tally.add(source.head(found[part]), evaluation[part], source.head(expected[part]))
        result, notes = tally.result(), block.notes.get("tesseraq", {})
        print(
            f"| {entry} | {seconds:.1f} | {notes.get('after', float('nan')):.4f} | "
            f"{result.perplexity:.3f} | {result.kl:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
