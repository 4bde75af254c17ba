"""Bits of single columns: where each further bit lowers the loss of clustering most, in one matrix
or over a whole model.

The loss of a column is the K-means error of its weights over u^2, u being the column's element of
the factored inverse Hessian. Over a model the budget becomes a price: the gain per stored bit from
which on a bit is bought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid.kmeans import kmeans
from ..model.block import Block
from ..model.dealing import divided
from ..model.model import BlockMethod, Model, float_blocks
from ..model.outline import Outline
from ._hessian import Inputs, Walk, factored, input_hessians

LEAST = 2  # bits of a column where single bits are given, unless the grid has fewer


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
def survey(block: Block, walk: Walk, upper: int) -> Iterator[tuple[Tensor, int, int]]:
    """What bits would gain in each linear of a block that nothing was done to.

    Args:
        upper: most bits of a column.

    Yields:
        (columns, bits) as `bit_gains`, how many bits of storage one bit of a column is, and the
        bits of a weight that the grid has beyond the least width.
    """
    rows = min(walk.rows or block.tuned_rows, block.tuned_rows)
    readings = list(block.graph.readings)
    hessians = input_hessians(block, [names[0] for names in readings], rows)

    def gained(i: int) -> list[tuple[Tensor, int, int]]:
        first = readings[i][0]
        inputs = factored(block, walk, first, hessians.pop(first), [])
        if inputs is None:
            return []
        return [_surveyed(block, name, inputs, upper) for name in readings[i]]

    costs = [float(sum(block.weight(n).numel() for n in names)) for names in readings]
    for found in divided(block.ranks, costs, gained):
        yield from found


def _surveyed(block: Block, name: str, inputs: Inputs, upper: int) -> tuple[Tensor, int, int]:
    weight = block.weight(name).masked_fill(inputs.dead, 0)[:, inputs.order]
    bits = block.grids[name].bits
    least = min(LEAST, bits)
    return bit_gains(weight, inputs.factor.diagonal(), least, upper), len(weight), bits - least


def least_gain(surveyed: Sequence[tuple[Tensor, int, int]], extra: float) -> float:
    """The gain per bit that spends ``extra`` bits a weight over all linears surveyed, on top of
    those of their grids.

    Raises:
        LowbitError: there are not so many bits to give.
    """
    gains = torch.cat([g.flatten() for g, _, _ in surveyed])
    costs = [torch.full((g.numel(),), rows, dtype=torch.float64) for g, rows, _ in surveyed]
    budget = sum((own + extra) * len(g) * rows for g, rows, own in surveyed)
    ordered, by = gains.cpu().sort(descending=True, stable=True)
    spent = torch.cat(costs)[by].cumsum(0)
    if budget > float(spent[-1]) * (1 + 1e-9):
        raise LowbitError(
            f"claq has no {extra:g} bits a weight to give beyond the scheme's: lower "
            "claq.adaptive_bits."
        )
    at = min(int((spent <= budget).sum()), len(ordered) - 1)
    return max(float(ordered[at]), torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Allocate:
    """The stage: what a stored bit must gain for the budget to be met over the whole model. One
    pass of the float model, also when a run is resumed.

    Attributes:
        method: whose budget it is. walk: how it goes through a block. upper: most bits of a column.
        extra: bits a weight beyond those of the grids.
        priced: the method with the gain that was found.
    """

    method: BlockMethod
    walk: Walk
    upper: int
    extra: float
    priced: Callable[[float], BlockMethod]

    def planned(self, outline: Outline) -> Outline:
        return outline

    def __call__(self, model: Model) -> Model:
        found: list[tuple[Tensor, int, int]] = []
        for block in float_blocks(model, f"{self.walk.method}: what a bit would gain"):
            found += survey(block, self.walk, self.upper)
            del block  # else it would be held while the next one is read
        bought = self.priced(least_gain(found, self.extra))
        methods = tuple(bought if m is self.method else m for m in model.methods)
        return replace(model, methods=methods)
