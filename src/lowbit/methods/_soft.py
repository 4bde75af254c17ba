"""Soft rounding: every weight between two neighbouring codes, its levels tunable, all linears of a
block at once.

The same form serves rounding between floor and ceiling and rounding between a code and either of
its neighbours; the arithmetic is that of the grid, see `_buckets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..grid import AnyGrid, Coded, LinearGrid
from ..model.block import Block
from ._buckets import Bucket, ordered
from ._rounding import FROZEN, Adam, harden, rectified
from ._slices import quantile_of_all


@dataclass(frozen=True)
class _Place:
    bucket: int
    rows: slice
    shape: torch.Size


@dataclass(frozen=True)
class _Run:
    """Linears of one size that follow each other in a bucket."""

    bucket: int
    rows: slice
    names: tuple[str, ...]


# Weights of the largest linears that are worked on together, and of all of them. On the CPU 192
# linears of 24576 weights descend in 24 instead of 53 ms (benchmarks/experts_step.py), and larger
# runs gain nothing. Elsewhere a launch takes the host longer than the work of a small linear takes
# the device; not measured there.
_TOGETHER = {"cpu": (1 << 17, 1 << 20)}
_ELSEWHERE = (1 << 21, 1 << 26)


class SoftBlock:
    """The soft weights of a block's linears and their variables. Outliers of a solver before stay
    as they are.

    Args:
        block: linears that are not coded yet become soft. If all are, by a solver before, they
            start from its codes, frozen until `aim` gives each a neighbour.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.names = [n for n in block.graph.linears if n not in block.coded] or list(
            block.graph.linears
        )
        self.from_codes = self.names[0] in block.coded
        self.keys = [f"{n}.weight" for n in self.names]
        self.places: dict[str, _Place] = {}
        self.buckets: list[Bucket] = []
        self.outliers = {
            n: block.coded[n].outliers
            for n in self.names
            if n in block.coded and block.coded[n].outliers
        }
        for names in self._bundles():
            bucket = Bucket(block, names, self.from_codes)
            for name, rows in zip(names, bucket.places, strict=True):
                self.places[name] = _Place(len(self.buckets), rows, block.weight(name).shape)
            self.buckets.append(bucket)
        self._runs = self._found_runs()

    def _found_runs(self) -> list[_Run]:
        """All linears that are not divided among ranks, those together that are so small that calls
        cost more than the work.
        """
        each, total = _TOGETHER.get(self.block.device.type, _ELSEWHERE)
        runs: list[_Run] = []
        for name, place in self.places.items():
            if self.buckets[place.bucket].part.divided:
                continue
            last, size = runs[-1] if runs else None, place.shape.numel()
            if (
                last is not None
                and last.bucket == place.bucket
                and self.places[last.names[0]].shape.numel() == size <= each
                and size * (len(last.names) + 1) <= total
            ):
                rows = slice(last.rows.start, place.rows.stop)
                runs[-1] = replace(last, rows=rows, names=(*last.names, name))
            else:
                runs.append(_Run(place.bucket, place.rows, (name,)))
        return runs

    def _bundles(self) -> list[list[str]]:
        """Linears that can lie in one matrix."""
        found: dict[tuple[AnyGrid, int, str], list[str]] = {}
        for name in self.names:
            grid = ordered(self.block, name)
            length = grid.lists(self.block.weight(name)).shape[1]
            alone = "" if isinstance(grid, LinearGrid) else name
            found.setdefault((grid.of_lists, length, alone), []).append(name)
        return list(found.values())

    # --- the weights ------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters with soft weights in place, in the compute dtype; good until the
        next call.
        """
        flats = [b.values(self.block.compute) for b in self.buckets]
        out = dict(self.block.weights)
        for name in self.names:
            p = self.places[name]
            weight = self.buckets[p.bucket].weight(p.rows, p.shape, flats[p.bucket])
            kept = self.outliers.get(name)
            if kept is not None:
                values = kept.values.to(self.block.stored).to(weight.dtype)
                weight = weight.flatten().index_copy(0, kept.index, values).view(p.shape)
            out[f"{name}.weight"] = weight
        return out

    def hard_weights(self) -> dict[str, Tensor]:
        """The block's parameters with every weight on the grid, decoded as a loader would."""
        return self.block.with_codes(self.codes()).decoded()

    def start(self) -> None:
        """Forget where Adam stood."""
        for b in self.buckets:
            b.start()

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor], adam: Adam, decay: float | None) -> None:
        """One step of Adam on nu, and on v with ``decay`` (L2) if that is given.

        Args:
            gradients: of a loss on this rank's rows of activations, by the weights that `weights`
                gave last, in the order of ``names``, (out, in) each in any float dtype.
        """
        by_name = dict(zip(self.names, gradients, strict=True))
        for run in self._runs:
            bucket = self.buckets[run.bucket]
            lists = [bucket.lists(self._masked(n, by_name[n])) for n in run.names]
            gradient = lists[0] if len(lists) == 1 else torch.cat(lists)
            if self.block.ranks.near.size > 1:
                gradient = bucket.part.summed(_wide(gradient))
            bucket.descend(run.rows, gradient, adam)
        for number, bucket in enumerate(self.buckets):
            if bucket.part.divided:
                bucket.descend(slice(0, len(bucket.nu)), self._summed(number, by_name), adam)
        if decay is not None:
            for b in self.buckets:
                b.retune(adam, decay)

    def _summed(self, number: int, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient over all ranks of this rank's rows of a bucket."""
        bucket = self.buckets[number]
        whole = bucket.part.room(bucket.nu.shape[1], next(iter(gradients.values())))
        for name in self._names_in(number):
            whole[self.places[name].rows] = bucket.lists(self._masked(name, gradients[name]))
        return bucket.part.summed(whole)

    def _names_in(self, number: int) -> list[str]:
        """The linears of a bucket."""
        return [name for name, place in self.places.items() if place.bucket == number]

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient that is zero where the weight is an outlier."""
        kept = self.outliers.get(name)
        if kept is None:
            return gradient
        return gradient.flatten().index_fill(0, kept.index, 0).view(gradient.shape)

    # --- hardening --------------------------------------------------------------------------------

    @torch.no_grad()
    def harden(self, soft_share: float) -> None:
        """Freeze, in each linear, all but the ``soft_share`` of its weights that lie nearest to the
        middle.
        """
        for run in self._runs:
            nu = self.buckets[run.bucket].nu[run.rows]
            harden(nu.view(len(run.names), -1), soft_share)
        for place in self.places.values():
            bucket = self.buckets[place.bucket]
            if not bucket.part.divided:
                continue
            nu = bucket.nu[bucket.part.local(place.rows)]
            h, count = rectified(nu), place.shape.numel()
            limit = quantile_of_all(bucket.part.ranks, (h - 0.5).abs_(), count, soft_share)
            nu.masked_fill_(h > 0.5 + limit, FROZEN).masked_fill_(h < 0.5 - limit, -FROZEN)

    @torch.no_grad()
    def harden_all(self) -> None:
        """Freeze everything by sign; exactly in the middle goes to the base."""
        for b in self.buckets:
            b.nu.copy_(torch.where(b.nu > 0, FROZEN, -FROZEN))

    def soft_share(self) -> float:
        """The share of weights not frozen yet."""
        ranks = self.block.ranks.near
        counted = [b for b in self.buckets if b.part.divided or ranks.first]
        soft, all_ = ranks.total(
            sum(int((b.nu.abs() < FROZEN).sum()) for b in counted),
            sum(b.nu.numel() for b in counted),
        )
        return soft / all_

    # --- the result -------------------------------------------------------------------------------

    @torch.no_grad()
    def codes(self) -> dict[str, Coded]:
        """Integer codes by the sign of nu, with the tuned scales or levels as they will be
        stored.
        """
        found = [b.codes() for b in self.buckets]
        out = {}
        for name in self.names:
            p = self.places[name]
            coded = self.buckets[p.bucket].coded(p.rows, p.shape, *found[p.bucket])
            out[name] = replace(coded, outliers=self.outliers.get(name))
        return out

    @torch.no_grad()
    def aim(self, gradient: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> None:
        """Restart from the hard codes, each weight between its code and the neighbour toward which
        the loss falls.

        Args:
            gradient, curvature: by parameter name, first and (positive) second derivative of the
                loss by the weight.
        """
        params = [b.now() for b in self.buckets]
        for name, key in zip(self.names, self.keys, strict=True):
            p = self.places[name]
            b = self.buckets[p.bucket]
            first, second = (b.lists(t[key]).float() for t in (gradient, curvature))
            b.aim(p.rows, first, second, params[p.bucket])

    def snapshot(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of (nu, v) of every bucket."""
        return [(b.nu.clone(), b.v.clone()) for b in self.buckets]

    @torch.no_grad()
    def restore(self, saved: list[tuple[Tensor, Tensor]]) -> None:
        """Back to a snapshot."""
        for b, (nu, v) in zip(self.buckets, saved, strict=True):
            b.nu.copy_(nu)
            b.v.copy_(v)

    def finite(self, *numbers: Tensor) -> bool:
        """Whether all variables, and these numbers, are finite on all ranks of the run."""
        sums = [*numbers, *(b.nu.sum() + b.v.sum() for b in self.buckets)]
        own = all(bool(torch.isfinite(t).all()) for t in sums)
        return not self.block.ranks.total(not own)[0]


def _wide(gradient: Tensor) -> Tensor:
    """In float32 at least, in memory of its own."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)
