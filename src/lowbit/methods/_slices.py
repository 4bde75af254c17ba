"""Rows of a matrix and of its variables divided among ranks, as the states of ZeRO are (arXiv
1910.02054): each rank holds and moves its own, what they make is gathered, and of gradients each
gets the sum over ranks of its own rows alone.

What travels is what an all-reduce of the gradients takes, or less, for made weights are gathered in
the dtype of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.ranks import Ranks


@dataclass(frozen=True)
class Slice:
    """This rank's rows among so many.

    Attributes:
        ranks: who shares them. rows: how many there are.
    """

    ranks: Ranks
    rows: int

    @property
    def divided(self) -> bool:
        """Whether there are enough rows for every rank to have some; else all ranks have all."""
        size = self.ranks.size
        return size > 1 and self.rows > size * (size - 1)

    @property
    def each(self) -> int:
        """Rows of a rank, the last one has fewer."""
        return -(-self.rows // self.ranks.size) if self.divided else self.rows

    @property
    def own(self) -> slice:
        """This rank's rows."""
        first = self.ranks.rank * self.each if self.divided else 0
        return slice(first, min(first + self.each, self.rows))

    def local(self, rows: slice) -> slice:
        """Where some rows lie among this rank's own, as far as they are of them."""
        own = self.own
        first = min(max(rows.start, own.start), own.stop) - own.start
        return slice(first, max(first, min(rows.stop, own.stop) - own.start))

    def gathered(self, own: Tensor) -> Tensor:
        """(rows, ...) of all ranks from this rank's own."""
        if not self.divided:
            return own
        padded = own.contiguous()
        if len(own) < self.each:
            padded = own.new_zeros(self.each, *own.shape[1:])
            padded[: len(own)] = own
        out = own.new_empty(self.each * self.ranks.size, *own.shape[1:])
        self.ranks.joined_(out, padded)
        return out[: self.rows]

    def room(self, length: int, like: Tensor) -> Tensor:
        """(at least rows, length) for `summed`, in a tensor's dtype or float32 if that is wider."""
        rows = self.each * self.ranks.size if self.divided else self.rows
        out = like.new_empty(rows, length, dtype=torch.promote_types(like.dtype, torch.float32))
        out[self.rows :] = 0
        return out

    def summed(self, whole: Tensor) -> Tensor:
        """This rank's rows of a sum over ranks.

        Args:
            whole: from `room`, filled; may be written over.
        """
        if not self.divided:
            self.ranks.sum_(whole)
            return whole
        own = self.own
        return self.ranks.summed_part(whole)[: own.stop - own.start]


def quantile_of_all(ranks: Ranks, own: Tensor, count: int, q: float) -> Tensor:
    """The q-quantile (linear interpolation) of values in [0, 0.5] that are spread over ranks: what
    `quantile` gives of all of them, bit for bit.

    Args:
        own: this rank's, any number of them. count: of all ranks' values.
    """
    flat = own.flatten()
    # Some values in a bin; more bins would be more to send.
    top = 1 << min(16, max(8, (count // 16).bit_length()))
    # One half, where all frozen weights are, has a bin of its own, which nobody sends or sorts.
    bins = (flat * (2 * top)).to(torch.int32)
    found = torch.bincount(bins, minlength=top + 1)
    ranks.sum_(found)
    below = found.cumsum(0)
    at = q * (count - 1)
    rank = int(at)
    ends: list[Tensor] = []
    for wanted in (rank, min(rank + 1, count - 1)):
        bin_ = int(torch.searchsorted(below, wanted, right=True))
        if bin_ == top:
            ends.append(flat.new_tensor(0.5))
            continue
        before = int(below[bin_ - 1]) if bin_ else 0
        ends.append(_sorted(ranks, flat[bins == bin_])[wanted - before])
    low, high = ends
    return low + (high - low) * (at - rank)


def _sorted(ranks: Ranks, own: Tensor) -> Tensor:
    """Values of all ranks in order; more at the end, which are infinite."""
    counts = ranks.stacked(torch.tensor([len(own)], device=own.device))
    padded = own.new_full((int(counts.max()),), float("inf"))
    padded[: len(own)] = own
    return ranks.stacked(padded).flatten().sort().values
