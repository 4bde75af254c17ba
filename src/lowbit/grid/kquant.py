"""The grids of GGUF's K-quants: scales and minima of sub-blocks are small multiples of one float16
unit per 256 inputs.

    q2_k, q4_k    w = unit * scale * code - unit_min * min
    q3_k, q6_k    w = unit * scale * (code - 2**(bits - 1)), scale of either sign

All products are exact in float32, so whoever decodes gets the same numbers. Source: ggml's
block_q2_K, block_q3_K, block_q4_K, block_q6_K.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import Params
from .kmeans import NotFiniteError

SUPER = 256
Kind = Literal["q2_k", "q3_k", "q4_k", "q6_k"]
_KINDS: dict[
    str, tuple[int, int, int, bool]
] = {  # bits, inputs of a sub-block, greatest scale, symmetric
    "q2_k": (2, 16, 15, False),
    "q3_k": (3, 16, 31, True),
    "q4_k": (4, 32, 63, False),
    "q6_k": (6, 16, 127, True),
}
# What is added to the highest code when a range is tried.
_RANGES = tuple(i / 10 for i in range(-9, 10, 2))
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
class KQuant:
    """One of the K-quants. Holds no tensors.

    Attributes:
        kind: q2_k, q3_k, q4_k or q6_k.
    """

    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"a K-quant is one of {', '.join(_KINDS)}, not {self.kind!r}")

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

    def grouped(self, w: Tensor) -> Tensor:
        """View (out, in) as (out, sub-blocks, inputs)."""
        return w.reshape(w.shape[0], -1, self.group(w.shape[1]))

    def steps(self, params: KQuantParams) -> tuple[Tensor, Tensor]:
        """(scale, offset) of each sub-block, (out, sub-blocks): w = scale * (code - middle) -
        offset.
        """
        subs = SUPER // self.group_size
        return (
            params.unit.repeat_interleave(subs, 1) * params.scale,
            params.unit_min.repeat_interleave(subs, 1) * params.min,
        )

    def fit(self, w: Tensor, importance: Tensor | None = None) -> KQuantParams:
        """Units, scales and minima with a small squared error: ranges by search and least squares,
        then their multiples.

        Args:
            w: (out, in) float. importance: (in,) positive weight of each input's squared error;
                None for the same everywhere.
        """
        self.group(w.shape[1])
        parts = []
        step = max(1, _AT_ONCE // w.shape[1])
        for at in range(0, len(w), step):
            parts.append(
                self._fit(
                    w[at : at + step].float(), None if importance is None else importance.float()
                )
            )
        return KQuantParams(
            *(
                torch.cat([getattr(p, n) for p in parts])
                for n in ("unit", "scale", "unit_min", "min")
            )
        )

    def _fit(self, w: Tensor, importance: Tensor | None) -> KQuantParams:
        # Inputs of a sub-block come first: sums over a short last dimension are slow.
        g = self.grouped(w).permute(2, 0, 1).contiguous()
        weight = (
            torch.ones_like(g[:, :1])
            if importance is None
            else self.grouped(importance[None]).permute(2, 0, 1).contiguous()
        )
        weight = weight / weight.mean().clamp(min=1e-30) + 1e-6
        moments = _Moments(g, weight)
        found = (
            _signed_ranges(g, moments, self.middle)
            if self.symmetric
            else _ranges(g, moments, self.top)
        )
        best = self.from_steps(*found)
        least = self._error(g, weight, best)
        for _ in range(2):  # codes as they came out, and least squares again for them
            codes = self._nearest(g, *self.steps(best))
            tried = self.from_steps(*moments.solved(codes, self.symmetric))
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
        cut = [
            t.reshape(len(scale), -1, subs)
            for t in (
                scale,
                offset,
                one if spread is None else spread,
                one if count is None else count,
            )
        ]
        tried = (
            range(1, self.most + 1)
            if exact
            else range(self.most - self.most // 2, self.most + 1, max(1, self.most // 15))
        )
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

    def position(self, w: Tensor, params: KQuantParams) -> Tensor:
        """Where each weight lies between the codes, (out, in), not clamped, not rounded; the middle
        where a scale is zero.
        """
        scale, offset = (t[..., None] for t in self.steps(params))
        return (self._position(self.grouped(w), scale, offset) + self.middle).flatten(1)

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
        """The same params: they are numbers that blocks hold already, whatever the ``dtype`` of the
        model.

        Raises:
            NotFiniteError: a unit is beyond float16.
        """
        if not bool((torch.isfinite(params.unit) & torch.isfinite(params.unit_min)).all()):
            raise NotFiniteError(f"a unit of {self} does not fit in float16")
        return params

    def bits_per_weight(self) -> float:
        """Of a block: codes, scales, minima and units."""
        return {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q6_k": 210}[self.kind] * 8 / SUPER

    def __str__(self) -> str:
        return f"gguf:{self.kind}"


def multiples(
    values: Tensor, weight: Tensor, least: int, most: int, tried: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """One float16 unit per row and integers, such that unit * integers is near the values.

    Args:
        values: (..., n) float. weight: (..., n) >= 0, of each squared error.
        least, most: limits of the integers.
        tried: how many units the value of largest size may be.

    Returns:
        unit (...) and integers (..., n), in the values' dtype; whatever is exact for one of
            ``tried`` is found.
    """
    largest = values.abs().amax(-1)
    best = torch.full_like(largest, float("inf"))
    unit, integers = torch.zeros_like(largest), torch.zeros_like(values)
    for k in tried:
        first = (values / (largest / k).clamp(min=1e-30)[..., None]).round_().clamp_(least, most)
        norm = (weight * first.square()).sum(-1)
        better = torch.where(
            norm > 0, (weight * first * values).sum(-1) / norm.clamp(min=1e-30), largest / k
        )
        u = better.to(torch.float16).to(values.dtype)
        found = (
            torch.where(u[..., None] == 0, 0.0, values / torch.where(u == 0, 1.0, u)[..., None])
            .round_()
            .clamp_(least, most)
        )
        error = (weight * (values - u[..., None] * found).square()).sum(-1)
        take = error < best
        best, unit = torch.where(take, error, best), torch.where(take, u, unit)
        integers = torch.where(take[..., None], found, integers)
    return unit, integers


class _Moments:
    """What least squares needs of sub-blocks (inputs, out, sub-blocks) and their importance, with
    codes still to come.
    """

    def __init__(self, g: Tensor, weight: Tensor) -> None:
        self.g, self.weight, self.weighted = g, weight, g * weight
        self.count, self.sum, self.square = (
            weight.sum(0),
            self.weighted.sum(0),
            (self.weighted * g).sum(0),
        )

    def line(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, offset >= 0, squared error) of scale * codes - offset, each (out, sub-blocks)."""
        w = codes * self.weight
        c, cx, cc = w.sum(0), (w * self.g).sum(0), w.mul_(codes).sum(0)
        d = self.count * cc - c.square()
        flat = d <= 1e-9 * (self.count * cc + 1e-30)
        d = torch.where(flat, 1.0, d)
        scale = torch.where(flat, 0.0, (self.count * cx - self.sum * c) / d)
        offset = torch.where(flat, -self.sum / self.count, (c * cx - cc * self.sum) / d)
        through_zero = offset < 0
        scale = torch.where(through_zero, cx / cc.clamp(min=1e-30), scale).clamp(min=0)
        offset = offset.clamp(min=0)
        error = (
            self.square
            + scale.square() * cc
            + offset.square() * self.count
            - 2 * (scale * cx - offset * self.sum + scale * offset * c)
        )
        return scale, offset, error

    def ray(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, squared error) of scale * codes."""
        w = codes * self.weight
        cx, cc = (w * self.g).sum(0), w.mul_(codes).sum(0)
        scale = cx / cc.clamp(min=1e-30)
        return scale, self.square - scale * cx

    def solved(
        self, codes: Tensor, symmetric: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Scale and offset for codes that are given, with what `KQuant.from_steps` wants to know of
        the codes.
        """
        cc = (codes.square() * self.weight).sum(0)
        if symmetric:
            scale, _ = self.ray(codes)
            return scale, torch.zeros_like(scale), cc, None, None
        scale, offset, _ = self.line(codes)
        mean = (codes * self.weight).sum(0) / self.count
        return (
            scale,
            offset,
            cc - mean.square() * self.count + 1e-3,
            mean,
            self.count.expand_as(mean),
        )


def _ranges(g: Tensor, moments: _Moments, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of each sub-block, free of units."""
    low = g.amin(0).clamp(max=0)
    shifted = (g - low) / (g.amax(0) - low).clamp(min=1e-30)
    best = torch.full_like(low, float("inf"))
    scale, offset = torch.zeros_like(best), torch.zeros_like(best)
    for extra in _RANGES:
        s, o, error = moments.line((shifted * (top + extra)).round_().clamp_(0, top))
        better = error < best
        best, scale, offset = (
            torch.where(better, error, best),
            torch.where(better, s, scale),
            torch.where(better, o, offset),
        )
    return scale, offset


def _signed_ranges(g: Tensor, moments: _Moments, half: int) -> tuple[Tensor, Tensor]:
    """The same for symmetric kinds; the entry of largest size goes to the end with one code
    more.
    """
    extreme = g.gather(0, g.abs().argmax(0, keepdim=True))[0]
    shifted = g * torch.where(extreme == 0, 0.0, -1 / torch.where(extreme == 0, 1.0, extreme))
    best = torch.full_like(extreme, float("inf"))
    scale = torch.zeros_like(best)
    for extra in _RANGES:
        s, error = moments.ray((shifted * (half + extra)).round_().clamp_(-half, half - 1))
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s, scale)
    return scale, torch.zeros_like(scale)
