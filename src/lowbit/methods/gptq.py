"""GPTQ (arXiv 2210.17323): nearest rounding column by column, every error made up for by the
columns that are still free.

The loss of a linear is ||(W - Q) X||^2 on its inputs X as the quantized prefix produces them.
Beyond the paper, from the code its authors published later: inputs collected site by site (on by
default), grids of groups fixed in advance, columns in the order of their activations' size, and
ranges that minimise the rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import (
    Affine,
    AffineParams,
    Codebook,
    CodebookParams,
    Grid,
    KQuant,
    KQuantParams,
    QTensor,
)
from ..model.block import Block
from ._books import ColumnBooks, SharedBooks
from ._columns import Steps, code_in_order, least_range
from ._hessian import Inputs, solve_sites

Clip = Literal["none", "mse"]

# Factors 1 - i/100 and the norm of the error, as in the published code.
_CLIP_STEPS, _CLIP_NORM = (
    80,
    2.4,
)
_RANGES = 1 << 16  # groups whose ranges are searched at a time: their tables stay small


@dataclass(frozen=True)
class GPTQ:
    """The knobs of GPTQ. The defaults are the published settings but for ``true_sequential``; the
    preset `gptq-paper` has that too.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to its diagonal. If it is too
            little for the Hessian to be inverted, ten times as much is tried, and so on.
        act_order: code the inputs with the largest activations first. Implies ``static_groups``.
        static_groups: fix the grids of all groups from the original weights; otherwise a group's
            grid is fitted to what its weights have become when its first column is coded.
        true_sequential: collect the inputs of a site after the sites before it are coded; otherwise
            in one pass before any.
        block_size: columns updated together; changes the speed, not the result.
        clip: how the range of a group is found: "none" takes minimum and maximum, "mse" shrinks
            them to where the rounded weights differ least.
        rows: calibration rows used, at most; 0 means all.

    On K-quants scales are fixed in advance as with ``static_groups``, inputs weighted by what their
    error costs; ``clip`` does not apply. On codebooks only the order, the damping and the inputs'
    collection apply: levels are chosen by K-means.

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
    clip: Clip = "none"
    rows: int = 0

    def __post_init__(self) -> None:
        if (
            not (math.isfinite(self.damping) and self.damping >= 0)
            or self.block_size < 1
            or self.rows < 0
        ):
            raise LowbitError("gptq needs a finite damping >= 0, block_size >= 1 and rows >= 0.")
        if self.clip not in ("none", "mse"):
            raise LowbitError(f"gptq.clip must be none or mse, got {self.clip!r}.")

    @torch.no_grad()
    def __call__(self, block: Block) -> Block:
        return solve_sites(
            block,
            "gptq",
            self.rows,
            self.damping,
            self.act_order,
            self.true_sequential,
            self._site,
            self._nearest,
        )

    def _nearest(self, block: Block, linear: str) -> QTensor:
        weight, grid = block.weight(linear), block.grids[linear]
        if linear in block.params or not isinstance(grid, Affine):
            params = block.range_of(linear)
        else:
            params = fit_range(grid, weight, self.clip, block.stored)
        return QTensor(grid, grid.encode(weight, params), params)

    def _site(self, block: Block, names: Sequence[str], inputs: Inputs) -> dict[str, QTensor]:
        """Codes for linears that read the same inputs: those on the same affine grid in one loop,
        others one by one.
        """
        out: dict[str, QTensor] = {}
        bundles: dict[tuple[Affine, bool], list[str]] = {}
        for name in names:
            grid = block.grids[name]
            if isinstance(grid, Affine):
                bundles.setdefault((grid, name in block.params), []).append(name)
            else:
                weight = block.weight(name).masked_fill(inputs.dead, 0)
                if isinstance(grid, KQuant):
                    out[name] = solve_blocks(
                        weight, inputs, grid, block.params.get(name), block.stored, self.block_size
                    )
                else:
                    out[name] = solve_books(weight, inputs, grid, block.stored, self.block_size)
        for (grid, ranged), members in bundles.items():
            weight = torch.cat([block.weight(n) for n in members]).masked_fill(inputs.dead, 0)
            params: AffineParams | None = None
            if ranged:
                fixed = [block.params[n] for n in members]
                params = AffineParams(
                    torch.cat([p.scale for p in fixed]), torch.cat([p.zero_point for p in fixed])
                )
            elif self.static_groups or self.act_order:
                params = fit_range(grid, weight, self.clip, block.stored)
            coded = solve(
                weight,
                inputs.factor,
                grid,
                params,
                block.stored,
                order=inputs.order,
                clip=self.clip,
                block_size=self.block_size,
            )
            out.update(
                zip(members, _split(coded, [len(block.weight(n)) for n in members]), strict=True)
            )
        return out


def fit_range(grid: Affine, weight: Tensor, clip: Clip, stored: torch.dtype) -> AffineParams:
    """Grid parameters for each group of a weight, scales rounded to the dtype in which they will be
    stored.

    Args:
        weight: (out, in) float.
        clip: "none" or "mse", see `GPTQ`; zero is always in the range.
    """
    best = grid.stored(grid.fit(weight), stored)
    if clip == "none":
        return best
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        found = _searched(grid, weight, stored)
        if found is not None:
            return found
    least = _distance(grid, weight, best)
    for i in range(1, _CLIP_STEPS):
        tried = grid.stored(grid.fit(weight, 1 - i / 100), stored)
        error = _distance(grid, weight, tried)
        better = error < least
        least = torch.where(better, error, least)
        best = AffineParams(
            torch.where(better, tried.scale, best.scale),
            torch.where(better, tried.zero_point, best.zero_point),
        )
    return best


def _searched(grid: Affine, weight: Tensor, stored: torch.dtype) -> AffineParams | None:
    """`fit_range` with "mse" in compiled code, some rows at a time; None where there is none."""
    size, parts = grid.group(weight.shape[1]), []
    for rows in torch.split(weight, max(1, _RANGES // (weight.shape[1] // size))):
        tried = [grid.stored(grid.fit(rows, 1 - i / 100), stored) for i in range(_CLIP_STEPS)]
        scale, zero = (
            torch.stack([p.scale.flatten() for p in tried]),
            torch.stack([p.zero_point.flatten() for p in tried]),
        )
        best = least_range(rows.reshape(-1, size), scale, zero, grid.top)
        if best is None:
            return None
        shape = tried[0].scale.shape
        parts.append(
            AffineParams(*(t.gather(0, best[None])[0].reshape(shape) for t in (scale, zero)))
        )
    return AffineParams(
        torch.cat([p.scale for p in parts]), torch.cat([p.zero_point for p in parts])
    )


def _distance(grid: Affine, weight: Tensor, params: AffineParams) -> Tensor:
    """(out, groups): what rounding to nearest does to each group."""
    delta = grid.decode(grid.encode(weight, params), params) - weight
    return grid.grouped(delta).abs().pow(_CLIP_NORM).sum(-1)


class AffineColumns:
    """Codes columns on an affine grid; the grids of groups not given are fitted when their first
    column comes.

    Args:
        grid: of the whole weight, ``width`` inputs wide.
        groups: the group of each column, in coding order.
        params: of all groups, or None; then the coding order must be that of the inputs.
    """

    def __init__(
        self,
        grid: Affine,
        width: int,
        groups: Sequence[int],
        params: AffineParams | None,
        stored: torch.dtype,
        clip: Clip,
    ) -> None:
        self.period = 1 if params else grid.group(width)
        # One scale per row of what it is given: a column, or a group's columns.
        self._row = replace(grid, group_size=None)
        self._groups, self.stored, self._clip = groups, stored, clip
        self._params: dict[int, AffineParams] = {}
        self._steps: Steps | None = None
        if params:
            scale, zero = (
                params.scale.T.float().contiguous(),
                params.zero_point.T.float().contiguous(),
            )
            self._steps = Steps(scale, zero, torch.tensor(groups, dtype=torch.int32), grid.top)
            for i in range(params.scale.shape[1]):
                self._params[i] = AffineParams(
                    params.scale[:, i : i + 1], params.zero_point[:, i : i + 1]
                )

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        params = self._of(column, current)
        codes = self._row.encode(values[:, None], params)
        return codes[:, 0], self._row.decode(codes, params)[:, 0].to(self.stored).to(values.dtype)

    def _of(self, column: int, current: Tensor) -> AffineParams:
        group = self._groups[column]
        if group not in self._params:
            ahead = current[:, column : column + self.period]
            self._params[group] = fit_range(self._row, ahead, self._clip, self.stored)
        return self._params[group]

    def steps(self, start: int, stop: int, current: Tensor) -> tuple[Steps, int]:
        """As `UniformCoder` has it: all columns where the grids are given, else those of one
        group.
        """
        if self._steps is not None:
            return replace(self._steps, group=self._steps.group[start:stop]), stop
        until, params = (
            min(stop, (start // self.period + 1) * self.period),
            self._of(start, current),
        )
        group = torch.zeros(until - start, dtype=torch.int32)
        return Steps(
            params.scale.T.contiguous(), params.zero_point.T.contiguous(), group, self._row.top
        ), until

    def params(self) -> AffineParams:
        """Scale and zero point of all groups, each (rows, groups)."""
        ordered = [self._params[i] for i in range(len(self._params))]
        return AffineParams(
            torch.cat([p.scale for p in ordered], 1), torch.cat([p.zero_point for p in ordered], 1)
        )


def solve(
    weight: Tensor,
    factor: Tensor,
    grid: Affine,
    params: AffineParams | None,
    stored: torch.dtype,
    *,
    order: Tensor,
    clip: Clip = "none",
    block_size: int = 128,
) -> QTensor:
    """Codes of one weight (GPTQ, algorithm 1); the arithmetic is done in the weight's dtype.

    Args:
        weight: (out, in) float.
        factor: (in, in) from `inverse_factor`, inputs in coding order, in any float dtype.
        params: grid parameters, each (out, groups); None fits each group's when its first column is
            coded.
        stored: the dtype a loader decodes to: what it rounds counts as error.
        order: (in,) int64, the inputs in coding order; without ``params`` it must be ascending.
    """
    width = weight.shape[1]
    groups: list[int] = (order // grid.group(width)).tolist()
    coder = AffineColumns(grid, width, groups, params, stored, clip)
    codes = code_in_order(weight, factor, order, coder, block_size)
    return QTensor(grid, codes, params or coder.params())


def solve_books(
    weight: Tensor, inputs: Inputs, grid: Grid, stored: torch.dtype, block_size: int
) -> QTensor:
    """Codes of one weight on codebooks: those of single columns are chosen when the column comes,
    shared ones before, for the weights that cost most to get wrong.

    Args:
        weight: (out, in) float, dead inputs zeroed.
    """
    if not isinstance(grid, Codebook):
        raise LowbitError(f"the column loop knows no grid like {grid}.")
    if grid.scales_with_inputs:
        widths = torch.full((weight.shape[1],), grid.bits, dtype=torch.int64, device=weight.device)
        books = ColumnBooks(weight[:, inputs.order], widths, stored)
        codes = code_in_order(weight, inputs.factor, inputs.order, books, block_size)
        return QTensor(grid, codes, books.params(inputs.order))
    cost = _cost(weight, inputs)
    params: CodebookParams = grid.stored(grid.fit(weight, weights=cost.expand_as(weight)), stored)
    codes = code_in_order(
        weight,
        inputs.factor,
        inputs.order,
        SharedBooks(grid, params, inputs.order, stored),
        block_size,
    )
    return QTensor(grid, codes, params)


def _cost(weight: Tensor, inputs: Inputs) -> Tensor:
    """(in,): what a squared error of each input costs once the inputs after it have made up for
    it.
    """
    cost = torch.empty(weight.shape[1], dtype=weight.dtype, device=weight.device)
    cost[inputs.order] = inputs.factor.diagonal().square().reciprocal().to(weight.dtype)
    return cost


class KQuantColumns:
    """Codes columns on a K-quant whose params are fixed.

    Args:
        inputs: (in,) int64, the input of each column, in coding order.
    """

    period = 1

    def __init__(
        self, grid: KQuant, params: KQuantParams, inputs: Tensor, stored: torch.dtype
    ) -> None:
        self._grid, self._stored = grid, stored
        scale, offset = grid.steps(params)
        self._scale, self._offset = scale.T.contiguous(), offset.T.contiguous()
        flat = self._scale == 0
        self._inverse = torch.where(flat, 0.0, 1 / torch.where(flat, 1.0, self._scale))
        self._subs: list[int] = (inputs // grid.group_size).tolist()

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        sub, middle = self._subs[column], self._grid.middle
        codes = (
            (values.float() + self._offset[sub])
            .mul_(self._inverse[sub])
            .round_()
            .clamp_(-middle, self._grid.top - middle)
        )
        decoded = (
            (codes * self._scale[sub]).sub_(self._offset[sub]).to(self._stored).to(values.dtype)
        )
        return (codes + middle).to(torch.uint8), decoded


def solve_blocks(
    weight: Tensor,
    inputs: Inputs,
    grid: KQuant,
    params: KQuantParams | None,
    stored: torch.dtype,
    block_size: int,
) -> QTensor:
    """Codes of one weight on a K-quant.

    Args:
        weight: (out, in) float, dead inputs zeroed. params: None fits them for the inputs whose
            errors cost most.
    """
    if params is None:
        params = grid.stored(grid.fit(weight, _cost(weight, inputs)), stored)
    codes = code_in_order(
        weight,
        inputs.factor,
        inputs.order,
        KQuantColumns(grid, params, inputs.order, stored),
        block_size,
    )
    return QTensor(grid, codes, params)


def _split(q: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """The row-wise parts of a stacked weight."""
    columns = (torch.split(t, list(rows)) for t in (q.codes, q.params.scale, q.params.zero_point))
    return [
        QTensor(q.grid, codes.clone(), AffineParams(scale.clone(), zero.clone()))
        for codes, scale, zero in zip(*columns, strict=True)
    ]
