"""Where a run keeps what it polishes, and that it has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ..artifact.disk import disk
from ..artifact.files import block_tensors, compare_block
from ..model.block import Block
from ..model.calibration import Rows
from ..model.linear_errors import linear_errors
from ..recipe import Recipe
from ..stages import Entered
from ..stages.polish import Knobs, Polished, PolishRows
from .record import with_bytes
from .shards import Shards

Record = Mapping[str, Any]


def polishing(recipe: Recipe, rows: Rows, entered: Entered, shards: Shards) -> tuple[Polished, ...]:
    """The stage after the blocks, if the recipe has it.

    Args:
        entered: see `Polished`.
    """
    store = PolishedShards(shards)
    return tuple(Polished(k, _rows(k, rows), entered, store) for k in _knobs(recipe))


def check_rows(recipe: Recipe, rows: Rows) -> None:
    """Raise LowbitError, before any work, if there are too few rows to polish with."""
    for knobs in _knobs(recipe):
        _rows(knobs, rows).check(knobs)


def _knobs(recipe: Recipe) -> list[Knobs]:
    return [cast(Knobs, m) for _, entry, m in recipe.entries if entry.role == "polish"]


def _rows(knobs: Knobs, rows: Rows) -> PolishRows:
    further = rows.calibration[:0] if rows.further is None else rows.further
    # Blocks were fitted to the calibration rows: others teach more.
    train = torch.cat([further[knobs.apart :], rows.calibration])
    steps = knobs.steps(train.shape[1])
    return PolishRows(train[: steps * knobs.batch], further[: knobs.apart])


@dataclass(frozen=True)
class PolishedShards:
    """A `lowbit.stages.polish.PolishStore` in the directory of a run.

    Attributes:
        shards: of the finished blocks.
    """

    shards: Shards

    @property
    def polished(self) -> Record | None:
        return self.shards.place.polished()

    def scratch(self, rank: int) -> Path:
        return self.shards.place.partial / f"polish-{rank}"

    def held(self, i: int, block: Block, *, anew: bool) -> Block:
        place, path = self.shards.place, self.scratch(0) / "blocks" / f"{i:05d}.safetensors"
        if anew and place.ranks.first:
            source = place.shard(i + 1)
            with disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                try:  # shards are replaced, never written over
                    os.link(source, path)
                except OSError:
                    shutil.copyfile(source, path)
        if anew:
            place.ranks.broadcast(None)  # until it is there
        return self.shards.opened(path, block)

    def loaded(self, i: int, block: Block) -> Block:
        return self.shards.loaded(i, block)

    def replace(self, i: int, block: Block, floats: Block) -> None:
        shards = self.shards
        place, named, old = shards.place, shards.named, shards.records[i + 1]
        errors = {named(f"{block.name}.{n}"): e.tuned for n, e in linear_errors(floats).items()}
        linears = [{**entry, "error": errors[entry["name"]]} for entry in old["linears"]]
        tensors = block_tensors(block, named)
        place.agree(block.name, tensors)
        record = with_bytes({**old, "linears": linears}, tensors)
        check = partial(compare_block, block, named)
        shards.records[i + 1] = place.finish(i + 1, tensors, record, check)

    def finish(self, record: Record) -> None:
        place = self.shards.place
        place.note_polished(record)
        if place.ranks.first:  # of all ranks, also of those that an earlier run had
            for folder in place.partial.glob("polish-*"):
                shutil.rmtree(folder, ignore_errors=True)
