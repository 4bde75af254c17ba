"""One run of `lowbit quantize` with the processor seconds of its parts, of each rank.

    python benchmarks/parts.py OUT.json MODEL SCHEME RECIPE[,SETTING ...] FOLDER TEXT SAMPLES LENGTH
    python -m torch.distributed.run --standalone --nproc-per-node 4 benchmarks/parts.py OUT.json ...

Every rank writes OUT.json.RANK: part -> [processor seconds, seconds]. Processor seconds are the
process's own, its threads' and its children's, so that ranks that wait for a core count for little;
what a part calls that is a part of its own is left out of it. "waiting" is what is sent and waited
for: its seconds include those for which a rank waits for the others.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowbit
from lowbit.methods import _hessian, awq, claq, gptq
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._soft import SoftBlock
from lowbit.model.block import Block
from lowbit.model.ranks import Ranks
from lowbit.model.stream import ModelStream
from lowbit.run import closing, shards, workplace
from lowbit.run.launch import joined

# Part -> the functions that do it, where they are looked up.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "passes": [(Block, "run"), (Block, "observe"), (Block, "observe_inside")],
    "Hessians": [(_hessian, "_gram")],
    "factors": [(_hessian, "inverse_factor")],
    "range search": [(gptq, "fit_range")],
    "columns": [(gptq, "code_in_order"), (claq, "code_in_order")],
    "scale search": [(awq, "best_scale")],
    "clip search": [(awq, "search_clip")],
    "steps": [(Reconstruction, "gradients")],
    "soft weights": [(SoftBlock, "weights"), (SoftBlock, "descend")],
    "hardening": [(SoftBlock, "harden")],
    "judging": [(Reconstruction, "loss")],
    "reading": [(ModelStream, "block_weights")],
    "packing": [(shards, "block_tensors")],
    "hashing": [(workplace, "tensor_hash"), (workplace, "shard_hashes")],
    "writing": [(workplace, "save_shard"), (shards, "compare_block")],
    "closing check": [(closing, "verify")],
    "waiting": [
        *((Ranks, name) for name in ("_reduce", "stacked", "joined_", "summed_part")),
        *((Ranks, name) for name in ("hand_round", "everyone", "broadcast")),
    ],
}


def clock() -> tuple[float, float]:
    children = os.times()
    used = time.process_time() + children.children_user + children.children_system
    return used, time.perf_counter()


class Timed:
    """Adds up the seconds spent in functions, those of other parts inside them left out."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._inside: list[list[float]] = []

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        spent = self.spent.setdefault(part, [0.0, 0.0])

        def called(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            self._inside.append([0.0, 0.0])
            try:
                return function(*args, **kwargs)
            finally:
                inside = self._inside.pop()
                taken = [b - a for a, b in zip(start, clock(), strict=True)]
                for i in (0, 1):
                    spent[i] += taken[i] - inside[i]
                    if self._inside:
                        self._inside[-1][i] += taken[i]

        return called


def main() -> None:
    out, model, scheme, recipe, folder, text, samples, length = sys.argv[1:9]
    name, *settings = recipe.split(",")
    timed = Timed()
    for part, places in PARTS.items():
        for owner, attribute in places:
            setattr(owner, attribute, timed.wrap(part, getattr(owner, attribute)))
    start = clock()
    with joined("cpu", print) as ranks:
        done = lowbit.quantize(
            model,
            scheme,
            name,
            out=folder,
            calib=text,
            samples=int(samples),
            length=int(length),
            settings=settings,
            device="cpu",
            ranks=ranks,
        )
    whole = [b - a for a, b in zip(start, clock(), strict=True)]
    rest = [whole[i] - sum(s[i] for s in timed.spent.values()) for i in (0, 1)]
    found = {**timed.spent, "the rest": rest, "all": whole}
    found["blocks"] = [0.0, sum(b["seconds"] for b in done.report["blocks"])]
    Path(f"{out}.{ranks.rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
