"""The grids of GGUF's K-quants: scales and minima of sub-blocks are small multiples of one float16
unit per 256 inputs.

    q2_k, q4_k    w = unit * scale * code - unit_min * min
    q3_k, q6_k    w = unit * scale * (code - 2**(bits - 1)), scale of either sign

All products are exact in float32, so whoever decodes gets the same numbers. Source: ggml's
block_q2_K, block_q3_K, block_q4_K, block_q6_K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .base import GroupedGrid, Levels, Linear, LinearGrid, Neighbours
from .kmeans import NotFiniteError
from .kquant_fit import Moments, multiples, ranges, signed_ranges
from .params import Params, stacked
from .straight import through

SUPER = 256
Kind = Literal["q2_k", "q3_k", "q4_k", "q6_k"]
_PREFIX = "gguf:"
_KINDS: dict[
    str, tuple[int, int, int, bool]
] = {  # bits, inputs of a sub-block, greatest scale, symmetric
    "q2_k": (2, 16, 15, False),
    "q3_k": (3, 16, 31, True),
    "q4_k": (4, 32, 63, False),
    "q6_k": (6, 16, 127, True),
}
_AT_ONCE = 1 << 18  # weights fitted together: their temporaries stay in cache


@dataclass(frozen=True)
class KQuantParams(Params):
    """What a `KQuant` grid needs besides its codes; every tensor is float32.

    Attributes:
        unit, unit_min: (out, in / 256), numbers that float16 holds; unit_min is zero for symmetric
            kinds.
        scale, min: (out, in / sub-block), small integers.
    """

    unit: Tensor
    scale: Tensor
    unit_min: Tensor
    min: Tensor

    def double(self) -> KQuantParams:
        """The same in float64."""
        return self.map(Tensor.double)


@dataclass(frozen=True)
class KQuant(LinearGrid[KQuantParams], GroupedGrid[KQuantParams]):
    """One of the K-quants.

    Attributes:
        kind: q2_k, q3_k, q4_k or q6_k.
    """

    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"a K-quant is one of {', '.join(_KINDS)}, not {self.kind!r}")

    @property
    def name(self) -> str:
        return f"{_PREFIX}{self.kind}"

    @classmethod
    def parse(cls, text: str) -> KQuant | None:
        kind = text.lower()
        return cls(kind.removeprefix(_PREFIX)) if kind.startswith(_PREFIX) else None  # type: ignore[arg-type]

    @property
    def bits(self) -> int:
        return _KINDS[self.kind][0]

    @property
    def group_size(self) -> int:
        """Inputs of a sub-block."""
        return _KINDS[self.kind][1]

    @property
    def most(self) -> int:
        """The greatest scale, and minimum, of a sub-block."""
        return _KINDS[self.kind][2]

    @property
    def symmetric(self) -> bool:
        """Whether there are no minima."""
        return _KINDS[self.kind][3]

    @property
    def top(self) -> int:
        """The highest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of zero where the kind is symmetric."""
        return 1 << (self.bits - 1) if self.symmetric else 0

    def group(self, in_features: int) -> int:
        """The number of inputs that share a scale in a layer this wide.

        Raises:
            ValueError: rows are not a multiple of 256.
        """
        if in_features % SUPER:
            raise ValueError(
                f"a {self.kind} holds {SUPER} inputs, which does not divide {in_features}"
            )
        return self.group_size

    def with_bits(self, bits: int) -> KQuant:
        kinds: dict[int, Kind] = {KQuant(k).bits: k for k in get_args(Kind)}
        if bits not in kinds:
            raise ValueError(f"K-quants have {', '.join(map(str, kinds))} bits, not {bits}")
        return KQuant(kinds[bits])

    def check(self, width: int) -> None:
        if width % SUPER:
            raise ValueError(
                f"{self} comes in blocks of {SUPER} inputs, which do not divide the {width} inputs"
            )

    @property
    def rows_apart(self) -> bool:
        return True

    @property
    def of_lists(self) -> KQuant:
        return self

    def lists(self, w: Tensor) -> Tensor:
        return w.reshape(-1, SUPER)

    def unlisted(self, lists: Tensor, rows: int) -> Tensor:
        return lists.reshape(rows, -1)

    def steps(self, params: KQuantParams) -> tuple[Tensor, Tensor]:
        """(scale, offset) of each sub-block, (out, sub-blocks): w = scale * (code - middle) -
        offset.
        """
        return _times(params.unit, params.scale), _times(params.unit_min, params.min)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> KQuantParams:
        """Units, scales and minima with a small squared error: ranges by search and least squares,
        then their multiples.

        Args:
            w: (out, in) float. importance: (in,) positive weight of each input's squared error;
                None for the same everywhere.
        """
        self.check(w.shape[1])
        weight = None if importance is None else importance.float()
        step = max(1, _AT_ONCE // w.shape[1])
        return stacked([self._fit(rows.float(), weight) for rows in torch.split(w, step)])

    def _fit(self, w: Tensor, importance: Tensor | None) -> KQuantParams:
        # Inputs of a sub-block come first: sums over a short last dimension are slow.
        g = self.grouped(w).permute(2, 0, 1).contiguous()
        weight = torch.ones_like(g[:, :1])
        if importance is not None:
            weight = self.grouped(importance[None]).permute(2, 0, 1).contiguous()
        weight = weight / weight.mean().clamp(min=1e-30) + 1e-6
        moments = Moments(g, weight)
        search, end = (signed_ranges, self.middle) if self.symmetric else (ranges, self.top)
        best = self.from_steps(*search(g, moments, end))
        least = self._error(g, weight, best)
        for _ in range(2):  # codes as they came out, and least squares again for them
            codes = self._nearest(g, *self.steps(best))
            tried = self.from_steps(**vars(moments.solved(codes, self.symmetric)))
            error = self._error(g, weight, tried)
            better = error < least
            least = torch.where(better, error, least)
            best = self._chosen(better, tried, best)
        return best

    def _error(self, g: Tensor, weight: Tensor, params: KQuantParams) -> Tensor:
        """(out, supers) squared error."""
        scale, offset = self.steps(params)
        value = self._nearest(g, scale, offset).mul_(scale).sub_(offset)
        return (
            (value.sub_(g).square_().mul_(weight))
            .sum(0)
            .reshape(len(scale), -1, SUPER // self.group_size)
            .sum(-1)
        )

    def _chosen(self, better: Tensor, one: KQuantParams, other: KQuantParams) -> KQuantParams:
        wide = better.repeat_interleave(SUPER // self.group_size, 1)
        return KQuantParams(
            torch.where(better, one.unit, other.unit),
            torch.where(wide, one.scale, other.scale),
            torch.where(better, one.unit_min, other.unit_min),
            torch.where(wide, one.min, other.min),
        )

    def from_steps(
        self,
        scale: Tensor,
        offset: Tensor,
        spread: Tensor | None = None,
        mean: Tensor | None = None,
        count: Tensor | None = None,
        *,
        exact: bool = False,
    ) -> KQuantParams:
        """Multiples of a unit near given scales and offsets, each (out, sub-blocks).

        The error of a sub-block whose codes stay is spread * ds**2 + count * (do - ds * mean)**2,
        with ds and do the changes of scale and offset: the scales are chosen first, and the offsets
        for them.

        Args:
            spread, mean, count: sums over a sub-block's codes (middle taken off): of squared
                distances to their mean, their mean, their number; alike everywhere if None.
            exact: try every number of units that the largest may be, not only the larger half.
        """
        subs = SUPER // self.group_size
        one = torch.ones_like(scale)
        spread, count = (one if t is None else t for t in (spread, count))
        cut = [t.reshape(len(scale), -1, subs) for t in (scale, offset, spread, count)]
        tried = range(1, self.most + 1)
        if not exact:
            tried = range(self.most - self.most // 2, self.most + 1, max(1, self.most // 15))
        unit, multiple = multiples(
            cut[0], cut[2], -self.most - 1 if self.symmetric else 0, self.most, tried
        )
        if self.symmetric:
            return KQuantParams(
                unit, multiple.flatten(1), torch.zeros_like(unit), torch.zeros_like(scale)
            )
        wanted = cut[1]
        if mean is not None:
            wanted = (
                wanted + (unit[..., None] * multiple - cut[0]) * mean.reshape(len(scale), -1, subs)
            ).clamp(min=0)
        unit_min, least = multiples(wanted, cut[3], 0, self.most, tried)
        return KQuantParams(unit, multiple.flatten(1), unit_min, least.flatten(1))

    def keeping(self, codes: Tensor, scale: Tensor, offset: Tensor) -> KQuantParams:
        """Params under which codes that stood for ``scale * (code - middle) - offset`` are closest
        to what they were.

        Args:
            codes: (out, in) uint8. scale, offset: (out, sub-blocks).
        """
        c = self.grouped(codes).to(scale.dtype) - self.middle
        mean = c.mean(-1)
        # No offset to make up for the mean: the error is ds**2 times the sum of squares.
        if self.symmetric:
            return self.from_steps(scale, offset, c.square().sum(-1), exact=True)
        spread = (c - mean[..., None]).square().sum(-1)
        return self.from_steps(
            scale, offset, spread + 1e-3, mean, torch.full_like(mean, c.shape[-1]), exact=True
        )

    def _position(self, g: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Codes, middle taken off, of what broadcasts against scale and offset."""
        flat = scale == 0
        return (g + offset).mul_(torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, scale)))

    def _nearest(self, g: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return (
            self._position(g, scale, offset).round_().clamp_(-self.middle, self.top - self.middle)
        )

    def encode(self, w: Tensor, params: KQuantParams) -> Tensor:
        """Nearest codes, (out, in) float -> (out, in) uint8."""
        scale, offset = (t[..., None] for t in self.steps(params))
        return (
            (self._nearest(self.grouped(w), scale, offset) + self.middle).to(torch.uint8).flatten(1)
        )

    def decode(self, codes: Tensor, params: KQuantParams) -> Tensor:
        """(out, in) codes -> (out, in) weights in the params' dtype."""
        scale, offset = self.steps(params)
        return (
            (self.grouped(codes).to(scale.dtype) - self.middle) * scale[..., None]
            - offset[..., None]
        ).flatten(1)

    def stored(self, params: KQuantParams, dtype: torch.dtype) -> KQuantParams:
        """The same params, units rounded to float16, whatever the ``dtype`` of the model."""
        unit, unit_min = (through(t, _half(t)) for t in (params.unit, params.unit_min))
        return KQuantParams(unit, params.scale, unit_min, params.min)

    def check_finite(self, params: KQuantParams) -> None:
        if not params.finite():
            raise NotFiniteError(f"a unit of {self} does not fit in float16")

    def take(self, params: KQuantParams, column: int) -> Levels:
        unit, sub = column // SUPER, column // self.group_size
        scale = params.unit[:, unit] * params.scale[:, sub]  # (out,)
        offset = params.unit_min[:, unit] * params.min[:, sub]
        return _Steps(self, scale[:, None], offset[:, None])

    def neighbours(self, w: Tensor, params: KQuantParams) -> Neighbours:
        scale, offset = (t[..., None] for t in self.steps(params))
        position = self._position(self.grouped(w.float()), scale, offset) + self.middle
        floor = position.floor()  # (out, sub-blocks, inputs)
        low, high = (t.clamp(0, self.top).to(torch.uint8).flatten(1) for t in (floor, floor + 1))
        return Neighbours(low, high, (position - floor).clamp(0, 1 - 2**-24).flatten(1))

    def beside(self, codes: Tensor, toward: Tensor, params: KQuantParams) -> Tensor:
        scale, _ = self.steps(params)
        way = self.grouped(toward).to(torch.int16) * torch.sign(scale)[..., None].to(torch.int16)
        wanted = self.grouped(codes).to(torch.int16) + way
        return wanted.clamp(0, self.top).to(torch.uint8).flatten(1)

    def freedom(self, params: KQuantParams) -> torch.Size:
        return torch.Size((*params.unit.shape, 2))

    def moved(self, params: KQuantParams, factor: Tensor) -> KQuantParams:
        """Move the units of scales and minima; their small multiples stay."""
        most = torch.finfo(torch.float16).max
        unit, unit_min = (
            (t * factor[..., i]).clamp(-most, most)
            for i, t in enumerate((params.unit, params.unit_min))
        )
        return KQuantParams(unit, params.scale, unit_min, params.min)

    @property
    def shifted(self) -> bool:
        return True

    def linear(self, params: KQuantParams) -> Linear:
        scale, offset = (t.reshape(-1, 1) for t in self.steps(params))
        return Linear(torch.full_like(scale, self.middle), scale, offset)

    def bits_per_weight(self) -> float:
        """Of a block: codes, scales, minima and units."""
        return {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q6_k": 210}[self.kind] * 8 / SUPER


@dataclass(frozen=True, eq=False)
class _Steps:
    """`Levels` of one input: scale and offset (out, 1) each."""

    grid: KQuant
    scale: Tensor
    offset: Tensor

    def encode(self, w: Tensor) -> Tensor:
        middle, flat = self.grid.middle, self.scale == 0
        inverse = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, self.scale))
        codes = (w.float() + self.offset).mul_(inverse).round_()
        return codes.clamp_(-middle, self.grid.top - middle).add_(middle).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes.to(self.scale.dtype) - self.grid.middle) * self.scale - self.offset


def _times(unit: Tensor, multiple: Tensor) -> Tensor:
    """(out, in / 256) units times (out, sub-blocks) multiples: (out, sub-blocks)."""
    cut = multiple.reshape(*unit.shape, -1)  # (out, in / 256, sub-blocks of 256 inputs)
    return (unit[..., None] * cut).flatten(1)


def _half(t: Tensor) -> Tensor:
    return t.detach().to(torch.float16).to(t.dtype)
