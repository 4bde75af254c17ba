"""Soft rounding: every weight between two neighbouring codes, every group with a tunable dequantization scale.

    weight = (base + step * h(nu)) * stored(scale * phi(v)),   h(nu) = clamp(1.2 sigmoid(nu) - 0.1, 0, 1),   phi(v) = 2 h(v)

``base`` is a code minus the zero point and ``step`` is +1, -1 or 0 (0: the other neighbour lies outside the code range). The
same form serves rounding between floor and ceiling and rounding between a code and either of its neighbours. The linears of
a block that share a group length lie in one (groups, group) matrix, so that a tuning step makes a handful of passes over
memory whatever the number of linears, and the gradient is written out by hand: nothing is saved for autograd.

Frozen weights carry nu = +-FROZEN: h is then exactly 0 or 1 and its slope exactly 0, without infinities and without a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import AffineParams, QTensor
from ..model.block import Block

FROZEN = 100.0
_LEAST_AIM, _MOST_AIM = 0.02, 0.2  # measured: 0.5 ends no better than without the round, 0.15 to 0.25 are alike


def _around(ratio: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """nu, base and step for weights at ``ratio`` steps from zero, between the codes around them."""
    floor = ratio.floor()
    fraction = (ratio - floor).clamp(0, 1 - 2**-24)
    low = (floor + zero).clamp(0, top) - zero
    high = (floor + 1 + zero).clamp(0, top) - zero
    return inverse_rectified(fraction), low, high - low


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


@dataclass
class _Bucket:
    """All linears with the same group length, flattened to (groups, group); v, scale and zero_point are (groups, 1)."""

    nu: Tensor
    base: Tensor
    step: Tensor
    v: Tensor
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        self.h = torch.empty_like(self.nu)  # scratch of `weights`, read again by `backward`
        self.sigmoid = torch.empty_like(self.nu)
        self.soft = torch.empty_like(self.nu)


@dataclass(frozen=True)
class _Place:
    bucket: int
    rows: slice
    shape: torch.Size


class SoftBlock:
    """The soft weights of a block's linears and their variables.

    Args:
        block: linears that are not coded yet become soft. If all are, by a solver before, they start from its codes, frozen
            until `aim` gives each a neighbour.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.names = [n for n in block.wiring.linears if n not in block.coded] or list(block.wiring.linears)
        self.from_codes = self.names[0] in block.coded
        self.keys = [f"{n}.weight" for n in self.names]
        self.places: dict[str, _Place] = {}
        parts: dict[int, list[tuple[Tensor, ...]]] = {}
        counts: dict[int, int] = {}
        for name in self.names:
            weight, grid = block.weight(name), block.grids[name]
            params = block.coded[name].params if self.from_codes else block.range_of(name)
            group = grid.group(weight.shape[1])
            scale, zero = params.scale.reshape(-1, 1), params.zero_point.reshape(-1, 1)
            if self.from_codes:
                low = block.coded[name].codes.reshape(-1, group).to(scale.dtype) - zero
                start = (torch.full_like(low, -FROZEN), low, torch.zeros_like(low), scale, zero)
            else:
                start = (*_around(weight.reshape(-1, group) / scale, zero, grid.top), scale, zero)
            parts.setdefault(group, []).append(start)
            at = counts.get(group, 0)
            counts[group] = at + len(scale)
            self.places[name] = _Place(list(parts).index(group), slice(at, at + len(scale)), weight.shape)
        self.buckets = []
        for pieces in parts.values():
            nu, base, step, scale, zero = (torch.cat(column).float() for column in zip(*pieces, strict=True))
            self.buckets.append(_Bucket(nu, base, step, torch.zeros_like(scale), scale, zero))

    # --- the weights -----------------------------------------------------------------------------------------------------

    def _stored_scale(self, b: _Bucket) -> Tensor:
        """The dequantization scale as the artifact will hold it; rounding is transparent to gradients."""
        scale = b.scale * (2 * rectified(b.v))
        return scale.to(self.block.stored).clamp(min=torch.finfo(self.block.stored).tiny).float()

    def _split(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        out = {}
        for name in self.names:
            place = self.places[name]
            out[f"{name}.weight"] = flats[place.bucket][place.rows].view(place.shape).to(self.block.compute)
        return out

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters with soft weights in place."""
        flats = []
        for b in self.buckets:
            torch.sigmoid(b.nu, out=b.sigmoid)
            torch.mul(b.sigmoid, 1.2, out=b.h).sub_(0.1).clamp_(0, 1)
            torch.addcmul(b.base, b.step, b.h, out=b.soft)
            flats.append(b.soft * self._stored_scale(b))
        return {**self.block.weights, **self._split(flats)}

    def hard_weights(self) -> dict[str, Tensor]:
        """The block's parameters with every weight on the grid, decoded as a loader would."""
        return self.block.solved(self.codes()).decoded()

    def backward(self, gradients: Sequence[Tensor], *, scales: bool) -> None:
        """Turn gradients by the weights (in the order of ``names``) into gradients by nu and v; call after `weights`."""
        by_bucket: list[list[Tensor]] = [[] for _ in self.buckets]
        for name, g in zip(self.names, gradients, strict=True):
            by_bucket[self.places[name].bucket].append(g.reshape(-1, self.buckets[self.places[name].bucket].nu.shape[1]))
        for b, pieces in zip(self.buckets, by_bucket, strict=True):
            g = torch.cat(pieces).float() if len(pieces) > 1 else pieces[0].float()
            if scales:
                b.v.grad = (g * b.soft).sum(1, keepdim=True) * b.scale * (2 * slope(b.v))
            # h is strictly inside (0, 1) exactly where the clamp lets gradients through.
            inside = (b.h > 0).logical_and_(b.h < 1)
            curve = torch.addcmul(b.sigmoid, b.sigmoid, b.sigmoid, value=-1, out=b.sigmoid)  # sigma (1 - sigma)
            b.nu.grad = g.mul(b.step).mul_(1.2 * self._stored_scale(b)).mul_(curve).mul_(inside)

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """(rounding variables, scale variables)."""
        return [b.nu for b in self.buckets], [b.v for b in self.buckets]

    # --- hardening -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def harden(self, soft_share: float) -> None:
        """Freeze, in each linear, all but the ``soft_share`` of its weights that lie nearest to the middle."""
        for name in self.names:
            place = self.places[name]
            nu = self.buckets[place.bucket].nu[place.rows]
            h = rectified(nu)
            threshold = quantile((h - 0.5).abs_(), soft_share)
            nu.masked_fill_(h > 0.5 + threshold, FROZEN).masked_fill_(h < 0.5 - threshold, -FROZEN)

    @torch.no_grad()
    def harden_all(self) -> None:
        """Freeze everything by sign; exactly in the middle goes to the base."""
        for b in self.buckets:
            b.nu.copy_(torch.where(b.nu > 0, FROZEN, -FROZEN))

    def soft_share(self) -> float:
        """The share of weights not frozen yet."""
        return sum(int((b.nu.abs() < FROZEN).sum()) for b in self.buckets) / sum(b.nu.numel() for b in self.buckets)

    # --- the result ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def codes(self) -> dict[str, QTensor]:
        """Integer codes by the sign of nu, with the tuned scales in the stored dtype."""
        flats = [(b.base + b.step * (b.nu > 0) + b.zero_point).to(torch.uint8) for b in self.buckets]
        scales = [self._stored_scale(b) for b in self.buckets]
        out = {}
        for name in self.names:
            p, b = self.places[name], self.buckets[self.places[name].bucket]
            params = AffineParams(
                scales[p.bucket][p.rows].reshape(p.shape[0], -1).clone(), b.zero_point[p.rows].reshape(p.shape[0], -1).clone()
            )
            out[name] = QTensor(self.block.grids[name], flats[p.bucket][p.rows].view(p.shape).clone(), params)
        return out

    @torch.no_grad()
    def aim(self, gradient: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> None:
        """Restart from the hard codes, each weight between its code and the neighbour toward which the loss falls.

        The initial h is half the weight's own Newton step in units of one code, kept small: all weights start at once, and
        together the full steps overshoot by far. Where the neighbour lies outside the code range, h makes it freeze first.

        Args:
            gradient, curvature: by parameter name, first and (positive) second derivative of the loss by the weight.
        """
        for name, key in zip(self.names, self.keys, strict=True):
            p = self.places[name]
            b = self.buckets[p.bucket]
            grid = self.block.grids[name]
            base, step, nu, scale = b.base[p.rows], b.step[p.rows], b.nu[p.rows], self._stored_scale(b)[p.rows]
            g = gradient[key].reshape(base.shape).float()
            newton = (g / curvature[key].reshape(base.shape).float().clamp(min=1e-30) / scale).abs()
            hard = base + step * (nu > 0)
            toward = -torch.sign(g)
            code = hard + b.zero_point[p.rows] + toward
            outside = (code < 0) | (code > grid.top)
            base.copy_(hard)
            step.copy_(toward.masked_fill_(outside, 0))
            nu.copy_(inverse_rectified((0.5 * newton).clamp_(_LEAST_AIM, _MOST_AIM).masked_fill_(outside, 0)))

    def snapshot(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of (nu, v) of every bucket."""
        return [(b.nu.clone(), b.v.clone()) for b in self.buckets]

    @torch.no_grad()
    def restore(self, saved: list[tuple[Tensor, Tensor]]) -> None:
        """Back to a snapshot."""
        for b, (nu, v) in zip(self.buckets, saved, strict=True):
            b.nu.copy_(nu)
            b.v.copy_(v)

    def finite(self) -> bool:
        """Whether all variables are finite."""
        return all(bool(torch.isfinite(b.nu.sum() + b.v.sum())) for b in self.buckets)


_BINS = 1 << 16


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile (linear interpolation, as numpy's default) of values in [0, 0.5], exact, without a full sort.

    A histogram finds the bin that holds the wanted ranks; only that bin is sorted. Runs on the values' device.
    """
    flat = values.flatten()
    # Exactly one half (every frozen weight) gets a bin of its own, so that the crowd there is never sorted.
    bins = (flat * (2 * _BINS)).to(torch.int32)
    below = torch.bincount(bins, minlength=_BINS + 1).cumsum(0)
    at = q * (len(flat) - 1)
    rank = int(at)
    low = _ranked(flat, bins, below, rank)
    high = _ranked(flat, bins, below, min(rank + 1, len(flat) - 1))
    return low + (high - low) * (at - rank)


def _ranked(flat: Tensor, bins: Tensor, below: Tensor, rank: int) -> Tensor:
    bin_ = int(torch.searchsorted(below, rank, right=True))
    if bin_ == _BINS:
        return flat.new_tensor(0.5)
    before = int(below[bin_ - 1]) if bin_ else 0
    return flat[bins == bin_].sort().values[rank - before]
