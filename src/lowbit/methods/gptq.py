"""GPTQ (arXiv 2210.17323): nearest rounding column by column, every error made up for by the columns that are still free.

The loss of a linear is ||(W - Q) X||^2 on its inputs X as the quantized prefix produces them. Beyond the paper, from the code
its authors published later: inputs collected site by site (on by default), grids of groups fixed in advance, columns in the
order of their activations' size, and ranges that minimise the rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, AffineParams, QTensor
from ..model.block import Block, Call
from ._columns import code_columns, inverse_factor

Clip = Literal["none", "mse"]

_RETRIES = 3
_LEAST_RETRIED_DAMPING = 1e-2
_CLIP_STEPS, _CLIP_NORM = 80, 2.4  # factors 1 - i/100 and the norm of the error, as in the published code


@dataclass(frozen=True)
class GPTQ:
    """The knobs of GPTQ. The defaults are the published settings but for ``true_sequential``; the preset `gptq-paper` has that too.

    Attributes:
        damping: share of the Hessian's mean diagonal that is added to its diagonal. If it is too little for the Hessian to be
            inverted, ten times as much is tried, and so on.
        act_order: code the inputs with the largest activations first. Implies ``static_groups``.
        static_groups: fix the grids of all groups from the original weights; otherwise a group's grid is fitted to what its
            weights have become when its first column is coded.
        true_sequential: collect the inputs of a site after the sites before it are coded; otherwise in one pass before any.
        block_size: columns updated together; changes the speed, not the result.
        clip: how the range of a group is found: "none" takes minimum and maximum, "mse" shrinks them to where the rounded
            weights differ least.
        rows: calibration rows used, at most; 0 means all.

    Linears whose ranges are fixed already (by a clip before this method) keep them. Coded ones are left alone.

    Raises:
        LowbitError: an option is out of range; a Hessian is not finite, or not invertible with any damping tried.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    block_size: int = 128
    clip: Clip = "none"
    rows: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0) or self.block_size < 1 or self.rows < 0:
            raise LowbitError("gptq needs a finite damping >= 0, block_size >= 1 and rows >= 0.")
        if self.clip not in ("none", "mse"):
            raise LowbitError(f"gptq.clip must be none or mse, got {self.clip!r}.")

    @torch.no_grad()
    def __call__(self, block: Block) -> Block:
        rows = min(self.rows or block.tuned_rows, block.tuned_rows)
        free = [tuple(n for n in site.reads if n not in block.coded) for site in block.wiring.sites]
        steps = [[names] for names in free if names]
        if not self.true_sequential:
            steps = [[names for step in steps for names in step]] if steps else []
        trouble: list[str] = []
        for step in steps:
            block.announce(f"gptq: inputs of {', '.join(name for names in step for name in names)}")
            hessians = input_hessians(block, [names[0] for names in step], rows)
            for names in step:
                block.announce(f"gptq: codes of {', '.join(names)}")
                found = self._site(block, names, hessians.pop(names[0]), trouble)
                block = block.ranged({n: q.params for n, q in found.items()}).solved(found)
        return block.noted(trouble=[*block.notes.get("trouble", ()), *trouble]) if trouble else block

    def _site(self, block: Block, names: Sequence[str], hessian: Tensor, trouble: list[str]) -> dict[str, QTensor]:
        """Codes for linears that read the same inputs, whose (inputs, inputs) Hessian is given."""
        label = f"{block.name}.{names[0]}"
        if not bool(torch.isfinite(hessian).all()):
            raise LowbitError(
                f"the inputs of '{label}' are not finite on the calibration rows: nothing can be learned from them. "
                "See whether 'lowbit eval' finds the float model's perplexity finite."
            )
        if not bool(hessian.any()):
            trouble.append(f"gptq: '{label}' saw no input but zeros; rounded to nearest what reads it")
            return {n: _nearest(block, n, self.clip) for n in names}
        # An input that is always zero is tied to no other: any positive diagonal will do for it, and the mean of the living
        # ones leaves the damping, a share of the mean, what it is without the dead.
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        living = torch.where(dead, diagonal.sum() / (~dead).sum(), diagonal)
        inputs = torch.arange(len(living), device=living.device)
        order = living.argsort(descending=True, stable=True) if self.act_order else inputs
        factor = self._factor(hessian[order][:, order], living[order], label, trouble)
        out: dict[str, QTensor] = {}
        bundles: dict[tuple[Affine, bool], list[str]] = {}
        for name in names:
            bundles.setdefault((block.grids[name], name in block.params), []).append(name)
        for (grid, ranged), members in bundles.items():
            weight = torch.cat([block.weight(n) for n in members]).masked_fill(dead, 0)
            params: AffineParams | None = None
            if ranged:
                fixed = [block.params[n] for n in members]
                params = AffineParams(torch.cat([p.scale for p in fixed]), torch.cat([p.zero_point for p in fixed]))
            elif self.static_groups or self.act_order:
                params = fit_range(grid, weight, self.clip, block.stored)
            coded = solve(weight, factor, grid, params, block.stored, order=order, clip=self.clip, block_size=self.block_size)
            out.update(zip(members, _split(coded, [len(block.weight(n)) for n in members]), strict=True))
        return out

    def _factor(self, hessian: Tensor, diagonal: Tensor, label: str, trouble: list[str]) -> Tensor:
        """`inverse_factor` of a Hessian (changed in place) with a damped diagonal, ten times as much as often as it takes."""
        damping = self.damping
        failed: list[float] = []
        while len(failed) <= _RETRIES:
            hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
            factor = inverse_factor(hessian)
            if factor is not None:
                if failed:
                    trouble.append(f"gptq: the Hessian of '{label}' could not be inverted with damping {self.damping:g}; took {damping:g}")
                return factor
            failed.append(damping)
            damping = max(10 * damping, _LEAST_RETRIED_DAMPING)
        raise LowbitError(
            f"the Hessian of '{label}' could not be inverted, not even with damping {failed[-1]:g}: calibrate on more rows, or raise gptq.damping."
        )


@torch.no_grad()
def input_hessians(block: Block, linears: Sequence[str], rows: int) -> dict[str, Tensor]:
    """(2/n) sum x x^T over the n tokens that reach each linear (GPTQ, section 2), in float64.

    The tokens come from the first ``rows`` rows of the quantized stream, through the block with its coded weights decoded,
    and count as they meet the weight.

    Returns:
        linear -> (inputs, inputs) on the block's device; zeros for a linear that no token reaches.
    """
    sums: dict[str, Tensor] = {}
    for name in linears:
        width = block.weight(name).shape[1]
        sums[name] = torch.zeros(width, width, dtype=torch.float64, device=block.device)
    seen = dict.fromkeys(linears, 0)

    def visit(name: str, call: Call) -> None:
        x = block.entering(name, call.args[0]).flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sums[name] += x.T @ x
        seen[name] += len(x)

    replace(block, weights=block.decoded()).observe(linears, block.xq, rows, visit)
    return {name: total * (2 / max(1, seen[name])) for name, total in sums.items()}


def fit_range(grid: Affine, weight: Tensor, clip: Clip, stored: torch.dtype) -> AffineParams:
    """Grid parameters for each group of a weight, scales rounded to the dtype in which they will be stored.

    Args:
        weight: (out, in) float.
        clip: "none" or "mse", see `GPTQ`; zero is always in the range.
    """
    best = grid.stored(grid.fit(weight), stored)
    if clip == "none":
        return best
    least = _distance(grid, weight, best)
    for i in range(1, _CLIP_STEPS):
        tried = grid.stored(grid.fit(weight, 1 - i / 100), stored)
        error = _distance(grid, weight, tried)
        better = error < least
        least = torch.where(better, error, least)
        best = AffineParams(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero_point, best.zero_point))
    return best


def _distance(grid: Affine, weight: Tensor, params: AffineParams) -> Tensor:
    """(out, groups): what rounding to nearest does to each group."""
    delta = grid.decode(grid.encode(weight, params), params) - weight
    return grid.grouped(delta).abs().pow(_CLIP_NORM).sum(-1)


class _AffineColumns:
    """Codes columns on an affine grid; the grids of groups not given are fitted when their first column comes.

    Args:
        grid: of the whole weight, ``width`` inputs wide.
        groups: the group of each column, in coding order.
        params: of all groups, or None; then the coding order must be that of the inputs.
    """

    def __init__(self, grid: Affine, width: int, groups: Sequence[int], params: AffineParams | None, stored: torch.dtype, clip: Clip) -> None:
        self.period = 1 if params else grid.group(width)
        self._row = replace(grid, group_size=None)  # one scale per row of what it is given: a column, or a group's columns
        self._groups, self._stored, self._clip = groups, stored, clip
        self._params: dict[int, AffineParams] = {}
        if params:
            for i in range(params.scale.shape[1]):
                self._params[i] = AffineParams(params.scale[:, i : i + 1], params.zero_point[:, i : i + 1])

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        group = self._groups[column]
        if group not in self._params:
            ahead = current[:, column : column + self.period]
            self._params[group] = fit_range(self._row, ahead, self._clip, self._stored)
        params = self._params[group]
        codes = self._row.encode(values[:, None], params)
        return codes[:, 0], self._row.decode(codes, params)[:, 0].to(self._stored).to(values.dtype)

    def params(self) -> AffineParams:
        """Scale and zero point of all groups, each (rows, groups)."""
        ordered = [self._params[i] for i in range(len(self._params))]
        return AffineParams(torch.cat([p.scale for p in ordered], 1), torch.cat([p.zero_point for p in ordered], 1))


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
        params: grid parameters, each (out, groups); None fits each group's when its first column is coded.
        stored: the dtype a loader decodes to: what it rounds counts as error.
        order: (in,) int64, the inputs in coding order; without ``params`` it must be ascending.
    """
    width = weight.shape[1]
    groups: list[int] = (order // grid.group(width)).tolist()
    coder = _AffineColumns(grid, width, groups, params, stored, clip)
    coded = code_columns(weight[:, order], factor.to(weight.dtype), coder, block_size)
    codes = torch.empty_like(coded)
    codes[:, order] = coded
    return QTensor(grid, codes, params or coder.params())


def _nearest(block: Block, linear: str, clip: Clip) -> QTensor:
    weight, grid = block.weight(linear), block.grids[linear]
    params = block.params[linear] if linear in block.params else fit_range(grid, weight, clip, block.stored)
    return QTensor(grid, grid.encode(weight, params), params)


def _split(q: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """The row-wise parts of a stacked weight."""
    columns = (torch.split(t, list(rows)) for t in (q.codes, q.params.scale, q.params.zero_point))
    return [QTensor(q.grid, codes.clone(), AffineParams(scale.clone(), zero.clone())) for codes, scale, zero in zip(*columns, strict=True)]
