"""Soft weights of linears that share a layout, by kind of grid: how their variables make levels and
move.

A bucket holds all of them in one matrix, so that the weights of a step are made in one pass over
memory whatever the number of linears. What a weight is made of, and how rounding variables move, is
`_rounding`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..grid import Affine, AffineParams, Codebook, CodebookParams, QTensor
from ..model.block import Block
from . import _rounding
from ._rounding import FROZEN, Adam, inverse_rectified, moved, rectified, slope
from ._sums import sums_by

# Measured: 0.5 ends no better than without the round, 0.15 to 0.25 are alike.
_LEAST_AIM, _MOST_AIM = (
    0.02,
    0.2,
)


def aimed(gradient: Tensor, curvature: Tensor, unit: Tensor, outside: Tensor) -> Tensor:
    """nu for a restart: h is half the weight's own Newton step in units of the way to its other
    value, kept small.

    All weights start at once, and together the full steps overshoot by far. Where there is no other
    value, h makes the weight freeze first.
    """
    newton = (gradient / curvature.clamp(min=1e-30) / unit).abs()
    return inverse_rectified((0.5 * newton).clamp_(_LEAST_AIM, _MOST_AIM).masked_fill_(outside, 0))


class Bucket(Protocol):
    """Linears in one matrix; a linear is a range of its rows.

    Attributes:
        nu: (rows, length) rounding variable of every weight. v: variables of what tunes the levels.
    """

    nu: Tensor
    v: Tensor

    def lists(self, weight: Tensor) -> Tensor:
        """(out, in) in the layout of this bucket, (rows, length)."""
        ...

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        """The inverse for one linear, from what `values` gave."""
        ...

    def values(self, dtype: torch.dtype) -> Tensor:
        """(rows, length) soft weights, good until the next call."""
        ...

    def start(self) -> None:
        """Forget where Adam stood."""
        ...

    def descend(self, rows: slice, gradient: Tensor, adam: Adam) -> None:
        """Move one linear's nu against its (rows, length) gradient by what `values` gave last, and
        note the gradient by v.
        """
        ...

    def retune(self, adam: Adam, decay: float) -> None:
        """Move v by what `descend` noted since `values`; ``decay`` is L2 inside Adam."""
        ...

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        """One linear on its grid, each weight by the sign of its nu."""
        ...

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        """Let one linear's weights start again between their codes and the neighbours toward which
        the loss falls.
        """
        ...


class Moments:
    """Adam's two moments of a variable, made when they are first needed."""

    def __init__(self, variable: Tensor) -> None:
        self._like = variable
        self.first = self.second = variable.new_empty(0)

    def reset(self) -> None:
        """Both zero."""
        if self.first.shape != self._like.shape:
            self.first, self.second = torch.zeros_like(self._like), torch.zeros_like(self._like)
        else:
            self.first.zero_()
            self.second.zero_()


class Room:
    """A tensor that is written again and again: large ones cost more to allocate than to fill."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def like(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised, of t's shape and device."""
        if self._held is None or self._held.dtype != dtype or self._held.shape != t.shape:
            self._held = torch.empty_like(t, dtype=dtype)
        return self._held


# --- uniform grids --------------------------------------------------------------------------------


class AffineBucket:
    """weight = (code + way * h(nu) - zero point) * stored(scale * phi(v)), phi(v) = 2 h(v): one row
    per group of weights.

    ``way`` is +1, -1 or 0 (0: the other code lies outside the range).

    Args:
        block: what is tuned. names: linears whose groups have the same length. from_codes: start on
            their codes, frozen.
    """

    def __init__(self, block: Block, names: Sequence[str], from_codes: bool) -> None:
        self.stored = block.stored
        self.grids: list[tuple[slice, Affine]] = []
        parts: list[tuple[Tensor, ...]] = []
        at = 0
        for name in names:
            grid, weight = block.grids[name], block.weight(name)
            assert isinstance(grid, Affine)
            params = block.coded[name].params if from_codes else block.range_of(name)
            self.group = grid.group(weight.shape[1])
            scale, zero = (
                params.scale.reshape(-1, 1).float(),
                params.zero_point.reshape(-1, 1).float(),
            )
            if from_codes:
                code = block.coded[name].codes.reshape(-1, self.group)
                start = (
                    torch.full(code.shape, -FROZEN, device=code.device),
                    code,
                    torch.zeros_like(code, dtype=torch.int8),
                )
            else:
                start = _around(weight.reshape(-1, self.group).float() / scale, zero, grid.top)
            parts.append((*start, scale, zero))
            self.grids.append((slice(at, at + len(scale)), grid))
            at += len(scale)
        self.nu, self.code, self.way, self.scale, self.zero_point = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        self.v = torch.zeros_like(self.scale)
        self._nu_moments, self._v_moments, self._room = Moments(self.nu), Moments(self.v), Room()
        self._by_scale = torch.zeros_like(self.scale)
        self._now = self.scale

    @property
    def rows(self) -> list[slice]:
        """Of each linear, in the order of its name."""
        return [at for at, _ in self.grids]

    def lists(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, self.group)

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        return flat[rows].view(shape)

    def stored_scale(self) -> Tensor:
        """The dequantization scale as the artifact will hold it; rounding is transparent to
        gradients.
        """
        scale = self.scale * (2 * rectified(self.v))
        return scale.to(self.stored).clamp(min=torch.finfo(self.stored).tiny).float()

    def values(self, dtype: torch.dtype) -> Tensor:
        self._now = self.stored_scale()
        return _rounding.weights(
            self.nu,
            self.code,
            self.way,
            self.zero_point,
            self._now,
            None,
            self._room.like(self.nu, dtype),
        )

    def start(self) -> None:
        self._nu_moments.reset()
        self._v_moments.reset()

    def descend(self, rows: slice, gradient: Tensor, adam: Adam) -> None:
        m = self._nu_moments
        sums = _rounding.descend(
            gradient,
            self.nu[rows],
            self.code[rows],
            self.way[rows],
            self.zero_point[rows],
            self._now[rows],
            m.first[rows],
            m.second[rows],
            adam,
        )
        self._by_scale[rows] = sums[:, :1]

    def retune(self, adam: Adam, decay: float) -> None:
        gradient = self._by_scale * self.scale * (2 * slope(self.v))
        moved(
            self.v,
            gradient.add_(self.v, alpha=decay),
            self._v_moments.first,
            self._v_moments.second,
            adam,
        )

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        codes = (self.code[rows] + self.way[rows] * (self.nu[rows] > 0)).to(torch.uint8).view(shape)
        params = AffineParams(
            self.stored_scale()[rows].reshape(shape[0], -1).clone(),
            self.zero_point[rows].reshape(shape[0], -1).clone(),
        )
        return QTensor(self._grid(rows), codes, params)

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        code, way, nu = self.code[rows], self.way[rows], self.nu[rows]
        code.copy_(code + way * (nu > 0))
        way.copy_(-torch.sign(gradient))
        other = code.to(torch.int16) + way
        outside = (other < 0) | (other > self._grid(rows).top)
        way.masked_fill_(outside, 0)
        nu.copy_(aimed(gradient, curvature, self.stored_scale()[rows], outside))

    def _grid(self, rows: slice) -> Affine:
        return next(grid for at, grid in self.grids if at == rows)


def _around(ratio: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """nu, code and way for weights at ``ratio`` steps from zero, between the codes around them."""
    floor = ratio.floor()
    fraction = (ratio - floor).clamp(0, 1 - 2**-24)
    low, high = (floor + zero).clamp(0, top), (floor + 1 + zero).clamp(0, top)
    return inverse_rectified(fraction), low.to(torch.uint8), (high - low).to(torch.int8)


# --- codebooks ------------------------------------------------------------------------------------


class BookBucket:
    """weight = level[base] + h(nu) * (level[other] - level[base]), level = stored(level_0 + gap *
    (2 h(v) - 1)): a row per book.

    ``base`` is a code and ``other`` a neighbouring one, or the same at the ends of a book. What
    dequantization-scale tuning is to a group, v is to every level: it moves by up to the book's
    mean gap, and as fast as a scale does.

    Args:
        block: what is tuned. name: the linear. from_codes: start on its codes, frozen.
    """

    def __init__(self, block: Block, name: str, from_codes: bool) -> None:
        grid, weight = block.grids[name], block.weight(name)
        assert isinstance(grid, Codebook)
        self.grid, self.stored = grid, block.stored
        params: CodebookParams = block.coded[name].params if from_codes else block.range_of(name)
        self.widths = params.widths
        self.level = params.levels.float().contiguous()
        tops = (1 << self.widths[:, None]) - 1
        last = self.level.gather(1, tops)
        self.gap = ((last - self.level[:, :1]) / tops).clamp(min=torch.finfo(torch.float16).tiny)
        self.v = torch.zeros_like(self.level)
        if from_codes:
            self.base = grid.lists(block.coded[name].codes).to(torch.int64)
            self.other, self.nu = (
                self.base.clone(),
                torch.full(self.base.shape, -FROZEN, device=weight.device),
            )
        else:
            lists = grid.lists(weight).float().contiguous()
            self.base = (
                (torch.searchsorted(self.level, lists, right=True) - 1).clamp(min=0).minimum(tops)
            )
            self.other = (self.base + 1).minimum(tops)
            low, high = self.level.gather(1, self.base), self.level.gather(1, self.other)
            fraction = ((lists - low) / (high - low).clamp(min=1e-30)).clamp(0, 1 - 2**-24)
            self.nu = inverse_rectified(fraction.masked_fill(self.other == self.base, 0))
        self._nu_moments, self._v_moments = Moments(self.nu), Moments(self.v)
        self._by_level = torch.zeros_like(self.level)

    def lists(self, weight: Tensor) -> Tensor:
        return self.grid.lists(weight)

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        return self.grid.unlisted(flat, shape[0])

    def levels(self) -> Tensor:
        """The levels as the artifact will hold them; rounding is transparent to gradients."""
        moved = self.level + self.gap * (2 * rectified(self.v) - 1)
        limit = torch.finfo(torch.float16).max
        return moved.clamp(-limit, limit).to(torch.float16).float()

    def values(self, dtype: torch.dtype) -> Tensor:
        table = self.levels().to(self.stored).float()
        self.low = table.gather(1, self.base)
        self.way = table.gather(1, self.other).sub_(self.low)
        return torch.addcmul(self.low, self.way, rectified(self.nu)).to(dtype)

    def start(self) -> None:
        self._nu_moments.reset()
        self._v_moments.reset()

    def descend(self, rows: slice, gradient: Tensor, adam: Adam) -> None:
        gradient = gradient.float()
        upper = gradient * rectified(self.nu)
        count = self.level.shape[1]
        self._by_level = sums_by(self.other, upper, count).add_(
            sums_by(self.base, gradient - upper, count)
        )
        moved(
            self.nu,
            gradient * self.way * slope(self.nu),
            self._nu_moments.first,
            self._nu_moments.second,
            adam,
        )

    def retune(self, adam: Adam, decay: float) -> None:
        gradient = self._by_level * self.gap * (2 * slope(self.v))
        moved(
            self.v,
            gradient.add_(self.v, alpha=decay),
            self._v_moments.first,
            self._v_moments.second,
            adam,
        )

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        codes = torch.where(self.nu > 0, self.other, self.base)
        # Levels that tuning has carried past each other change places, and so do their codes;
        # repeated ones stay at the end.
        tops = (1 << self.widths[:, None]) - 1
        place = torch.arange(self.level.shape[1], device=codes.device)
        ordered, order = (
            self.levels().masked_fill(place > tops, float("inf")).sort(dim=1, stable=True)
        )
        levels = torch.where(place > tops, ordered.gather(1, tops), ordered)
        codes = order.argsort(1).gather(1, codes)
        return QTensor(
            self.grid,
            self.grid.unlisted(codes.to(torch.uint8), shape[0]),
            CodebookParams(levels, self.widths.clone()),
        )

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        hard = torch.where(self.nu > 0, self.other, self.base)
        other = hard - torch.sign(gradient).to(torch.int64)
        outside = (other < 0) | (other >= 1 << self.widths[:, None])
        self.base, self.other = hard, torch.where(outside, hard, other)
        table = self.levels()
        way = (table.gather(1, self.other) - table.gather(1, self.base)).abs().clamp(min=1e-12)
        self.nu.copy_(aimed(gradient, curvature, way, outside | (self.other == self.base)))
