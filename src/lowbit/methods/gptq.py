"""GPTQ (arXiv 2210.17323): nearest rounding column by column, every error made up for by the
columns that are still free.

The loss of a linear is ||(W - Q) X||^2 on its inputs X as the quantized prefix produces them. With
H = (2/n) X X^T, damped, and U upper triangular, U^T U = H^-1, for each column c from left to right

    q_c = nearest(w_c)                                            (algorithm 1)
    e_c = (w_c - q_c) / U_cc
    w_j <- w_j - e_c U_cj          for all columns j > c

Beyond the paper, from the code its authors published later: inputs collected site by site (on by
default), grids of groups fixed in advance, columns in the order of their activations' size, and
ranges that minimise the rounding error.

Helpers: `_columns` (U, the loop), `_coder` (nearest(w_c) on any grid), `_hessian` (H), `_sites`
(the walk from site to site).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, Coded, LinearGrid, Params, QTensor, RangedGrid
from ..grid.params import picked, stacked
from ..model.block import Block
from ._coder import GridColumns
from ._columns import code_in_order, least_range
from ._hessian import Inputs, Walk, column_cost
from ._parts import Part, divided_rows, whole
from ._sites import Found, solve_sites
from .cost import Cost, Shapes

RangeKind = Literal["none", "mse"]

# Factors 1 - i/100 and the norm of the error, as in the published code.
_CLIP_STEPS, _CLIP_NORM = 80, 2.4
_RANGES = 1 << 16  # groups whose ranges are searched at a time: their tables stay small


@dataclass(frozen=True)
class GPTQ:
    """The knobs of GPTQ. The defaults are the published settings but for ``true_sequential``; the
    preset `gptq-paper` has that too.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to its diagonal. If it is too
            little for the Hessian to be inverted, ten times as much is tried, and so on.
        act_order: code the inputs with the largest activations first. Implies ``static_groups``
            where groups have several inputs.
        static_groups: fix the grids of all groups from the original weights; otherwise a group's
            grid is fitted to what its weights have become when its first column is coded.
        true_sequential: collect the inputs of a site after the sites before it are coded; otherwise
            in one pass before any.
        block_size: columns updated together; changes the speed, not the result.
        clip: how the range of a group is found: "none" takes minimum and maximum, "mse" shrinks
            them to where the rounded weights differ least.
        rows: calibration rows used, at most; 0 means all.

    Params that columns far from each other share (K-quants, shared codebooks) are fixed in advance
    as with ``static_groups``, inputs weighted by what their error costs. ``clip`` applies to grids
    with ranges.

    Linears whose ranges are fixed already (by a clip before this method) keep them. Coded ones are
    left alone.

    Raises:
        LowbitError: an option is out of range; a Hessian is not finite, or not invertible with any
            damping tried.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    block_size: int = 128
    clip: RangeKind = "none"
    rows: int = 0

    def __post_init__(self) -> None:
        self.walk.check(self.block_size)
        if self.clip not in ("none", "mse"):
            raise LowbitError(f"gptq.clip must be none or mse, got {self.clip!r}.")

    @torch.no_grad()
    def __call__(self, block: Block) -> Block:
        return solve_sites(block, self.walk, self._divided, self._part)

    @property
    def walk(self) -> Walk:
        """How a block is gone through."""
        return Walk("gptq", self.rows, self.damping, self.act_order, self.true_sequential)

    def _divided(self, block: Block, names: Sequence[str], parts: int) -> list[Part]:
        """Linears that read the same inputs: those on the same grid in one loop, if their rows
        share no params; which may then be cut anywhere.
        """
        bundles: dict[tuple[AnyGrid, bool, str], list[str]] = {}
        for name in names:
            grid = block.grids[name]
            alone = "" if grid.rows_apart else name
            bundles.setdefault((grid, name in block.params, alone), []).append(name)
        out: list[Part] = []
        for (grid, _, _), members in bundles.items():
            out += divided_rows(whole(block, members), parts if grid.rows_apart else 1)
        return out

    def _part(self, block: Block, part: Part, inputs: Inputs | None) -> Found:
        """Codes of rows on one grid."""
        grid = block.grids[part[0].linear]
        weight = torch.cat([block.weight(s.linear)[s.rows] for s in part])
        params = None
        if part[0].linear in block.params:
            held = [(s, block.params[s.linear]) for s in part]
            params = stacked([p if s.whole else p.rows(s.rows) for s, p in held])
        if inputs is None:
            if params is None:
                params = fit_range(grid, weight, self.clip, block.stored)
            coded: Coded = QTensor(grid, grid.encode(weight, params), params)
        else:
            weight = weight.masked_fill(inputs.dead, 0)
            if params is None and self._fixed(grid, weight.shape[1]):
                params = fit_range(grid, weight, self.clip, block.stored, error_cost(inputs))
            coded = solve(weight, inputs, grid, params, block.stored, self.clip, self.block_size)
        return Found(_split(coded, [s.count for s in part]))

    def _fixed(self, grid: AnyGrid, width: int) -> bool:
        """Whether params are fixed before the first column is coded."""
        period = grid.period(width)
        return period is None or self.static_groups or (self.act_order and period > 1)


def solve(
    weight: Tensor,
    inputs: Inputs,
    grid: AnyGrid,
    params: Params | None,
    stored: torch.dtype,
    clip: RangeKind = "none",
    block_size: int = 128,
) -> Coded:
    """Codes of one weight (algorithm 1); the arithmetic is done in the weight's dtype.

    Args:
        weight: (out, in) float, dead inputs zeroed.
        params: of the weight; None fits those of each period of columns when its first one is coded
            (inputs must then be coded in their own order, or have params of their own each).
        stored: the dtype a loader decodes to: what it rounds counts as error.
    """

    def fit(ahead: Tensor, column: int) -> Params:
        return fit_range(grid, ahead, clip, stored)

    coder = GridColumns(grid, inputs.order, stored, params, fit if params is None else None)
    codes = code_in_order(weight, inputs.factor, inputs.order, coder, block_size)
    return QTensor(grid, codes, coder.params())


def error_cost(inputs: Inputs) -> Tensor:
    """(in,) float64: what a squared error of each input costs once the inputs after it have made up
    for it.
    """
    found = torch.empty_like(inputs.factor.diagonal())
    found[inputs.order] = inputs.factor.diagonal().square().reciprocal()
    return found


def fit_range(
    grid: AnyGrid,
    weight: Tensor,
    clip: RangeKind,
    stored: torch.dtype,
    importance: Tensor | None = None,
) -> Params:
    """Grid params of a weight, as they will be stored.

    Args:
        weight: (out, in) float.
        clip: "none" or "mse", see `GPTQ`; zero is always in the range.
        importance: (in,) of each input's squared error, for grids that weigh them.
    """
    weights = None if importance is None else importance.to(weight.dtype)
    if clip == "none" or not isinstance(grid, RangedGrid):
        plain: Params = grid.stored(grid.fit(weight, weights), stored)
        return plain
    low, high = grid.ends(weight)  # (out, groups) each

    def shrunk(i: int) -> Params:
        factor = 1 - i / 100
        params: Params = grid.stored(grid.from_range(low * factor, high * factor), stored)
        return params

    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        found = _searched(grid, weight, stored)
        if found is not None:
            return found
    best = shrunk(0)
    smallest = _distance(grid, weight, best)
    for i in range(1, _CLIP_STEPS):
        tried = shrunk(i)
        error = _distance(grid, weight, tried)
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        best = tried.where(better, best)
    return best


def _searched(grid: AnyGrid, weight: Tensor, stored: torch.dtype) -> Params | None:
    """`fit_range` with "mse" in compiled code, some rows at a time; None where there is none."""
    if not isinstance(grid, LinearGrid) or grid.shifted or not isinstance(grid, RangedGrid):
        return None
    size, parts = grid.group(weight.shape[1]), []
    for rows in torch.split(weight, max(1, _RANGES // (weight.shape[1] // size))):
        low, high = grid.ends(rows)
        tried: list[Params] = []
        for i in range(_CLIP_STEPS):
            factor = 1 - i / 100
            tried.append(grid.stored(grid.from_range(low * factor, high * factor), stored))
        forms = [grid.linear(p) for p in tried]
        scale = torch.stack([f.scale.flatten() for f in forms])
        zero = torch.stack([f.zero.flatten() for f in forms])
        best = least_range(rows.reshape(-1, size), scale, zero, (1 << grid.bits) - 1)
        if best is None:
            return None
        parts.append(picked(tried, best))
    return stacked(parts)


def _distance(grid: RangedGrid[Any], weight: Tensor, params: Params) -> Tensor:
    """(out, groups): what rounding to nearest does to each group."""
    delta = grid.decode(grid.encode(weight, params), params) - weight
    return grid.grouped(delta).abs().pow(_CLIP_NORM).sum(-1)


def _split(q: Coded, rows: Sequence[int]) -> list[Coded]:
    """The row-wise parts of a stacked weight."""
    if len(rows) == 1:
        return [q]
    out, at = [], 0
    for count in rows:
        here = slice(at, at + count)
        out.append(QTensor(q.grid, q.codes[here].clone(), q.params.rows(here)))
        at += count
    return out


def cost(method: GPTQ, shapes: Shapes) -> Cost:
    """See `column_cost`."""
    return column_cost(method.walk, shapes)
