"""The shards of a run: what is outside the blocks, and each finished block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact.files import Named, block_tensors, compare_block, read_shard, unpack_linear
from ..grid import Coded
from ..model.block import Block
from ..model.model import Model
from ..model.outline import Outline
from .beside import beside
from .events import BlockDone, OnBlock
from .identity import Original
from .record import block_record, with_bytes
from .workplace import Workplace

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shards:
    """Where a run keeps what it has finished; a `lowbit.stages.BlockStore`.

    Attributes:
        place: the directory. original: the files of the model, which must not change meanwhile.
        records: of the shards so far, the one outside the blocks first.
        named: full name of a parameter, or of a linear -> its name in files; None of one that is
            stored as part of a larger tensor.
        progress: told after each block.
    """

    place: Workplace
    original: Original
    records: list[Record]
    named: Named
    progress: OnBlock | None = None

    def finished(self, i: int) -> Record | None:
        record = self.place.finished(i + 1)
        if record is not None:
            self._noted(i, record, resumed=True)
        return record

    def keep(self, i: int, block: Block, seconds: float) -> Callable[[], Record]:
        record = block_record(block, seconds, self.named)
        # Before it is noted, or a resume would take a block of another model for this one's.
        self.original.check_unchanged()
        packed = None
        # What ranks do together, and what a device does, stays in one thread and in its order.
        if self.place.ranks.size > 1 or block.device.type != "cpu":
            packed = block_tensors(block, self.named)
            self.place.agree(record["name"], packed)
        done = beside(partial(self._stored, i, block, record, packed), f"store {block.name}")

        def finished() -> Record:
            full = done()
            self._noted(i, full, resumed=False)
            return full

        return finished

    def _stored(
        self, i: int, block: Block, record: dict[str, Any], packed: dict[str, Tensor] | None
    ) -> Record:
        """Pack a block unless it is, write it, and compare what is read back."""
        tensors = block_tensors(block, self.named) if packed is None else packed
        check = partial(compare_block, block, self.named)
        return self.place.finish(i + 1, tensors, with_bytes(record, tensors), check)

    def loaded(self, i: int, block: Block) -> Block:
        return self.opened(self.place.shard(i + 1), block)

    def opened(self, path: Path, block: Block) -> Block:
        """A block as one of its files holds it."""
        held = read_shard(path)
        codes: dict[str, Coded] = {}
        weights, device = dict(block.weights), block.device
        for linear in block.graph.linears:
            full = self.named(f"{block.name}.{linear}")
            assert full is not None
            codes[linear] = unpack_linear(held, full, block.grids[linear], device)
        for name in weights:
            full = self.named(f"{block.name}.{name}")
            if name.removesuffix(".weight") not in codes and full is not None:
                weights[name] = held[full].to(weights[name].device, weights[name].dtype)
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
            source = model.source
            outer = {source.tensor_name(n): t for n, t in source.outer_tensors().items()}
            shards.original.check_unchanged()
            tensors, said = {**outer, **source.copied_tensors()}, {"name": "outside the blocks"}
            shards.place.agree(said["name"], tensors)
            record = shards.place.finish(
                0,
                tensors,
                said,
                # What is copied is read while it is written.
                lambda _: shards.original.check_unchanged(),
            )
        shards.records.append(record)
        return model
