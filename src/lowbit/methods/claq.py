"""CLAQ (arXiv 2405.17233): a codebook for every input column by K-means, inside GPTQ's column loop.

Columns with more extreme weights get more bits (adaptive precision) and keep more of their largest
weights in floating point (outlier reservation). K-means here is solved on sorted values without
random starts; the paper starts it at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, Codebook, Grid, QTensor
from ..grid.kmeans import kmeans
from ..model.block import Block
from ._books import ColumnBooks, Levels, Reserve, Reserving
from ._columns import code_in_order
from ._hessian import Inputs, factored, input_hessians, solve_sites
from .gptq import AffineColumns

Allocation = Literal["outliers", "saliency", "greedy"]
Scope = Literal["matrix", "model"]
Reading = Literal["label", "two_sided", "official"]

# A tenth of the columns keep 1.4 %, the others 0.4 %, where the mean is 0.5 %.
_TOP_COLUMNS, _TOP_RATE, _OTHER_RATE = (
    0.1,
    2.8,
    0.8,
)
_NOMINAL = (
    14  # bits that a weight kept in 16 bits costs in the paper's count, its index not counted
)
_PERIOD = (
    128  # of the published code's slip: rates are looked up by the place in a block of columns
)


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
    reserve: Reading = "label"
    cluster_reserved: bool = True
    levels: Levels = "sequential"
    act_order: bool = True
    true_sequential: bool = True
    damping: float = 0.01
    block_size: int = 128
    rows: int = 0

    def __post_init__(self) -> None:
        if (
            not (math.isfinite(self.damping) and self.damping >= 0)
            or self.block_size < 1
            or self.rows < 0
        ):
            raise LowbitError("claq needs a finite damping >= 0, block_size >= 1 and rows >= 0.")
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
            (self.reserve, Reading, "reserve"),
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

    def check(self, grid: Grid) -> None:
        """Raise LowbitError if the method cannot code on this grid or meet its budget there."""
        if isinstance(grid, Affine):
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
        if not isinstance(grid, Codebook) or not grid.scales_with_inputs:
            raise LowbitError(f"claq needs a codebook per column, not {grid}: use gptq for others.")
        least = min(2, grid.bits) if self.allocation == "greedy" else grid.bits
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
        remarks: dict[str, list[str]] = {}

        def site(at: Block, names: Sequence[str], inputs: Inputs) -> dict[str, QTensor]:
            return {n: self._linear(at, n, inputs, remarks) for n in names}

        done = solve_sites(
            block,
            "claq",
            self.rows,
            self.damping,
            self.act_order,
            self.true_sequential,
            site,
            _nearest,
        )
        told = [f"claq: {', '.join(names)}: {what}" for what, names in remarks.items()]
        return done.noted(trouble=[*done.notes.get("trouble", ()), *told]) if told else done

    def _linear(
        self, block: Block, name: str, inputs: Inputs, remarks: dict[str, list[str]]
    ) -> QTensor:
        grid, weight = block.grids[name], block.weight(name).masked_fill(inputs.dead, 0)
        ordered, factor = weight[:, inputs.order], inputs.factor.to(weight.dtype)
        score = column_scores(
            ordered, factor.diagonal(), self.threshold if self.allocation == "outliers" else None
        )
        reserve = (
            self._reserve(block.name, name, len(weight), score, remarks)
            if self.outlier_bits
            else None
        )
        if isinstance(grid, Codebook):
            widths = self._widths(grid.bits, ordered, factor.diagonal(), score)
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
            books = ColumnBooks(
                ordered,
                widths,
                block.stored,
                reserve,
                cluster_reserved=self.cluster_reserved,
                levels=self.levels,
            )
            codes = code_in_order(weight, factor, inputs.order, books, self.block_size)
            params: Any = books.params(inputs.order)
        else:
            assert isinstance(grid, Affine) and reserve is not None
            params = block.params.get(name)
            if params is None:  # the range need not reach what is kept
                params = grid.stored(
                    grid.fit(_without_reserved(weight, reserve, inputs.order)), block.stored
                )
            groups: list[int] = (inputs.order // grid.group(weight.shape[1])).tolist()
            uniform = AffineColumns(grid, weight.shape[1], groups, params, block.stored, "none")
            codes = code_in_order(
                weight,
                factor,
                inputs.order,
                Reserving(uniform, reserve, block.stored),
                self.block_size,
            )
        return QTensor(grid, codes, params, reserve.outliers(inputs.order) if reserve else None)

    def _widths(self, bits: int, weight: Tensor, diagonal: Tensor, score: Tensor) -> Tensor:
        """(columns,) int64 bits of each column, in coding order."""
        columns = weight.shape[1]
        if self.scope == "model" and self.adaptive_bits:
            if not self.least_gain:
                raise LowbitError(
                    'claq.scope = "model" needs claq.least_gain, which a pass over the model finds '
                    "before the first block."
                )
            return min(2, bits) + (
                bit_gains(weight, diagonal, min(2, bits), self.upper) >= self.least_gain
            ).sum(1)
        if self.allocation == "greedy" and self.adaptive_bits:
            return greedy_widths(
                weight,
                diagonal,
                round((bits + self.adaptive_bits) * columns),
                min(2, bits),
                self.upper,
            )
        widths = torch.full((columns,), bits, dtype=torch.int64, device=weight.device)
        if self.adaptive_bits:
            widths[score[: round(columns * self.adaptive_bits / (self.upper - bits))]] = self.upper
        return widths

    def _reserve(
        self, prefix: str, name: str, rows: int, score: Tensor, remarks: dict[str, list[str]]
    ) -> Reserve:
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
                f"of '{prefix}.{name}', which have only {rows}: "
                "lower it."
            )
        kept = sum(counts) / (rows * columns)
        if self.reserve == "label" and kept > 2 * mean:
            remarks.setdefault(
                f"columns of {rows} weights keep at least one each, {kept:.1%} instead of "
                f"{mean:.1%}",
                [],
            ).append(name)
        return Reserve(counts, self.reserve != "label")


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


def greedy_widths(weight: Tensor, diagonal: Tensor, budget: int, least: int, most: int) -> Tensor:
    """Widths that sum up to a budget, each bit where it lowers the loss of clustering most.

    Args:
        weight: (rows, columns). diagonal: (columns,) of the factored inverse Hessian.
        budget: sum of all widths. least, most: of each.

    Returns:
        (columns,) int64.
    """
    gain = bit_gains(weight, diagonal, least, most)
    picked = gain.flatten().argsort(descending=True, stable=True)[: budget - least * len(gain)]
    widths = torch.full((len(gain),), least, dtype=torch.int64, device=weight.device)
    return widths.index_add_(0, picked // gain.shape[1], torch.ones_like(picked))


def bit_gains(weight: Tensor, diagonal: Tensor, least: int, most: int) -> Tensor:
    """The loss of clustering that each further bit of a column saves, per bit stored.

    Args:
        weight: (rows, columns). diagonal: (columns,) of the factored inverse Hessian.

    Returns:
        (columns, most - least) float64.
    """
    lists = weight.T.contiguous()
    loss = (
        torch.stack([kmeans(lists, 1 << b)[1].to(weight.device) for b in range(least, most + 1)], 1)
        / diagonal.double().square()[:, None]
    )
    return (loss[:, :-1] - loss[:, 1:]) / len(weight)


@torch.no_grad()
def survey(block: Block, method: CLAQ) -> Iterator[tuple[Tensor, int]]:
    """What bits would gain in each linear of a block that nothing was done to.

    Yields:
        (columns, bits) as `bit_gains`, and how many bits of storage one bit of a column is.
    """
    rows = min(method.rows or block.tuned_rows, block.tuned_rows)
    hessians = input_hessians(block, [site.reads[0] for site in block.wiring.sites], rows)
    for site in block.wiring.sites:
        inputs = factored(
            block,
            "claq",
            site.reads[0],
            hessians.pop(site.reads[0]),
            method.damping,
            method.act_order,
            [],
        )
        if inputs is None:
            continue
        for name in site.reads:
            weight = block.weight(name).masked_fill(inputs.dead, 0)[:, inputs.order]
            least = min(2, block.grids[name].bits)
            yield bit_gains(weight, inputs.factor.diagonal(), least, method.upper), len(weight)


def least_gain(surveyed: Sequence[tuple[Tensor, int]], extra: float) -> float:
    """The gain per bit that spends ``extra`` bits a weight over all linears surveyed, on top of the
    least width.

    Raises:
        LowbitError: there are not so many bits to give.
    """
    gains = torch.cat([g.flatten() for g, _ in surveyed])
    costs = torch.cat([torch.full((g.numel(),), rows, dtype=torch.float64) for g, rows in surveyed])
    budget = extra * sum(len(g) * rows for g, rows in surveyed)
    ordered, by = gains.cpu().sort(descending=True, stable=True)
    spent = costs[by].cumsum(0)
    if budget > float(spent[-1]) * (1 + 1e-9):
        raise LowbitError(
            f"claq has no {extra:g} bits a weight to give beyond the least width: lower "
            "claq.adaptive_bits."
        )
    at = min(int((spent <= budget).sum()), len(ordered) - 1)
    return max(float(ordered[at]), torch.finfo(torch.float64).tiny)


def _without_reserved(weight: Tensor, reserve: Reserve, order: Tensor) -> Tensor:
    """The (out, in) weight with zeros for what would be kept if no error had to be made up for."""
    rest = weight.clone()
    for at, column in enumerate(order.tolist()):
        rest[reserve.pick(at, weight[:, column]), column] = 0
    return rest


def _nearest(block: Block, linear: str) -> QTensor:
    grid, params = block.grids[linear], block.range_of(linear)
    return QTensor(grid, grid.encode(block.weight(linear), params), params)
