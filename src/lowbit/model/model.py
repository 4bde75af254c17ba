"""Model: the value that stages pass on. A stage takes one and returns another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import ActivationGrid, AnyGrid, InputQuantizer, KVGrid, PerToken, Rotation
from .beside import Beside, Kept, given
from .block import Block
from .context import Announce, Context, silent
from .outline import Outline
from .ranks import ALONE, Ranks
from .routed import Routed
from .storage import Storage
from .stream import ModelStream

SEEDS = 2**63  # torch takes one bit more, so that a method can count on from a block's seed


class BlockMethod(Protocol):
    """One paper: `Block -> Block`."""

    def __call__(self, block: Block) -> Block: ...


@dataclass(frozen=True)
class Streams:
    """Activations at a block boundary: as the float model has them and as the quantized prefix has
    them.

    At most three of their size are held at a time, whatever the depth: ``x`` and ``xq`` of a block
    and its target. When the block is finished the target becomes the next ``x``, the next ``xq`` is
    written over this ``x``, and this ``xq`` is the scratch for the next target.

    Attributes:
        x, xq: (rows, length, hidden) in the model's dtype, this rank's rows; the same tensor before
            the first block.
        tuned_rows: leading rows, of all ranks, that methods may learn from; the others are held
            out.
        proof: (rows, length, hidden) in float32 at least, whatever tuning computes in: the
            quantized model's activations for the artifact's proof, never rounded between blocks.
            None where no proof is made: not on this rank.
        beside: what blocks are given and leave besides, as long as a later block reads it.
        storage: where new ones are put; None puts them beside those that enter.
        scratch: a tensor like ``xq`` that the next target is written over, or None.
        ranks: the processes that share the rows.
    """

    x: Tensor
    xq: Tensor
    tuned_rows: int
    proof: Tensor | None = None
    storage: Storage | None = None
    scratch: Tensor | None = None
    ranks: Ranks = ALONE
    beside: Beside = field(default_factory=Beside)


@dataclass(frozen=True)
class Model:
    """A model on its way to an artifact.

    Attributes:
        source: the checkpoint's tensors, as stages have rotated or reordered them.
        grid_of: full linear name -> grid.
        methods: what the blocks will be quantized by.
        activations: grid of every quantized linear's input, None for floating point. kv: of keys
            and values.
        online: full linear name -> rotation of its input while the finished model runs.
        key_rotation: of queries and keys.
        rows: (n, length) int64, the calibration rows of all ranks.
        seed: for everything random.
        streams: what leaves the last block; None before the blocks.
        announce: told what is about to be done.
    """

    source: ModelStream
    grid_of: Callable[[str], AnyGrid]
    methods: tuple[BlockMethod, ...]
    rows: Tensor
    activations: ActivationGrid | None = None
    kv: PerToken | None = None
    online: Mapping[str, Rotation] = field(default_factory=dict)
    key_rotation: Rotation | None = None
    seed: int = 0
    storage: Storage | None = None
    ranks: Ranks = ALONE
    streams: Streams | None = None
    announce: Announce = silent

    def input_quantizers(self, i: int) -> dict[str, InputQuantizer]:
        """How the finished model reads the inputs of block i's linears; nothing where it is
        missing.
        """
        prefix = self.source.block_name(i)
        return {
            n: InputQuantizer(self.online.get(f"{prefix}.{n}"), self.activations)
            for n in self.source.graph(i).linears
            if self.activations is not None or f"{prefix}.{n}" in self.online
        }

    def kv_grid(self, i: int) -> KVGrid | None:
        """How the finished model stores the keys and values of block i, None for floating point or
        where it has none.
        """
        if self.kv is None or self.source.graph(i).attention is None:
            return None
        return KVGrid(self.kv, self.key_rotation)

    def entered(self, rows: Tensor, proof: Tensor | None = None) -> Streams:
        """What enters the first block.

        Args:
            rows: (n, length) int64, this rank's rows. proof: (n, length) int64, see `Streams`.
        """
        x, own = self.source.entering(rows, storage=self.storage)
        exact = self.source.in_float32()
        wide, proved = (None, {}) if proof is None else exact.entering(proof, exact.compute)
        self.source.release()
        beside = Beside(own, own, proved)
        return Streams(x, x, len(self.rows), wide, self.storage, ranks=self.ranks, beside=beside)

    def read(self, i: int, streams: Streams, kwargs: Mapping[str, Any]) -> Block:
        """Block i with its weights read and its inputs attached; its target is its input."""
        source, name, graph = self.source, self.source.block_name(i), self.source.graph(i)
        place = source.described.place(i)
        context = Context(
            name=name,
            module=source.block_module(i),
            graph=graph,
            kwargs=kwargs,
            compute=source.compute,
            stored=source.dtype,
            dtypes=source.block_dtypes(i),
            wide=source.wide_in(i),
            grids={n: self.grid_of(f"{name}.{n}") for n in graph.linears},
            x=streams.x,
            xq=streams.xq,
            target=streams.x,
            tuned_rows=streams.tuned_rows,
            place=place,
            given=given(place, streams.beside.x),
            given_q=given(place, streams.beside.xq),
            seed=(self.seed * 1_000_003 + i) % SEEDS,
            readout=source.readout() if i == len(source) - 1 else None,
            announce=self.announce,
            storage=streams.storage,
            ranks=streams.ranks,
        )
        return Block(context, source.block_weights(i))

    def begin(self, i: int, streams: Streams, kwargs: Mapping[str, Any]) -> Block:
        """Block i with its weights read, its inputs attached, its float target computed and its
        activations on their grids.

        Raises:
            LowbitError: the float model's activations are not finite.
        """
        block = self.read(i, streams, kwargs)
        name, graph, context = block.name, block.graph, block.context
        left = Kept(len(streams.x), streams.storage, streams.x)
        rows, length = streams.x.shape[:2]
        routed = Routed(block.module, graph.mixtures, rows, length, block.device)
        finite = torch.ones((), dtype=torch.bool, device=block.device)

        def look(y: Tensor) -> None:
            for row in y:  # as norms and losses take it
                finite.logical_and_(torch.isfinite(row.float().square().sum(-1)).all())

        target = block.run(
            streams.x,
            out=streams.scratch,
            given=context.given,
            keep=left,
            routed=routed,
            look=look,
        )
        if not bool(finite):
            raise LowbitError(
                f"'{name}' of the float model gives activations whose squares are not finite: its "
                "weights or norms are too large."
            )
        block = block.within(target=target, left=left.values)
        # As methods see them: what only passes through teaches nothing.
        counts = routed.tokens(streams.ranks.count(streams.tuned_rows))
        if counts:
            streams.ranks.sum_(*counts.values())
            block = block.with_notes(tokens_per_expert={n: c.tolist() for n, c in counts.items()})
        if self.activations is not None:
            input_quantizer = InputQuantizer(grid=self.activations)
            block = block.with_input_quantizers(dict.fromkeys(graph.linears, input_quantizer))
        if self.kv is None or graph.attention is None:
            return block
        return replace(block, kv=KVGrid(self.kv))


def float_blocks(model: Model, what: str) -> Iterator[Block]:
    """Every block as it is in the float model, in order: a pass for a stage that looks and changes
    no weight.

    Args:
        what: is looked for, for whoever watches.
    """
    rows = model.rows[model.ranks.rank :: model.ranks.size]
    plain = replace(model, activations=None, kv=None)
    streams = plain.entered(rows)
    kwargs = model.source.block_kwargs(model.rows.shape[1])
    for i in range(len(model.source)):
        model.announce(f"{what} in block {i + 1} of {len(model.source)}")
        block = plain.begin(i, streams, kwargs[i])
        left = block.context.left
        beside = streams.beside.after(block.context.place, left, left)
        streams = replace(streams, x=block.target, xq=block.target, beside=beside)
        yield block
        del block  # else it would be held while the next one is read
    model.source.release()


class Stage(Protocol):
    """Work on the whole model, before the blocks, in them, or after them."""

    def planned(self, outline: Outline) -> Outline:
        """What the stage will make of a model of this outline.

        Raises:
            LowbitError: it cannot be done, before any work.
        """
        ...

    def __call__(self, model: Model) -> Model: ...
