"""What a method takes: bytes held while it works on a block, and work done, counted from shapes.

The numbers follow the methods' code: which tensors live together when most of them do, which
products are made. P is the weights of a block's linears, L those of its largest linear. Each
paper's file has its own count; where its code changes, its count has to. benchmarks/growth.py
prints some beside measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import torch

from ..grid import AnyGrid
from ..model.context import TOKENS_PER_PASS
from ._gram import takes_16_bits


@dataclass(frozen=True)
class Layer:
    """Shapes of a model, as far as memory is concerned.

    Attributes:
        linears: linear of one block -> (out, in). rest: parameters of a block outside its linears.
        outside: parameters outside the blocks, tied ones once. hidden: width of the residual
            stream. vocab: of the head. streams: how many residual streams there are.
        shares: linear -> the share of tokens that reaches it, 1 where it is missing: experts'.
    """

    linears: Mapping[str, tuple[int, int]]
    rest: int
    outside: int
    hidden: int
    vocab: int
    streams: int = 1
    shares: Mapping[str, float] = field(default_factory=dict)

    def share(self, linear: str) -> float:
        """The share of tokens that reaches a linear."""
        return self.shares.get(linear, 1.0)

    @property
    def active(self) -> float:
        """Weights that a token meets."""
        return sum(self.share(n) * a * b for n, (a, b) in self.linears.items())

    @property
    def weights(self) -> int:
        """P: weights in the linears of a block."""
        return sum(a * b for a, b in self.linears.values())

    @property
    def passed(self) -> int:
        """Numbers a token that go from block to block."""
        return self.hidden * self.streams

    @property
    def largest(self) -> int:
        """L: weights of the largest linear."""
        return max((a * b for a, b in self.linears.values()), default=0)

    @property
    def widest(self) -> int:
        """Most inputs or outputs of a linear."""
        return max((max(shape) for shape in self.linears.values()), default=0)

    @property
    def activations(self) -> int:
        """Numbers a token that a forward pass makes, and gradients of the widest."""
        return sum(a + b for a, b in self.linears.values()) + 10 * self.passed + 2 * self.widest


@dataclass(frozen=True)
class Rows:
    """The calibration as it passes through a block.

    Attributes:
        count: rows, held-out ones included. length: tokens each. stored, compute: bytes of a number
            in streams and in arithmetic.
        ranks: processes that share the rows. here: how many of them are on a machine; 0 for all.
    """

    count: int
    length: int
    stored: int
    compute: int
    ranks: int = 1
    here: int = 0

    @property
    def near(self) -> Rows:
        """The same shared by the processes of a machine alone."""
        return replace(self, ranks=min(self.ranks, self.here or self.ranks))

    def mine(self, rows: int) -> int:
        """Upper bound on how many of so many rows one rank works on."""
        return -(-min(rows, self.count) // self.ranks)

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.ranks == 1

    def part(self, amount: float) -> float:
        """One rank's of what is divided evenly."""
        return amount / self.ranks

    def summed(self, size: float) -> Work:
        """Sent for a sum over ranks of so many bytes that all of them get: a ring sends each byte
        almost twice.
        """
        return self.gathered(2 * size)

    def gathered(self, size: float) -> Work:
        """Sent for so many bytes, of which each rank has its part and all get all; or for a sum of
        which each gets its part.
        """
        sent = size * (self.ranks - 1) / self.ranks
        return Work(near=sent) if self.near.ranks == self.ranks else Work(far=sent)

    def tokens(self, most: int) -> int:
        """Tokens in a batch of whole rows, at most so many (or one row)."""
        return min(self.mine(self.count), max(1, most // self.length)) * self.length


@dataclass(frozen=True)
class Work:
    """Of one process: FLOPs of products in 16 bits and in float32, bytes that pass memory, and
    bytes that are sent to other processes of its machine, and to others.
    """

    half: float = 0.0
    single: float = 0.0
    moved: float = 0.0
    near: float = 0.0
    far: float = 0.0

    @property
    def sent(self) -> float:
        """Bytes, wherever they go."""
        return self.near + self.far

    @property
    def alone(self) -> Work:
        """What of it is no communication."""
        return Work(self.half, self.single, self.moved)

    def __add__(self, other: Work) -> Work:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in astuple(self)))


@dataclass(frozen=True)
class Shapes:
    """What the cost of a method depends on.

    Attributes:
        layer: sizes. grid: of most linears. sites: linears that read the same input, in order.
            inner: those that read what an MLP, or an expert, computed between its linears.
        rows: calibration rows of the run. held_out: how many of them pass and teach nothing.
        device: which computes. compute: dtype of forward passes there.
        levels: sites that are reached at once, as all experts of a mixture are.
    """

    layer: Layer
    grid: AnyGrid
    sites: Sequence[Sequence[str]]
    inner: Sequence[str]
    rows: Rows
    held_out: int
    device: torch.device
    compute: torch.dtype
    levels: Sequence[Sequence[Sequence[str]]] = ()

    @property
    def tuned(self) -> int:
        """Rows that methods may learn from."""
        return self.rows.count - self.held_out

    def learned(self, most: int = 0) -> int:
        """Upper bound on the rows, at most so many (0 for all), that one rank learns from."""
        return self.rows.mine(min(most or self.tuned, self.tuned))

    @property
    def widths(self) -> list[int]:
        """Inputs of each site."""
        return [self.layer.linears[names[0]][1] for names in self.sites]

    # --- bytes ------------------------------------------------------------------------------------

    @property
    def cast(self) -> int:
        """The weights in the compute dtype, where that is not the float32 they are held in."""
        return 0 if self.rows.compute == 4 else self.rows.compute * self.layer.weights

    @property
    def passing(self) -> int:
        """Activations of a batch that passes without gradients: three as wide as the block gets,
        and the residual stream around them.
        """
        numbers = 3 * self.layer.widest + 4 * self.layer.passed
        return self.rows.tokens(TOKENS_PER_PASS) * self.rows.compute * numbers + self.cast

    def training(self, batch: int) -> int:
        """What a forward pass saves for gradients, and the gradients of the widest activations."""
        tokens = self.rows.mine(batch) * self.rows.length
        return tokens * self.rows.compute * self.layer.activations + self.cast

    # --- work -------------------------------------------------------------------------------------

    def products(self, flops: float, half: bool | None = None) -> Work:
        """Products of a forward pass, or, with ``half``, in the precision it says."""
        half = self.compute.itemsize == 2 if half is None else half
        return Work(half=flops) if half else Work(single=flops)

    def grams(self, flops: float) -> Work:
        """Gram matrices of what a forward pass computes, see `lowbit.methods._gram`."""
        return self.products(flops, self.compute.itemsize == 2 and takes_16_bits(self.device))

    def forward(self, rows: float, half: bool | None = None) -> Work:
        """So many rows through a block: attention's own products included, activations written once
        and read once.
        """
        layer, tokens = self.layer, rows * self.rows.length
        flops = tokens * (2.0 * layer.active + 4.0 * self.rows.length * layer.hidden)
        made = layer.activations * layer.active / max(1, layer.weights)
        moved = 2.0 * tokens * self.rows.compute * made
        return self.products(flops, half) + Work(moved=moved)


@dataclass(frozen=True)
class Cost:
    """What a method takes on one block.

    Attributes:
        held: most bytes besides the block's float32 weights and what earlier methods ``keep``.
        least: bytes of them that live together whatever the activations are.
        keeps: bytes that stay until the block is finished.
        streams: activation streams that it holds besides those of every run.
        libraries: bytes of libraries that it loads, on a CPU.
        batch: rows of one of its steps; 0 if it makes none.
        work: on one block. last: what it does more on the last one.
        lighter: recipes that take less.
        parts: what the work consists of, by name; their sum is the work then.
    """

    held: int = 0
    least: int = 0
    keeps: int = 0
    streams: int = 0
    libraries: int = 0
    batch: int = 0
    work: Work = Work()
    last: Work = Work()
    lighter: str = "gptq or awq or rtn"
    parts: Mapping[str, Work] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parts:
            object.__setattr__(self, "work", sum(self.parts.values(), Work()))


def passes(method: object, shapes: Shapes) -> Cost:
    """A method that lets rows pass and changes weights: the default count."""
    layer = shapes.layer
    return Cost(held=4 * layer.weights + max(shapes.passing, 24 * layer.largest))
