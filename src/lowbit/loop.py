"""A recipe run over a model: `run` is the only loop over blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import LowbitError
from .grid import CrossQuant as ColumnGrid
from .grid import KVGrid, LLMInt8, Reading
from .methods import CLAQ, RTN, CrossQuant, OmniQuant, QuaRot, TesseraQ
from .methods._bit_budget import least_gain, survey
from .methods._reconstruct import Reconstruction
from .model.block import Block
from .model.context import Announce, Context, silent
from .model.ranks import ALONE, Ranks
from .model.storage import Storage
from .model.stream import ModelStream
from .model.wiring import Wiring
from .recipe import Recipe

SEEDS = 2**63  # torch takes one bit more, so that a method can count on from a block's seed


@dataclass(frozen=True)
class Streams:
    """Activations at a block boundary: as the float model has them and as the quantized prefix has
    them.

    At most three of their size are held at a time, whatever the depth: ``x`` and ``xq`` of a block
    and its target. When the block is finished the target becomes the next ``x``, the next ``xq`` is
    written over this ``x``, and this ``xq`` is the room for the next target.

    Attributes:
        x, xq: (rows, length, hidden) in the model's dtype, this rank's rows; the same tensor before
            the first block.
        tuned_rows: leading rows, of all ranks, that methods may learn from; the others are held
            out.
        proof: (rows, length, hidden) in float32 at least, whatever tuning computes in: the
            quantized model's activations for the artifact's proof, never rounded between blocks.
            None where no proof is made: not on this rank.
        storage: where new ones are put; None puts them beside those that enter.
        room: a tensor like ``xq`` that the next target is written over, or None.
        ranks: the processes that share the rows.
    """

    x: Tensor
    xq: Tensor
    tuned_rows: int
    proof: Tensor | None = None
    storage: Storage | None = None
    room: Tensor | None = None
    ranks: Ranks = ALONE


def prepared(stream: ModelStream, recipe: Recipe, seed: int) -> ModelStream:
    """The model as the recipe's methods want to see it: in a rotated basis if one of them rotates
    the residual stream.

    Raises:
        LowbitError: a size that cannot be rotated, or a file that is not there.
    """
    for method in recipe.methods:
        if isinstance(method, QuaRot):
            inner = (
                stream.block_module(0)
                .get_parameter(f"{stream.wiring.sites[-1].reads[0]}.weight")
                .shape[1]
            )
            method.check(stream.wiring, inner, recipe.kv is not None)
            stream = stream.rotated(seed) if method.residual else stream
        if isinstance(method, OmniQuant) and method.clips and not Path(method.clips).is_file():
            raise LowbitError(f"omniquant.clips: no such file: '{method.clips}'.")
    return stream


def check_shared(ranks: Ranks, recipe: Recipe, wiring: Wiring, samples: int) -> None:
    """Refuse what several processes cannot share.

    Raises:
        LowbitError: fewer rows than processes, or an activation grid by which a row's numbers
            depend on the rows it comes with.
    """
    if ranks.size == 1:
        return
    if samples < ranks.size:
        raise LowbitError(
            f"{ranks.size} processes cannot share {samples} calibration rows: use fewer, or more "
            "--samples."
        )
    grid = recipe.activations
    if (isinstance(grid, ColumnGrid) and (grid.columns == "call" or wiring.flat)) or isinstance(
        grid, LLMInt8
    ):
        kept = (
            " --set activations.columns=sequence keeps rows apart."
            if isinstance(grid, ColumnGrid) and not wiring.flat
            else ""
        )
        raise LowbitError(
            f"{grid} quantizes a row by what the rows of its batch hold, which depends on how they "
            f"are shared: use one process.{kept}"
        )


def idle_ranks(recipe: Recipe, ranks: Ranks) -> list[str]:
    """Remarks on methods whose steps look at fewer rows than there are ranks."""
    learners = [
        m for m in recipe.methods if isinstance(m, (TesseraQ, OmniQuant)) and m.batch < ranks.size
    ]
    return [
        f"{type(m).__name__.lower()} has {m.batch} rows a step: {ranks.size - m.batch} of "
        f"{ranks.size} ranks wait in it"
        for m in learners
    ]


def ordered(
    stream: ModelStream,
    recipe: Recipe,
    ids: Tensor,
    seed: int,
    announce: Announce = silent,
    storage: Storage | None = None,
    ranks: Ranks = ALONE,
) -> ModelStream:
    """The model with the channels of its residual stream by falling size, if the recipe folds
    CrossQuant's factors by groups.

    One pass of the float model over the calibration rows ``ids``, also when a run is resumed.

    Raises:
        LowbitError: the family's channels cannot change places.
    """
    method = next(
        (m for m in recipe.methods if isinstance(m, CrossQuant) and m.fold == "group"), None
    )
    if method is None:
        return stream
    stream.ordered(torch.arange(stream.config.hidden_size))  # refuses before the pass
    x = stream.embed(ids[ranks.rank :: ranks.size], storage=storage)
    streams, kwargs = (
        Streams(x, x, len(ids), storage=storage, ranks=ranks),
        stream.block_kwargs(ids.shape[1]),
    )
    del x
    total = torch.zeros(stream.config.hidden_size, dtype=torch.float64, device=stream.device)
    for i in range(len(stream)):
        announce(f"crossquant: sizes of the residual channels in block {i + 1} of {len(stream)}")
        block = begin(
            stream, i, replace(recipe, activations=None, kv=None), streams, kwargs[i], seed
        )
        total += method.residual_sizes(block)
        streams = replace(streams, x=block.target, xq=block.target)
        del block
    stream.release()
    return stream.ordered(total.argsort(descending=True, stable=True))


def surveyed(
    stream: ModelStream,
    recipe: Recipe,
    streams: Streams,
    kwargs: Sequence[Mapping[str, Any]],
    seed: int,
    announce: Announce = silent,
) -> Recipe:
    """The recipe with what a method wants to know of the whole model before its first block: CLAQ's
    price of a bit.

    One pass of the float model, block by block, also when a run is resumed; nothing is read where
    no method asks.
    """
    method = next((m for m in recipe.methods if isinstance(m, CLAQ) and m.needs_survey), None)
    if method is None:
        return recipe
    found: list[tuple[Tensor, int]] = []
    for i in range(len(stream)):
        announce(f"claq: what a bit would gain in block {i + 1} of {len(stream)}")
        block = begin(
            stream, i, replace(recipe, activations=None, kv=None), streams, kwargs[i], seed
        )
        found += survey(block, method.walk, method.upper)
        streams = replace(streams, x=block.target, xq=block.target)
        del block
    gain = least_gain(found, recipe.grid.bits + method.adaptive_bits - min(2, recipe.grid.bits))
    return replace(
        recipe,
        methods=tuple(replace(m, least_gain=gain) if m is method else m for m in recipe.methods),
    )


def begin(
    stream: ModelStream,
    i: int,
    recipe: Recipe,
    streams: Streams,
    kwargs: Mapping[str, Any],
    seed: int,
    announce: Announce = silent,
) -> Block:
    """Block i with its weights read, its inputs attached, its float target computed and its
    activations on their grids.
    """
    name = stream.block_name(i)
    context = Context(
        name=name,
        module=stream.block_module(i),
        wiring=stream.wiring,
        kwargs=kwargs,
        compute=stream.compute,
        stored=stream.dtype,
        dtypes=stream.block_dtypes(i),
        grids={n: recipe.grid_of(f"{name}.{n}") for n in stream.wiring.linears},
        x=streams.x,
        xq=streams.xq,
        target=streams.x,
        tuned_rows=streams.tuned_rows,
        seed=(seed * 1_000_003 + i) % SEEDS,
        readout=stream.readout() if i == len(stream) - 1 else None,
        announce=announce,
        storage=streams.storage,
        ranks=streams.ranks,
    )
    block = Block(context, stream.block_weights(i))
    target = block.run(streams.x, out=streams.room)
    # As norms and losses take it.
    if not all(bool(torch.isfinite(row.float().square().sum(-1)).all()) for row in target):
        raise LowbitError(
            f"'{name}' of the float model gives activations whose squares are not finite: its "
            "weights or norms are too large."
        )
    return _gridded(block.within(target=target), recipe)


def _gridded(block: Block, recipe: Recipe) -> Block:
    if recipe.activations is not None:
        block = block.with_readings(
            dict.fromkeys(block.wiring.linears, Reading(grid=recipe.activations))
        )
    return block if recipe.kv is None else replace(block, kv=KVGrid(recipe.kv))


def as_read(block: Block, recipe: Recipe) -> Block:
    """A block just begun with the online rotations that the recipe's methods give it, without doing
    their work on the weights.
    """
    for method in recipe.methods:
        if isinstance(method, QuaRot):
            turned = method(block)
            block = replace(block, readings=turned.readings, kv=turned.kv)
    return block


def readings_of(stream: ModelStream, recipe: Recipe) -> tuple[Mapping[str, Reading], KVGrid | None]:
    """How the finished model reads activations, keys and values, the same in every block."""
    empty = torch.empty(0, 1, 1)
    context = Context(
        name=stream.block_name(0),
        module=stream.block_module(0),
        wiring=stream.wiring,
        kwargs={},
        compute=stream.compute,
        stored=stream.dtype,
        grids={},
        x=empty,
        xq=empty,
        target=empty,
        tuned_rows=0,
        seed=0,
    )
    block = Block(context, stream.block_weights(0))
    block = as_read(_gridded(block, recipe), recipe)
    return block.readings, block.kv


def apply_methods(block: Block, recipe: Recipe) -> Block:
    """All methods of the recipe in order, then nearest rounding for whatever is left.

    Notes ``loss_before`` and ``loss_after``: the squared error of the block's output on the
    quantized prefix, summed over hidden units and averaged over tokens, of plain nearest rounding
    and of the result.
    """
    before = Reconstruction(block, batch=1).loss(RTN()(block).decoded())
    for method in (*recipe.methods, RTN()):
        block = method(block)
    # As it reads now.
    return block.with_notes(
        loss_before=before, loss_after=Reconstruction(block, batch=1).loss(block.decoded())
    )


@torch.no_grad()
def advance(block: Block, streams: Streams, proof_kwargs: Mapping[str, Any]) -> Streams:
    """The streams after a finished block. Its ``x`` is written over, unless it is also its ``xq``:
    then it is the caller's.
    """
    decoded = block.decoded()
    entry = block.x is block.xq
    proof = streams.proof
    if proof is not None:
        wide = torch.promote_types(block.compute, torch.float32)
        # Row by row, as loaders are asked: a grid may look at all rows.
        alone = block.within(kwargs=proof_kwargs, compute=wide)
        proof = torch.cat([alone.forward(row[None].to(block.device), decoded) for row in proof])
    xq = block.run(block.xq, decoded, out=None if entry else block.x)
    return replace(streams, x=block.target, xq=xq, proof=proof, room=None if entry else block.xq)


def run(
    stream: ModelStream,
    recipe: Recipe,
    streams: Streams,
    seed: int,
    kwargs: Sequence[Mapping[str, Any]],
    proof_kwargs: Sequence[Mapping[str, Any]],
    start: int = 0,
    announce: Announce = silent,
) -> Iterator[tuple[Block, Streams]]:
    """Quantize the blocks from number ``start`` on, one in memory at a time.

    Args:
        streams: the activations that enter block ``start``.
        kwargs, proof_kwargs: what each block is called with, for the streams' and for the proof's
            rows (in float32).
        announce: told what a method is about to do.

    Yields:
        each finished block with the streams that leave it; the point to write, to report and to
            resume from.
    """
    for i in range(start, len(stream)):
        block = apply_methods(begin(stream, i, recipe, streams, kwargs[i], seed, announce), recipe)
        streams = advance(block, streams, proof_kwargs[i])
        yield block, streams
        del block  # else it would be held while the next one is tuned
