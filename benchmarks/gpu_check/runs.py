"""Whole runs: two layers of Llama-3-8B's shape, beside what `lowbit plan` says of them."""

from __future__ import annotations

import re
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lowbit import quantize
from lowbit.grid.names import parse_scheme
from lowbit.model.stream import ModelStream
from lowbit.plan import plan_for
from lowbit.recipe import load_recipe
from lowbit.run import closing
from lowbit.run.events import BlockDone, Working

from .bench import GIB, Bench, put, tried

RECIPES = ("fast", "default")
LAYERS = 32  # of Llama-3-8B
HELD_OUT = 16  # rows
FEW = ("tesseraq.schedule=exponential-2-2", "tesseraq.iters=1", "awq.exponents=2", "awq.shrinks=2")
TOLD = ("seconds", "peak_memory", "reserved_memory", "loss_before", "loss_after", "trouble")


def runs(b: Bench, out: dict[str, Any]) -> None:
    """By recipe: seconds, those of 32 blocks, and memory at its peak and as planned."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        if b.small:  # the loader is a process of its own, which takes as long as all the rest
            held.enter_context(put(closing, "verify", partial(closing.verify, loader=False)))
        model = b.checkpoint(Path(folder) / "model", 2, b.vocab)
        for name in RECIPES:
            out[name] = tried(lambda name=name: run(b, model, name, Path(folder) / name))


def run(b: Bench, model: Path, name: str, out: Path) -> dict[str, Any]:
    scheme, settings = b.pick("W2A16g32", "W2A16g128"), FEW if b.small else ()
    recipe = load_recipe(name, scheme=parse_scheme(scheme), settings=settings)
    plan = plan_for(ModelStream(model, b.device), recipe, b.samples, b.batch[1])
    ledger, start = Ledger(b), time.perf_counter()
    done = quantize(
        model,
        scheme,
        name,
        out=out,
        samples=b.samples,
        length=b.batch[1],
        device=str(b.device),
        calib="stdlib",
        settings=settings,
        watch=ledger.watch,
        progress=ledger.done,
    )
    ledger.begins("end")
    blocks = [{k: r.get(k) for k in TOLD} for r in done.report["blocks"]]
    needs = plan.memory
    return {
        "seconds": time.perf_counter() - start,
        f"{LAYERS} blocks, seconds": (LAYERS - 1) * blocks[0]["seconds"] + blocks[-1]["seconds"],
        "planned_GiB": {
            **{k: v / GIB for k, v in needs.steps.items()},
            "streams": needs.streams / GIB,
            "outer": needs.outer / GIB,
            "peak": needs.peak / GIB,
        },
        "peak_GiB": max(r["peak_memory"] for r in blocks) / GIB,
        "blocks": blocks,
        "quality": done.report["quality"],
        "verified": done.verification.summary,
        "parts: seconds": ledger.parts,
    }


class Ledger:
    """Seconds of everything that is announced."""

    def __init__(self, b: Bench) -> None:
        self._b, self._label, self._at = b, "start", time.perf_counter()
        self.parts: dict[str, float] = {}

    def begins(self, what: str) -> None:
        self._b.sync()
        now = time.perf_counter()
        self.parts[self._label] = self.parts.get(self._label, 0.0) + now - self._at
        self._label, self._at = re.sub(r"( of .*|: round.*)$", "", what), now

    def watch(self, event: Working) -> None:
        self.begins(f"{event.index}: {event.what}")

    def done(self, event: BlockDone) -> None:
        self.begins(f"{event.index}: next block, or the end")
