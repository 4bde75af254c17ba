"""Coding columns on codebooks, and keeping some weights of a column in floating point on the
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..grid import Codebook, CodebookParams, Outliers
from ..grid.kmeans import NotFiniteError, kmeans
from ._columns import Coder
from ._sums import sums_by

Levels = Literal["sequential", "refined", "precomputed"]
_REFINING = 3


class Reserve:
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


class ColumnBooks:
    """A `Coder` that gives each column of one matrix a codebook of its own when the column comes.

    Args:
        weight: (rows, columns) in coding order, before any error was made up for.
        widths: (columns,) int64 bits of each column, in coding order.
        stored: the dtype of the model.
        reserve: picks what stays in floating point; None for nothing.
        cluster_reserved: whether the levels are chosen for what stays, too.
        levels: "sequential" clusters the column as it has become (CLAQ), "precomputed" as it was,
            "refined" takes Lloyd steps on the former from the latter.
    """

    period = 1

    def __init__(
        self,
        weight: Tensor,
        widths: Tensor,
        stored: torch.dtype,
        reserve: Reserve | None = None,
        *,
        cluster_reserved: bool = True,
        levels: Levels = "sequential",
    ) -> None:
        self.stored, self.reserve, self.cluster_reserved, self.levels = (
            stored,
            reserve,
            cluster_reserved,
            levels,
        )
        self.widths: list[int] = widths.tolist()
        self._table = torch.empty(
            len(self.widths), 1 << max(self.widths), dtype=torch.float32, device=weight.device
        )
        self._of_widths = widths
        if levels != "sequential":
            self._table.copy_(Codebook(max(self.widths)).fit(weight, widths).levels)

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.reserve.pick(column, values) if self.reserve else None
        clustered = values
        if kept is not None and not self.cluster_reserved:
            left = torch.ones_like(values, dtype=torch.bool)
            left[kept] = False
            clustered = values[left]
        k = 1 << self.widths[column]
        if self.levels == "sequential":
            levels = kmeans(clustered[None], k, checked=values.device.type == "cpu")[0][0]
        else:
            levels = self._table[column, :k]
            for _ in range(_REFINING if self.levels == "refined" else 0):
                levels = _lloyd(clustered, levels)
        levels = levels.to(torch.float16).to(torch.float32)
        self._table[column, :k] = levels
        self._table[column, k:] = levels[-1]
        codes = torch.bucketize(values, ((levels[1:] + levels[:-1]) / 2).to(values.dtype))
        decoded = levels.to(self.stored).to(values.dtype)[codes]
        if self.reserve and kept is not None:
            self.reserve.keep(column, kept, values, decoded, self.stored)
        return codes.to(torch.uint8), decoded

    def params(self, order: Tensor) -> CodebookParams:
        """Levels and widths, with columns back in the order of the inputs."""
        levels, widths = torch.empty_like(self._table), torch.empty_like(self._of_widths)
        levels[order], widths[order] = self._table, self._of_widths
        return CodebookParams(levels, widths)


def _lloyd(values: Tensor, levels: Tensor) -> Tensor:
    """One step: assign, then move each level to the mean of what it got."""
    codes = torch.bucketize(values, ((levels[1:] + levels[:-1]) / 2).to(values.dtype))
    sums = sums_by(codes[None], values.to(levels.dtype)[None], len(levels))[0]
    counts = torch.bincount(codes, minlength=len(levels))
    return torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort().values


class SharedBooks:
    """A `Coder` on codebooks that several columns share, chosen before.

    Args:
        grid, params: of the whole weight, inputs as they are. order: (in,) the inputs in coding
            order.
    """

    period = 1

    def __init__(
        self, grid: Codebook, params: CodebookParams, order: Tensor, stored: torch.dtype
    ) -> None:
        self._inputs: list[int] = order.tolist()
        self._grid, self._params, self._stored = grid, params, stored

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        grid, params = replace(self._grid, group_size=None), self._params
        if grid.per == "column":
            book = self._inputs[column] // (self._grid.group_size or 1)
            params = CodebookParams(params.levels[book : book + 1], params.widths[book : book + 1])
        codes = grid.encode(values[:, None], params)
        return codes[:, 0], grid.decode(codes, params)[:, 0].to(self._stored).to(values.dtype)


class Reserving:
    """A `Coder` that lets another code a column, and keeps some of its weights in floating
    point.
    """

    def __init__(self, coder: Coder, reserve: Reserve, stored: torch.dtype) -> None:
        self._coder, self._reserve, self._stored = coder, reserve, stored

    @property
    def period(self) -> int:
        return self._coder.period

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        codes, decoded = self._coder.code(column, values, current)
        self._reserve.keep(
            column, self._reserve.pick(column, values), values, decoded, self._stored
        )
        return codes, decoded
