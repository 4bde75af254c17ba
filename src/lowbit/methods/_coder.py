"""Columns coded on any grid: what the column loop asks of the grid when a column comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..grid import AnyGrid, GroupedGrid, LinearGrid, Params
from ..grid.base import Levels
from ._columns import Steps

Fit = Callable[[Tensor, int], Params]


class GridColumns:
    """Codes columns on a grid.

    Its params are given, or those of each period of columns (`Grid.period`) are fitted when the
    first of them comes, to what its weights have become.

    Args:
        grid: of the whole weight. order: (in,) int64, the inputs in coding order; with ``fit`` and
            periods of several columns it must be ascending.
        stored: the dtype decoded weights are rounded to.
        params: of the whole weight, inputs as they are.
        fit: ((rows, period) weights, their first column in coding order) -> params as stored.
            Exactly one of ``params`` and ``fit`` is given.
    """

    def __init__(
        self,
        grid: AnyGrid,
        order: Tensor,
        stored: torch.dtype,
        params: Params | None = None,
        fit: Fit | None = None,
    ) -> None:
        self._grid, self._params, self._fit, self.stored = grid, params, fit, stored
        self._inputs: list[int] = order.tolist()
        self._parts: dict[int, Params] = {}
        shared = grid.period(len(order)) or len(order)
        self.period = 1 if fit is None else shared
        self._line = grid if isinstance(grid, LinearGrid) and not grid.shifted else None
        self.uniform = self._line is not None and (params is not None or self.period > 1)
        self._steps: Steps | None = None
        if params is not None and self._line is not None:
            width = len(order)
            size = grid.group(width) if isinstance(grid, GroupedGrid) else shared
            group = (order // size).to(torch.int32)
            self._steps = _laid_out(self._line, params, width // size, group)

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        levels = self._levels(column, current)
        codes = levels.encode(values[:, None])  # (rows, 1)
        decoded = levels.decode(codes)[:, 0]
        return codes[:, 0], decoded.to(self.stored).to(values.dtype)

    def _levels(self, column: int, current: Tensor) -> Levels:
        entry = self._inputs[column]
        if self._params is not None:
            return self._grid.take(self._params, entry)
        return self._grid.take(self._part(column, current), entry % self.period)

    def _part(self, column: int, current: Tensor) -> Params:
        """Params of the period that holds a column, fitted when its first column comes."""
        assert self._fit is not None
        number = self._inputs[column] // self.period
        if number not in self._parts:
            ahead = current[:, column : column + self.period]
            self._parts[number] = self._fit(ahead, column)
        return self._parts[number]

    def steps(self, start: int, stop: int, current: Tensor) -> tuple[Steps, int]:
        """All columns where params are given, else those of one period."""
        if self._steps is not None:
            return replace(self._steps, group=self._steps.group[start:stop]), stop
        assert self._line is not None
        until = min(stop, (start // self.period + 1) * self.period)
        group = torch.zeros(until - start, dtype=torch.int32, device=current.device)
        return _laid_out(self._line, self._part(start, current), 1, group), until

    def params(self) -> Params:
        """Params of the whole weight, inputs as they are."""
        if self._params is not None:
            return self._params
        joined: Params = self._grid.join([self._parts[i] for i in range(len(self._parts))])
        return joined


def _laid_out(grid: LinearGrid[Any], params: Params, groups: int, group: Tensor) -> Steps:
    """Levels as the compiled loop reads them.

    Args:
        groups: of a row. group: (columns,) int32, the group of each column.
    """
    form = grid.linear(params)
    zero, scale = (
        t.float().reshape(-1, groups).T.contiguous() for t in (form.zero, form.scale)
    )  # (rows * groups, 1) -> (groups, rows)
    return Steps(scale, zero, group, (1 << grid.bits) - 1)
