"""Hardening in plain torch: in each linear all weights but those nearest to the middle freeze."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import FROZEN, rectified

_BINS = 1 << 16


def harden(nu: Tensor, soft_share: float) -> None:
    """See the package."""
    h = rectified(nu)
    threshold = quantiles((h - 0.5).abs_(), soft_share)[:, None]
    nu.masked_fill_(h > 0.5 + threshold, FROZEN).masked_fill_(h < 0.5 - threshold, -FROZEN)


def quantiles(values: Tensor, q: float, by_rank: bool | None = None) -> Tensor:
    """`quantile` of every row, (rows,).

    Args:
        values: (rows, n) in [0, 0.5].
        by_rank: find all rows' ranks at once, without a wait for the device, rather than by a
            histogram each. None for what suits: on the CPU the histogram is faster from some
            thousand numbers on (measured), and so it should be for a single row on any device.
    """
    if by_rank is None:
        by_rank = values.device.type != "cpu" and len(values) > 1
    if not by_rank:
        return torch.stack([quantile(row, q) for row in values])
    last = values.shape[1] - 1
    rank = int(q * last)
    low, high = (values.kthvalue(min(k, last) + 1, dim=1).values for k in (rank, rank + 1))
    return low + (high - low) * (q * last - rank)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile (linear interpolation, as numpy's default) of values in [0, 0.5], exact,
    without a full sort.

    A histogram finds the bins that hold the wanted ranks; only those are sorted. Runs on the
    values' device, which is waited for twice.
    """
    flat = values.flatten()
    last = len(flat) - 1
    at = q * last
    rank = int(at)
    bins, counts = _histogram(flat)
    below = counts.cumsum(0)  # values in the first bins; the others are one half
    wanted = torch.arange(rank, rank + 2, device=flat.device).clamp_(max=last)
    found = torch.searchsorted(below, wanted, right=True)  # _BINS: one half
    before = torch.where(found > 0, below[(found - 1).clamp_(min=0)], 0)
    first, second, skipped, _ = torch.cat([found, before]).tolist()
    if first == _BINS:
        return flat.new_full((), 0.5)
    # All bins between the two are empty.
    near = flat[(bins >= first) & (bins <= min(second, _BINS - 1))].sort().values
    low = near[rank - skipped]
    high = near[min(rank + 1, last) - skipped] if second < _BINS else flat.new_full((), 0.5)
    return low + (high - low) * (at - rank)


def _histogram(flat: Tensor) -> tuple[Tensor, Tensor]:
    """int32 bins of values in [0, 0.5], and how many lie in each of the `_BINS` that are below one
    half. At one half lies every frozen weight: that crowd is what is left, never sorted.
    """
    bins = (flat * (2 * _BINS)).to(torch.int32)
    if flat.device.type == "cpu":
        return bins, torch.bincount(bins, minlength=_BINS + 1)[:_BINS]
    # On an accelerator additions to one number wait for each other: the crowd is spread over as
    # many bins more. And `bincount` would read its largest bin back.
    spread = torch.arange(len(flat), dtype=torch.int32, device=flat.device) % _BINS + _BINS
    bins = torch.where(bins < _BINS, bins, spread)
    ones = torch.ones_like(bins[:1]).expand_as(bins)
    return bins, bins.new_zeros(2 * _BINS).index_add_(0, bins, ones)[:_BINS]
