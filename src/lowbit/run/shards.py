"""The shards of a run: what is outside the blocks, and each finished block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..artifact.files import block_tensors, compare_block, read_shard, unpack_linear
from ..grid import Coded
from ..model.block import Block
from ..model.model import Model
from ..model.outline import Outline
from .events import BlockDone, OnBlock
from .identity import Original
from .record import block_record
from .workplace import Workplace

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shards:
    """Where a run keeps what it has finished; a `lowbit.stages.BlockStore`.

    Attributes:
        place: the directory. original: the files of the model, which must not change meanwhile.
        records: of the shards so far, the one outside the blocks first.
        progress: told after each block.
    """

    place: Workplace
    original: Original
    records: list[Record]
    progress: OnBlock | None = None

    def finished(self, i: int) -> Record | None:
        record = self.place.finished(i + 1)
        if record is not None:
            self._noted(i, record, resumed=True)
        return record

    def keep(self, i: int, block: Block, seconds: float) -> Record:
        tensors = block_tensors(block)
        # Before it is noted, or a resume would take a block of another model for this one's.
        self.original.check_unchanged()
        record = block_record(block, tensors, seconds)
        record = self.place.finish(i + 1, tensors, record, partial(compare_block, block))
        self._noted(i, record, resumed=False)
        return record

    def loaded(self, i: int, block: Block) -> Block:
        held = read_shard(self.place.shard(i + 1))
        codes: dict[str, Coded] = {}
        weights = dict(block.weights)
        for linear in block.graph.linears:
            full = f"{block.name}.{linear}"
            codes[linear] = unpack_linear(held, full, block.grids[linear], block.device)
        for name in weights:
            if name.removesuffix(".weight") not in codes:
                weights[name] = held[f"{block.name}.{name}"].to(block.device, weights[name].dtype)
        return replace(block, weights=weights, coded=codes)

    def _noted(self, i: int, record: Record, *, resumed: bool) -> None:
        self.records.append(record)
        if self.progress is not None:
            self.progress(BlockDone(i, self.place.shards - 1, record, resumed))


@dataclass(frozen=True)
class Outside:
    """The stage that stores the tensors outside the blocks, and those the model's class does not
    know.
    """

    shards: Shards

    def planned(self, outline: Outline) -> Outline:
        return outline

    def __call__(self, model: Model) -> Model:
        shards = self.shards
        record = shards.place.finished(0)
        if record is None:
            tensors = {**model.source.outer_tensors(), **model.source.copied_tensors()}
            shards.original.check_unchanged()
            record = shards.place.finish(0, tensors, {"name": "outside the blocks"})
        shards.records.append(record)
        return model
