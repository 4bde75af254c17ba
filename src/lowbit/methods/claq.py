"""CLAQ (arXiv 2405.17233): a codebook for every input column by K-means, inside GPTQ's column loop.

For each column c of the weight, from left to right (section 3.2, algorithm 1),

    levels_c = K-means of w_c with 2 ** bits_c centres
    q_c = nearest of levels_c,    then GPTQ's compensation of the columns to come

Columns are ranked by their outliers (section 3.3): by the number of weights with |w| >= S mean|W|,
S = 13. The first ones get ``upper`` bits (adaptive precision), and the first tenth keeps 2.8 times
the mean share of its largest weights in floating point, the others 0.8 times (outlier reservation).

K-means here is solved on sorted values without random starts; the paper starts it at random. Beyond
the paper: other rankings, and bits given one by one within a matrix or over the model.

Helpers: `_columns`, `_hessian` and `_sites` (as in `gptq`), `_coder` (a column on any grid),
`_outliers` (what stays in floating point), `_bit_budget` (bits one by one; over the model by its
stage `Allocate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, Coded, ColumnGrid, Params, QTensor, RangedGrid
from ..model.block import Block
from ._bit_budget import LEAST, Allocate, bit_gains, greedy_widths
from ._coder import Fit, GridColumns
from ._columns import Coder, code_in_order
from ._hessian import Inputs, Walk, column_cost
from ._outliers import OutlierSelector, Reserving
from ._parts import Part, whole
from ._sites import Found, solve_sites
from .cost import Cost, Shapes, Work

Allocation = Literal["outliers", "saliency", "greedy"]
Scope = Literal["matrix", "model"]
Reserve = Literal["label", "two_sided", "official"]
Levels = Literal["sequential", "refined", "precomputed"]

# A tenth of the columns keep 1.4 %, the others 0.4 %, where the mean is 0.5 %.
_TOP_COLUMNS, _TOP_RATE, _OTHER_RATE = 0.1, 2.8, 0.8
_NOMINAL = 14  # bits that a kept weight costs in the paper's count, its index not counted
_REFINING = 3  # Lloyd steps
_PERIOD = 128  # of the published code's slip: rates are looked up by the place in a block

Remarks = dict[str, list[str]]


@dataclass(frozen=True)
class CLAQ:
    """The knobs of CLAQ. The defaults are the paper's single precision; a grid of codebooks per
    column goes with it.

    Attributes:
        adaptive_bits: added to the average width by giving some columns ``upper`` bits, 0.1 for the
            paper's 2.1-bit setting.
        upper: the larger of the two widths.
        allocation: which columns: "outliers" by the number of weights of at least ``threshold``
            times the mean magnitude, as published, ties by saliency; "saliency" by the mean of w^2
            / u^2, u the column's element of the factored inverse Hessian; "greedy" gives single
            bits, from 2 to ``upper``, where they lower the loss of clustering most.
        scope: where the budget is met: in every "matrix", as published, or, greedily, over the
            whole "model".
        least_gain: the loss that a stored bit must save under scope "model"; 0 has a first pass
            over the model find it. The average it leads to is met there, on the float model's
            activations, and nearly so when it is used.
        threshold: S of the paper.
        outlier_bits: kept weights, as the paper counts: 0.07 for 0.5 % of them. A tenth of the
            columns keeps 2.8 times the mean rate, the others 0.8 times.
        reserve: "label" keeps just that many, the largest by magnitude; "two_sided" so many at both
            ends, and one; "official" also looks the rate up by the column's place in its block of
            128, as the published code does.
        cluster_reserved: K-means also sees the weights that are kept (as published).
        levels: "sequential" clusters each column as error compensation has left it (as published);
            "precomputed" clusters all columns before the loop, at once; "refined" adds Lloyd steps
            to that.
        act_order, true_sequential, damping, block_size, rows: as in `GPTQ`.

    On an affine grid, which has one width and its own levels, only outlier reservation applies.

    Raises:
        LowbitError: an option is out of range, or a budget that no allocation can meet.
    """

    adaptive_bits: float = 0.0
    upper: int = 4
    allocation: Allocation = "outliers"
    scope: Scope = "matrix"
    least_gain: float = 0.0
    threshold: float = 13.0
    outlier_bits: float = 0.0
    reserve: Reserve = "label"
    cluster_reserved: bool = True
    levels: Levels = "sequential"
    act_order: bool = True
    true_sequential: bool = True
    damping: float = 0.01
    block_size: int = 128
    rows: int = 0

    def __post_init__(self) -> None:
        self.walk.check(self.block_size)
        if not 2 <= self.upper <= 8 or not self.threshold > 0:
            raise LowbitError("claq needs upper from 2 to 8 bits and threshold > 0.")
        if not 0 <= self.adaptive_bits <= self.upper or not 0 <= self.outlier_bits <= _NOMINAL / 4:
            raise LowbitError(
                "claq needs adaptive_bits from 0 to upper and outlier_bits from 0 to "
                f"{_NOMINAL / 4:g}, a quarter of all weights."
            )
        for value, known, what in (
            (self.allocation, Allocation, "allocation"),
            (self.scope, Scope, "scope"),
            (self.reserve, Reserve, "reserve"),
            (self.levels, Levels, "levels"),
        ):
            if value not in get_args(known):
                raise LowbitError(
                    f"claq.{what} must be one of {', '.join(get_args(known))}, got {value!r}."
                )
        if self.scope == "model" and self.allocation != "greedy":
            raise LowbitError(
                'claq.scope = "model" is for claq.allocation = "greedy": the other allocations '
                "rank the columns of one matrix."
            )
        if not (math.isfinite(self.least_gain) and self.least_gain >= 0):
            raise LowbitError("claq needs a finite least_gain >= 0.")

    @property
    def needs_survey(self) -> bool:
        """Whether `least_gain` has to be found before the first block."""
        return self.scope == "model" and self.adaptive_bits > 0 and not self.least_gain

    @property
    def outlier_rate(self) -> float:
        """The share of weights kept, as far as columns are long enough for it."""
        mean = self.outlier_bits / _NOMINAL
        return mean if self.reserve == "label" else 2 * mean

    @property
    def walk(self) -> Walk:
        """How a block is gone through."""
        return Walk("claq", self.rows, self.damping, self.act_order, self.true_sequential)

    def check(self, grid: AnyGrid) -> None:
        """Raise LowbitError if the method cannot code on this grid or meet its budget there."""
        if isinstance(grid, RangedGrid):
            if self.adaptive_bits:
                raise LowbitError(
                    'claq.adaptive_bits needs a codebook per column: write codebook = "column" in '
                    "the recipe."
                )
            if not self.outlier_bits:
                raise LowbitError(
                    "claq on a uniform grid keeps outliers or does nothing of its own: set "
                    'claq.outlier_bits, or codebook = "column".'
                )
            return
        if not isinstance(grid, ColumnGrid) or not grid.scales_with_inputs:
            raise LowbitError(f"claq needs a codebook per column, not {grid}: use gptq for others.")
        least = min(LEAST, grid.bits) if self.allocation == "greedy" else grid.bits
        if self.adaptive_bits and not least <= grid.bits + self.adaptive_bits <= self.upper:
            raise LowbitError(
                f"claq cannot average {grid.bits + self.adaptive_bits:g} bits with columns of "
                f"{least} to {self.upper} bits: "
                "change claq.adaptive_bits or claq.upper."
            )

    @torch.no_grad()
    def __call__(self, block: Block) -> Block:
        for grid in block.grids.values():
            self.check(grid)
        return solve_sites(block, self.walk, _by_linear, self._part)

    def _part(self, block: Block, part: Part, inputs: Inputs | None) -> Found:
        """Codes of whole linears, one by one."""
        remarks: Remarks = {}
        if inputs is None:
            return Found([block.nearest(s.linear) for s in part])
        codes = [self._linear(block, s.linear, inputs, remarks) for s in part]
        return Found(codes, [(what, name) for what, names in remarks.items() for name in names])

    def _linear(self, block: Block, name: str, inputs: Inputs, remarks: Remarks) -> Coded:
        grid, weight = block.grids[name], block.weight(name).masked_fill(inputs.dead, 0)
        ordered, diagonal = weight[:, inputs.order], inputs.factor.to(weight.dtype).diagonal()
        threshold = self.threshold if self.allocation == "outliers" else None
        score = column_scores(ordered, diagonal, threshold)
        kept = None
        if self.outlier_bits:
            kept = self._selector(block.name, name, len(weight), score, remarks)
        if isinstance(grid, ColumnGrid):
            widths = self._widths(grid.bits, ordered, diagonal, score)
            if (
                self.adaptive_bits
                and self.scope == "matrix"
                and int(widths.sum()) == grid.bits * len(widths)
            ):
                what = (
                    f"adaptive_bits = {self.adaptive_bits:g} is less than one of {len(widths)} "
                    "columns needs, none got more"
                )
                remarks.setdefault(what, []).append(name)
            fit = self._levels(grid, ordered, widths, kept, block.stored)
            columns = GridColumns(grid, inputs.order, block.stored, fit=fit)
        else:
            params = block.params.get(name)
            if params is None:
                # The range need not reach what is kept.
                rest = weight if kept is None else _without(weight, kept, inputs.order)
                params = grid.stored(grid.fit(rest), block.stored)
            columns = GridColumns(grid, inputs.order, block.stored, params)
        coder: Coder = columns if kept is None else Reserving(columns, kept, block.stored)
        codes = code_in_order(weight, inputs.factor, inputs.order, coder, self.block_size)
        outliers = None if kept is None else kept.outliers(inputs.order)
        return QTensor(grid, codes, columns.params(), outliers)

    def _levels(
        self,
        grid: ColumnGrid[Any],
        weight: Tensor,
        widths: Tensor,
        kept: OutlierSelector | None,
        stored: torch.dtype,
    ) -> Fit:
        """How the levels of a column are chosen when it comes.

        Args:
            weight: (rows, columns) in coding order, before any error was made up for.
            widths: (columns,) int64 bits of each column, in coding order.
        """
        bits: list[int] = widths.tolist()
        grids = {b: grid.with_bits(b) for b in set(bits)}
        table = None if self.levels == "sequential" else grid.fit_columns(weight, widths)

        def fit(ahead: Tensor, column: int) -> Params:
            values = ahead  # (rows, 1)
            if kept is not None and not self.cluster_reserved:
                left = torch.ones(len(values), dtype=torch.bool, device=values.device)
                left[kept.pick(column, values[:, 0])] = False
                values = values[left]
            own = grids[bits[column]]
            if table is None:
                return _held(own, own.fit(values), stored)
            steps = _REFINING if self.levels == "refined" else 0
            return _held(own, own.refined(table, column, values, steps), stored)

        return fit

    def _widths(self, bits: int, weight: Tensor, diagonal: Tensor, score: Tensor) -> Tensor:
        """(columns,) int64 bits of each column, in coding order."""
        columns, least = weight.shape[1], min(LEAST, bits)
        if self.scope == "model" and self.adaptive_bits:
            if not self.least_gain:
                raise LowbitError(
                    'claq.scope = "model" needs claq.least_gain, which a pass over the model finds '
                    "before the first block."
                )
            gains = bit_gains(weight, diagonal, least, self.upper)
            return least + (gains >= self.least_gain).sum(1)
        if self.allocation == "greedy" and self.adaptive_bits:
            total = round((bits + self.adaptive_bits) * columns)
            return greedy_widths(weight, diagonal, total, least, self.upper)
        widths = torch.full((columns,), bits, dtype=torch.int64, device=weight.device)
        if self.adaptive_bits:
            widths[score[: round(columns * self.adaptive_bits / (self.upper - bits))]] = self.upper
        return widths

    def _selector(
        self, prefix: str, name: str, rows: int, score: Tensor, remarks: Remarks
    ) -> OutlierSelector:
        """What to keep of each column, columns in coding order, best ranks first in ``score``."""
        columns, mean = len(score), self.outlier_bits / _NOMINAL
        high = torch.zeros(columns, dtype=torch.bool)
        high[score[: round(columns * _TOP_COLUMNS)].cpu()] = True
        rates = torch.where(high, _TOP_RATE * mean, _OTHER_RATE * mean).tolist()
        if self.reserve == "official":
            rates = [rates[c % _PERIOD] for c in range(columns)]
        least = 1 if self.reserve == "label" else 0
        counts = [max(least, round(rows * r)) for r in rates]
        most = max(counts) if self.reserve == "label" else 2 * max(counts) + 1
        if most >= rows:
            raise LowbitError(
                f"claq.outlier_bits = {self.outlier_bits:g} keeps {most} weights of some columns "
                f"of '{prefix}.{name}', which have only {rows}: lower it."
            )
        kept = sum(counts) / (rows * columns)
        if self.reserve == "label" and kept > 2 * mean:
            what = (
                f"columns of {rows} weights keep at least one each, {kept:.1%} instead of "
                f"{mean:.1%}"
            )
            remarks.setdefault(what, []).append(name)
        return OutlierSelector(counts, self.reserve != "label")


def _by_linear(block: Block, names: Sequence[str], parts: int) -> list[Part]:
    """A site, or each of its linears where it is to be cut: the levels of a column are those of all
    its rows.
    """
    return [whole(block, names)] if parts == 1 else [whole(block, [n]) for n in names]


def column_scores(weight: Tensor, diagonal: Tensor, threshold: float | None) -> Tensor:
    """The columns, those first that deserve bits most.

    Args:
        weight: (rows, columns). diagonal: (columns,) of the factored inverse Hessian, in the same
            order.
        threshold: rank by the number of weights of at least so many times the mean magnitude, ties
            by saliency; None by saliency alone.

    Returns:
        (columns,) int64.
    """
    saliency = weight.double().square().mean(0) / diagonal.double().square()
    order = saliency.argsort(descending=True, stable=True)
    if threshold is not None:
        extreme = (weight.abs() >= threshold * weight.abs().mean()).sum(0)
        order = order[extreme[order].argsort(descending=True, stable=True)]
    return order


def _held(grid: ColumnGrid[Any], params: Params, stored: torch.dtype) -> Params:
    held: Params = grid.stored(params, stored)
    return held


def _without(weight: Tensor, kept: OutlierSelector, order: Tensor) -> Tensor:
    """The (out, in) weight with zeros for what would be kept if no error had to be made up for."""
    rest = weight.clone()
    for at, column in enumerate(order.tolist()):
        rest[kept.pick(at, weight[:, column]), column] = 0
    return rest


def cost(method: CLAQ, shapes: Shapes) -> Cost:
    """See `column_cost`; and the survey's pass over the float model, whose Hessians of all sites
    wait together.
    """
    own = column_cost(method.walk, shapes, by_rows=False)
    if not method.needs_survey:
        return own
    tokens = shapes.learned(method.walk.rows) * shapes.rows.length
    seen = sum(2.0 * tokens * n**2 for n in shapes.widths)
    # Site by site: the largest is one rank's.
    cubes = [2.0 * n**3 for n in shapes.widths]
    factored = max(shapes.rows.part(sum(cubes)), *cubes) if cubes else 0.0
    passing = shapes.forward(shapes.rows.mine(shapes.rows.count))
    squares = sum(8 * n * n for n in shapes.widths)
    survey = passing + shapes.grams(seen) + Work(single=factored) + shapes.rows.summed(squares)
    return replace(own, held=own.held + squares, parts={**own.parts, "survey": survey})


def check(method: CLAQ, grid: AnyGrid) -> None:
    """See `CLAQ.check`."""
    method.check(grid)


def before(method: CLAQ, grid: AnyGrid) -> Allocate | None:
    """The stage that finds what a bit must gain, where the budget is the model's."""
    if not method.needs_survey:
        return None

    def priced(gain: float) -> CLAQ:
        return replace(method, least_gain=gain)

    return Allocate(method, method.walk, method.upper, method.adaptive_bits, priced)


def extra_bytes(method: CLAQ, grid: AnyGrid, rows: int, width: int) -> float:
    """Bytes of a weight's wider columns, their larger books and permutation, and of its outliers
    with their indices.
    """
    share = method.adaptive_bits / max(1, method.upper - grid.bits)  # of columns that are wider
    levels = (1 << method.upper) - (1 << grid.bits)
    books = share * width * 2 * levels + (2 * width if share else 0)
    kept = method.outlier_rate * rows * width * 4 + (4 * rows if method.outlier_bits else 0)
    return method.adaptive_bits * rows * width / 8 + books + kept


def outliers(method: CLAQ) -> str | None:
    """The option by which weights are kept in floating point; None if none are."""
    return "claq.outlier_bits" if method.outlier_bits else None
