"""Weights kept in floating point: picked column by column while the others are coded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grid import Outliers
from ..grid.kmeans import NotFiniteError
from ._columns import Coder, Steps


class OutlierSelector:
    """The weights of one matrix that stay in floating point, picked column by column.

    Args:
        counts: how many of each column, in coding order.
        two_sided: the count + 1 largest and the count smallest by signed value, as the published
            code does it, instead of the count largest by magnitude.
    """

    def __init__(self, counts: Sequence[int], two_sided: bool) -> None:
        self.counts, self.two_sided = counts, two_sided
        self._columns: list[int] = []
        self._rows: list[Tensor] = []
        self._values: list[Tensor] = []

    def pick(self, column: int, values: Tensor) -> Tensor:
        """(n,) int64 ascending: the rows of this column that stay."""
        count = self.counts[column]
        if not self.two_sided:
            return values.abs().topk(count).indices.sort().values
        kept = values >= values.topk(count + 1).values[-1]
        if count:
            kept |= values <= values.topk(count, largest=False).values[-1]
        return kept.nonzero()[:, 0]

    def keep(
        self, column: int, rows: Tensor, values: Tensor, decoded: Tensor, stored: torch.dtype
    ) -> None:
        """Set these rows of a column aside in float16, and put into ``decoded`` what a loader of a
        model in ``stored`` sees there.
        """
        held = values[rows].to(torch.float16)
        decoded[rows] = held.to(stored).to(decoded.dtype)
        self._columns.append(column)
        self._rows.append(rows)
        self._values.append(held)

    def outliers(self, order: Tensor) -> Outliers | None:
        """All of them, with columns back in the order of the inputs; None without any.

        Raises:
            NotFiniteError: one is beyond float16.
        """
        if not self._rows:
            return None
        sizes = torch.tensor([len(r) for r in self._rows], device=order.device)
        columns = order[torch.tensor(self._columns, device=order.device).repeat_interleave(sizes)]
        index, by = (torch.cat(self._rows) * len(order) + columns).sort()
        values = torch.cat(self._values).float()[by]
        if not bool(torch.isfinite(values).all()):
            raise NotFiniteError("a weight to be kept does not fit in float16")
        return Outliers(index, values)


class Reserving:
    """A `Coder` that lets another code a column, and keeps some of its weights in floating
    point.
    """

    uniform = False

    def __init__(self, coder: Coder, outliers: OutlierSelector, stored: torch.dtype) -> None:
        self._coder, self._outliers, self.stored = coder, outliers, stored

    @property
    def period(self) -> int:
        return self._coder.period

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        codes, decoded = self._coder.code(column, values, current)
        kept = self._outliers.pick(column, values)
        self._outliers.keep(column, kept, values, decoded, self.stored)
        return codes, decoded

    def steps(self, start: int, stop: int, current: Tensor) -> tuple[Steps, int]:
        raise NotImplementedError("columns with outliers are coded one by one")
