"""The blocks: the only loop that changes them. Each is quantized and stored, or taken from where an
earlier run stored it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..machine import forget_peaks, give_back_memory
from ..methods import METHODS, RTN
from ..methods._reconstruct import Reconstruction
from ..model.beside import NOTHING, Kept, given, picked
from ..model.block import Block
from ..model.model import BlockMethod, Model, Streams
from ..model.outline import Outline

Record = Mapping[str, Any]


class BlockStore(Protocol):
    """Where finished blocks are kept."""

    def finished(self, i: int) -> Record | None:
        """The record of block i, if an earlier run has finished it."""
        ...

    def keep(self, i: int, block: Block, seconds: float) -> Callable[[], Record]:
        """Begin to store a finished block. What it returns waits until that is done, and gives back
        the record.
        """
        ...

    def loaded(self, i: int, block: Block) -> Block:
        """Block i as it was stored, from the same block just begun."""
        ...


def completed(methods: tuple[BlockMethod, ...]) -> tuple[BlockMethod, ...]:
    """Methods in the order of their roles, with nearest rounding for whatever they leave uncoded:
    before refiners, which find everything coded.
    """
    refiners = {entry.kind for entry in METHODS.values() if entry.role == "refiner"}
    before = tuple(m for m in methods if type(m) not in refiners)
    return (*before, RTN(), *methods[len(before) :])


def apply_methods(block: Block, methods: tuple[BlockMethod, ...]) -> Block:
    """All methods in order, and nearest rounding for whatever is left, see `completed`. A block
    without linears to quantize stays as it is.

    Notes ``loss_before`` and ``loss_after``: the squared error of the block's output on the
    quantized prefix, summed over hidden units and averaged over tokens, of plain nearest rounding
    and of the result.
    """
    before = Reconstruction(block, batch=1).loss(RTN()(block).decoded())
    for method in completed(methods) if block.graph.linears else ():
        block = method(block)
    # As it reads now.
    after = Reconstruction(block, batch=1).loss(block.decoded())
    return block.with_notes(loss_before=before, loss_after=after)


@torch.no_grad()
def advance(block: Block, streams: Streams, proof_kwargs: Mapping[str, Any]) -> Streams:
    """The streams after a finished block. Its ``x`` is written over, unless it is also its ``xq``:
    then it is the caller's.
    """
    decoded = block.decoded()
    entry = block.x is block.xq
    context, proof, proof_left = block.context, streams.proof, NOTHING
    if proof is not None:
        wide = torch.promote_types(block.compute, torch.float32)
        # Row by row, as loaders are asked: a grid may look at all rows.
        alone = block.within(kwargs=proof_kwargs, compute=wide)
        held = given(context.place, streams.beside.proof)
        rows, kept = [], Kept(len(proof), None, proof)
        for i in range(len(proof)):
            part = slice(i, i + 1)
            row, left = alone.passed(proof[part].to(block.device), decoded, picked(held, part))
            rows.append(row)
            kept.put(part, left)
        proof, proof_left = torch.cat(rows), kept.values
    xq_left = Kept(len(block.xq), streams.storage, block.xq)
    xq = block.run(
        block.xq,
        decoded,
        out=None if entry else block.x,
        given=context.given_q,
        keep=xq_left,
    )
    beside = streams.beside.after(context.place, context.left, xq_left.values, proof_left)
    scratch = None if entry else block.xq
    return replace(streams, x=block.target, xq=xq, proof=proof, scratch=scratch, beside=beside)


@dataclass(frozen=True)
class Entered:
    """What enters the first block: row numbers of a stage that keeps held-out and proof rows.

    Attributes:
        rows: (n, length) int64, this rank's calibration rows, then its held-out ones.
        proof: (n, length) int64, see `Streams`; None where no proof is made.
    """

    rows: Tensor
    proof: Tensor | None = None


@dataclass(frozen=True)
class Blocks:
    """The stage that quantizes the blocks by the model's methods, one in memory at a time.

    Attributes:
        entered: what enters the first block.
        store: where finished blocks are kept, and those of an earlier run found.
        remarks: noted with the first block that is quantized.
    """

    entered: Entered
    store: BlockStore
    remarks: tuple[str, ...] = ()

    def planned(self, outline: Outline) -> Outline:
        return outline

    def __call__(self, model: Model) -> Model:
        streams = model.entered(self.entered.rows, self.entered.proof)
        for _, after in self.walk(model, streams):
            streams = after
        return replace(model, streams=streams)

    def walk(self, model: Model, streams: Streams) -> Iterator[tuple[Record, Streams]]:
        """Every block in order.

        Args:
            streams: what enters the first one.

        Yields:
            its record, and what leaves it.
        """
        source = model.source
        kwargs = source.block_kwargs(streams.x.shape[1])
        length = streams.proof.shape[1] if streams.proof is not None else 2
        proof_kwargs = source.in_float32().block_kwargs(length)
        source.release()
        resuming = True
        for i in range(len(source)):
            # What follows a block that is made again is made again.
            clock, record = time.time(), self.store.finished(i) if resuming else None
            block = model.begin(i, streams, kwargs[i])
            if record is None:
                block = apply_methods(block, model.methods)
                block = block.remarked(*(self.remarks if i == 0 else ()))
                resuming = False
                stored = self.store.keep(i, block, time.time() - clock)
                try:  # it is packed, written and compared meanwhile
                    streams = advance(block, streams, proof_kwargs[i])
                finally:  # whatever happens, nothing is written any more
                    record = stored()
                del stored
                forget_peaks(block.device)
            else:
                block = self.store.loaded(i, _as_finished(block, model, i))
                streams = advance(block, streams, proof_kwargs[i])
            del block  # else it would be held while the next one is begun
            yield record, streams
            give_back_memory()


def _as_finished(block: Block, model: Model, i: int) -> Block:
    """Block i, just begun, reading its inputs as the finished model does."""
    return replace(block.with_input_quantizers(model.input_quantizers(i)), kv=model.kv_grid(i))
