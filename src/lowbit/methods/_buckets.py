"""Soft weights of linears that share a layout, and the gradients of their variables, by kind of grid.

A bucket holds all of them in one matrix, so that a tuning step makes a handful of passes over memory whatever the number of
linears, and the gradient is written out by hand: nothing is saved for autograd.

Frozen weights carry nu = +-FROZEN: h is then exactly 0 or 1 and its slope exactly 0, without infinities and without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..grid import Affine, AffineParams, Codebook, CodebookParams, QTensor
from ..model.block import Block

FROZEN = 100.0
_LEAST_AIM, _MOST_AIM = 0.02, 0.2  # measured: 0.5 ends no better than without the round, 0.15 to 0.25 are alike


def rectified(nu: Tensor) -> Tensor:
    """h(nu), the stretched and clamped sigmoid of AdaRound."""
    return (1.2 * torch.sigmoid(nu) - 0.1).clamp(0, 1)


def slope(nu: Tensor) -> Tensor:
    """h'(nu), zero where h is clamped."""
    sigmoid = torch.sigmoid(nu)
    inside = (sigmoid > 0.1 / 1.2) & (sigmoid < 1.1 / 1.2)
    return 1.2 * sigmoid * (1 - sigmoid) * inside


def inverse_rectified(h: Tensor) -> Tensor:
    """nu with h(nu) = h, for h in [0, 1]."""
    return -torch.log(1.2 / (h + 0.1) - 1)


def aimed(gradient: Tensor, curvature: Tensor, unit: Tensor, outside: Tensor) -> Tensor:
    """nu for a restart: h is half the weight's own Newton step in units of the way to its other value, kept small.

    All weights start at once, and together the full steps overshoot by far. Where there is no other value, h makes the weight
    freeze first.
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

    def values(self) -> Tensor:
        """(rows, length) soft weights."""
        ...

    def backward(self, gradient: Tensor, *, scales: bool) -> None:
        """Turn the gradient by `values`, as last computed, into gradients by nu and v."""
        ...

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        """One linear on its grid, each weight by the sign of its nu."""
        ...

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        """Let one linear's weights start again between their codes and the neighbours toward which the loss falls."""
        ...


# --- uniform grids ---------------------------------------------------------------------------------------------------------


class AffineBucket:
    """weight = (base + step * h(nu)) * stored(scale * phi(v)), phi(v) = 2 h(v): one row per group of weights.

    ``base`` is a code minus the zero point and ``step`` is +1, -1 or 0 (0: the other code lies outside the range).

    Args:
        block: what is tuned. names: linears whose groups have the same length. from_codes: start on their codes, frozen.
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
            scale, zero = params.scale.reshape(-1, 1), params.zero_point.reshape(-1, 1)
            if from_codes:
                low = block.coded[name].codes.reshape(-1, self.group).to(scale.dtype) - zero
                parts.append((torch.full_like(low, -FROZEN), low, torch.zeros_like(low), scale, zero))
            else:
                parts.append((*_around(weight.reshape(-1, self.group) / scale, zero, grid.top), scale, zero))
            self.grids.append((slice(at, at + len(scale)), grid))
            at += len(scale)
        columns = [torch.cat(column).float() for column in zip(*parts, strict=True)]
        self.nu, self.base, self.step, self.scale, self.zero_point = columns
        self.v = torch.zeros_like(self.scale)
        self.h = torch.empty_like(self.nu)  # scratch of `values`, read again by `backward`
        self.sigmoid = torch.empty_like(self.nu)
        self.soft = torch.empty_like(self.nu)

    @property
    def rows(self) -> list[slice]:
        """Of each linear, in the order of its name."""
        return [at for at, _ in self.grids]

    def lists(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, self.group)

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        return flat[rows].view(shape)

    def stored_scale(self) -> Tensor:
        """The dequantization scale as the artifact will hold it; rounding is transparent to gradients."""
        scale = self.scale * (2 * rectified(self.v))
        return scale.to(self.stored).clamp(min=torch.finfo(self.stored).tiny).float()

    def values(self) -> Tensor:
        torch.sigmoid(self.nu, out=self.sigmoid)
        torch.mul(self.sigmoid, 1.2, out=self.h).sub_(0.1).clamp_(0, 1)
        torch.addcmul(self.base, self.step, self.h, out=self.soft)
        return self.soft * self.stored_scale()

    def backward(self, gradient: Tensor, *, scales: bool) -> None:
        if scales:
            self.v.grad = (gradient * self.soft).sum(1, keepdim=True) * self.scale * (2 * slope(self.v))
        # h is strictly inside (0, 1) exactly where the clamp lets gradients through.
        inside = (self.h > 0).logical_and_(self.h < 1)
        curve = torch.addcmul(self.sigmoid, self.sigmoid, self.sigmoid, value=-1, out=self.sigmoid)  # sigma (1 - sigma)
        self.nu.grad = gradient.mul(self.step).mul_(1.2 * self.stored_scale()).mul_(curve).mul_(inside)

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        codes = (self.base[rows] + self.step[rows] * (self.nu[rows] > 0) + self.zero_point[rows]).to(torch.uint8).view(shape)
        params = AffineParams(self.stored_scale()[rows].reshape(shape[0], -1).clone(), self.zero_point[rows].reshape(shape[0], -1).clone())
        return QTensor(self._grid(rows), codes, params)

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        base, step, nu = self.base[rows], self.step[rows], self.nu[rows]
        hard = base + step * (nu > 0)
        toward = -torch.sign(gradient)
        code = hard + self.zero_point[rows] + toward
        outside = (code < 0) | (code > self._grid(rows).top)
        base.copy_(hard)
        step.copy_(toward.masked_fill_(outside, 0))
        nu.copy_(aimed(gradient, curvature, self.stored_scale()[rows], outside))

    def _grid(self, rows: slice) -> Affine:
        return next(grid for at, grid in self.grids if at == rows)


def _around(ratio: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """nu, base and step for weights at ``ratio`` steps from zero, between the codes around them."""
    floor = ratio.floor()
    fraction = (ratio - floor).clamp(0, 1 - 2**-24)
    low = (floor + zero).clamp(0, top) - zero
    high = (floor + 1 + zero).clamp(0, top) - zero
    return inverse_rectified(fraction), low, high - low


# --- codebooks -------------------------------------------------------------------------------------------------------------


class BookBucket:
    """weight = level[base] + h(nu) * (level[other] - level[base]), level = stored(level_0 + gap * (2 h(v) - 1)): a row per book.

    ``base`` is a code and ``other`` a neighbouring one, or the same at the ends of a book. What dequantization-scale tuning is
    to a group, v is to every level: it moves by up to the book's mean gap, and as fast as a scale does.

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
            self.other, self.nu = self.base.clone(), torch.full(self.base.shape, -FROZEN, device=weight.device)
        else:
            lists = grid.lists(weight).float().contiguous()
            self.base = (torch.searchsorted(self.level, lists, right=True) - 1).clamp(min=0).minimum(tops)
            self.other = (self.base + 1).minimum(tops)
            low, high = self.level.gather(1, self.base), self.level.gather(1, self.other)
            fraction = ((lists - low) / (high - low).clamp(min=1e-30)).clamp(0, 1 - 2**-24)
            self.nu = inverse_rectified(fraction.masked_fill(self.other == self.base, 0))
        self._table = self.level

    def lists(self, weight: Tensor) -> Tensor:
        return self.grid.lists(weight)

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        return self.grid.unlisted(flat, shape[0])

    def levels(self) -> Tensor:
        """The levels as the artifact will hold them; rounding is transparent to gradients."""
        moved = self.level + self.gap * (2 * rectified(self.v) - 1)
        limit = torch.finfo(torch.float16).max
        return moved.clamp(-limit, limit).to(torch.float16).float()

    def values(self) -> Tensor:
        table = self.levels().to(self.stored).float()
        self.low = table.gather(1, self.base)
        self.way = table.gather(1, self.other).sub_(self.low)
        self.h = rectified(self.nu)
        return torch.addcmul(self.low, self.way, self.h)

    def backward(self, gradient: Tensor, *, scales: bool) -> None:
        if scales:
            upper = gradient * self.h
            by_level = torch.zeros_like(self.level).scatter_add_(1, self.other, upper).scatter_add_(1, self.base, gradient - upper)
            self.v.grad = by_level * self.gap * (2 * slope(self.v))
        self.nu.grad = gradient.mul(self.way).mul_(slope(self.nu))

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        codes = torch.where(self.nu > 0, self.other, self.base)
        # Levels that tuning has carried past each other change places, and so do their codes; repeated ones stay at the end.
        tops = (1 << self.widths[:, None]) - 1
        place = torch.arange(self.level.shape[1], device=codes.device)
        ordered, order = self.levels().masked_fill(place > tops, float("inf")).sort(dim=1, stable=True)
        levels = torch.where(place > tops, ordered.gather(1, tops), ordered)
        codes = order.argsort(1).gather(1, codes)
        return QTensor(self.grid, self.grid.unlisted(codes.to(torch.uint8), shape[0]), CodebookParams(levels, self.widths.clone()))

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        hard = torch.where(self.nu > 0, self.other, self.base)
        other = hard - torch.sign(gradient).to(torch.int64)
        outside = (other < 0) | (other >= 1 << self.widths[:, None])
        self.base, self.other = hard, torch.where(outside, hard, other)
        table = self.levels()
        way = (table.gather(1, self.other) - table.gather(1, self.base)).abs().clamp(min=1e-12)
        self.nu.copy_(aimed(gradient, curvature, way, outside | (self.other == self.base)))
