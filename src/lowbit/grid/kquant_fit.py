"""The search behind `KQuant.fit`: scales and offsets of sub-blocks by least squares over tried
ranges, and their multiples of one unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_RANGES = tuple(i / 10 for i in range(-9, 10, 2))


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
            ``tried`` is found. A unit that float16 does not hold, or of values that are not finite,
            is infinite.
    """
    largest = values.abs().amax(-1)
    best = torch.full_like(largest, float("inf"))
    unit, integers = torch.full_like(largest, float("inf")), torch.zeros_like(values)
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


@dataclass(frozen=True)
class Solved:
    """The arguments of `KQuant.from_steps`, each (out, sub-blocks)."""

    scale: Tensor
    offset: Tensor
    spread: Tensor
    mean: Tensor | None
    count: Tensor | None


class Moments:
    """What least squares needs of sub-blocks (inputs, out, sub-blocks) and their importance, with
    codes still to come.
    """

    def __init__(self, g: Tensor, weight: Tensor) -> None:
        self.g, self.weight, self.weighted = g, weight, g * weight
        self.count = weight.sum(0)
        self.sum = self.weighted.sum(0)
        self.square = (self.weighted * g).sum(0)

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

    def solved(self, codes: Tensor, symmetric: bool) -> Solved:
        """Scale and offset for codes that are given."""
        cc = (codes.square() * self.weight).sum(0)
        if symmetric:
            scale, _ = self.ray(codes)
            return Solved(scale, torch.zeros_like(scale), cc, None, None)
        scale, offset, _ = self.line(codes)
        mean = (codes * self.weight).sum(0) / self.count
        spread = cc - mean.square() * self.count + 1e-3
        return Solved(scale, offset, spread, mean, self.count.expand_as(mean))


def ranges(g: Tensor, moments: Moments, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of each sub-block, free of units; infinite where the squared error is not
    finite.
    """
    low = g.amin(0).clamp(max=0)
    shifted = (g - low) / (g.amax(0) - low).clamp(min=1e-30)
    best = torch.full_like(low, float("inf"))
    scale, offset = best.clone(), best.clone()
    for extra in _RANGES:
        s, o, error = moments.line((shifted * (top + extra)).round_().clamp_(0, top))
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset


def signed_ranges(g: Tensor, moments: Moments, half: int) -> tuple[Tensor, Tensor]:
    """The same for symmetric kinds; the entry of largest size goes to the end with one code
    more.
    """
    extreme = g.gather(0, g.abs().argmax(0, keepdim=True))[0]
    shifted = g * torch.where(extreme == 0, 0.0, -1 / torch.where(extreme == 0, 1.0, extreme))
    best = torch.full_like(extreme, float("inf"))
    scale = best.clone()
    for extra in _RANGES:
        s, error = moments.ray((shifted * (half + extra)).round_().clamp_(-half, half - 1))
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s, scale)
    return scale, torch.zeros_like(scale)
