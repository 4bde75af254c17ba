"""The input Hessians of the column loop: collected, inverted and factored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LowbitError
from ..model.block import Block
from ..model.graph import Site
from ..model.statistics import Call, Seen, Statistic
from ._columns import inverse_factor
from ._gram import gram
from ._rare import of_all, second_moments
from .cost import Cost, Shapes, Work

_RETRIES = 3
_LEAST_RETRIED_DAMPING = 1e-2
_AT_ONCE = 2 << 30  # bytes of Hessians in one pass, where many experts are reached at once


@dataclass(frozen=True)
class Inputs:
    """The inputs of a site, in the order in which their columns are coded.

    Attributes:
        factor: (in, in) float64 from `inverse_factor`, inputs in coding order.
        order: (in,) int64, the inputs in coding order.
        dead: (in,) bool, inputs in their own order that are always zero.
    """

    factor: Tensor
    order: Tensor
    dead: Tensor


@dataclass(frozen=True)
class Walk:
    """How a column-loop method goes through a block.

    Attributes:
        method: its name, for remarks and errors.
        rows: calibration rows used, at most; 0 means all.
        damping: share of the mean diagonal that is added to a Hessian's diagonal.
        act_order: code the inputs with the largest activations first.
        true_sequential: collect the inputs of a site after the sites before it are coded; otherwise
            in one pass before any.
    """

    method: str
    rows: int
    damping: float
    act_order: bool
    true_sequential: bool

    def check(self, block_size: int) -> None:
        """Raise LowbitError if one of these, or the block size, is out of range."""
        damped = math.isfinite(self.damping) and self.damping >= 0
        if not damped or block_size < 1 or self.rows < 0:
            raise LowbitError(
                f"{self.method} needs a finite damping >= 0, block_size >= 1 and rows >= 0."
            )

    def steps(self, block: Block) -> list[list[tuple[str, ...]]]:
        """The linears still to be coded: by step, in one pass each, and by who sees the same
        tokens.
        """
        levels = [_left(block, level) for level in block.graph.levels]
        if not self.true_sequential:
            everything = [names for level in levels for names in level]
            return [everything] if everything else []
        return [part for level in levels for part in _parts(block, level)]


def _left(block: Block, level: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What is not coded yet of it."""
    left = (tuple(n for n in names if n not in block.coded) for names in level)
    return [names for names in left if names]


def _parts(block: Block, level: Sequence[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Cut a level so that the Hessians of a pass take no more than `_AT_ONCE`."""
    part: list[tuple[str, ...]] = []
    held = 0
    for names in level:
        size = 8 * block.weight(names[0]).shape[1] ** 2
        if part and held + size > _AT_ONCE:
            yield part
            part, held = [], 0
        part.append(names)
        held += size
    if part:
        yield part


def factored(
    block: Block, walk: Walk, first: str, hessian: Tensor, trouble: list[str]
) -> Inputs | None:
    """The (inputs, inputs) Hessian of a site made ready; None if its inputs are all zero, which is
    remarked.
    """
    label = f"{block.name}.{first}"
    if not bool(torch.isfinite(hessian).all()):
        raise LowbitError(
            f"the inputs of '{label}' are not finite on the calibration rows: nothing can be "
            "learned from them. "
            "See whether 'lowbit eval' finds the float model's perplexity finite."
        )
    if not bool(hessian.any()):
        trouble.append(
            f"{walk.method}: '{label}' saw no input but zeros; rounded to nearest what reads it"
        )
        return None
    # An input that is always zero is tied to no other: any positive diagonal will do for it, and
    # the mean of the living ones leaves the damping, a share of the mean, what it is without the
    # dead.
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    living = torch.where(dead, diagonal.sum() / (~dead).sum(), diagonal)
    inputs = torch.arange(len(living), device=living.device)
    order = living.argsort(descending=True, stable=True) if walk.act_order else inputs
    factor = _factor(hessian[order][:, order], living[order], walk, label, trouble)
    return Inputs(factor, order, dead)


def _factor(
    hessian: Tensor, diagonal: Tensor, walk: Walk, label: str, trouble: list[str]
) -> Tensor:
    """`inverse_factor` of a Hessian (changed in place) with a damped diagonal, ten times as much as
    often as it takes.
    """
    damping = walk.damping
    failed: list[float] = []
    while len(failed) <= _RETRIES:
        hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor = inverse_factor(hessian)
        if factor is not None:
            if failed:
                trouble.append(
                    f"{walk.method}: the Hessian of '{label}' could not be inverted with damping "
                    f"{walk.damping:g}; took {damping:g}"
                )
            return factor
        failed.append(damping)
        damping = max(10 * damping, _LEAST_RETRIED_DAMPING)
    raise LowbitError(
        f"the Hessian of '{label}' could not be inverted, not even with damping {failed[-1]:g}: "
        f"calibrate on more rows, or raise {walk.method}.damping."
    )


@torch.no_grad()
def input_hessians(
    block: Block,
    linears: Sequence[str],
    rows: int,
    inside: tuple[str, list[Call]] | None = None,
    keep: Mapping[str, list[Call]] | None = None,
    pools: dict[Site, Statistic] | None = None,
) -> dict[str, Tensor]:
    """(2/n) sum x x^T over the n tokens that reach each linear (GPTQ, section 2), in float64.

    The tokens come from the first ``rows`` rows of the quantized stream and count as they meet the
    weight.

    Args:
        inside, keep: as in `Block.statistics`.
        pools: what was found of mixtures of which only some experts are among the linears, and is
            added here.

    Returns:
        linear -> (inputs, inputs) on the block's device; zeros for a linear that no token reaches.
            Experts of few tokens have a prior, see `_rare`.
    """

    found = block.statistics(linears, "quantized", _gram, rows=rows, inside=inside, keep=keep)
    known = {} if pools is None else pools

    def everyone(site: Site) -> Statistic:
        firsts = [names[0] for names in site.readings]
        if all(name in found for name in firsts):
            return of_all(found, firsts)
        if site not in known:
            [known[site]] = block.statistics(
                firsts, "quantized", _gram, rows=rows, inside=inside, pooled=True
            ).values()
        return known[site]

    rare = any(s.tokens < len(s.value) for s in found.values()) and block.graph.mixtures
    if rare:
        return {n: 2 * mean for n, mean in second_moments(block.graph, found, everyone).items()}
    return {n: s.value * (2 / max(1, s.tokens)) for n, s in found.items()}


def _gram(seen: Seen) -> Tensor:
    """The sum of x x^T in float64, (inputs, inputs)."""
    wide = torch.promote_types(seen.met.dtype, torch.float32)
    return gram(seen.met, wide).double()


def _waiting(shapes: Shapes) -> int:
    """Bytes of Hessians of experts that wait while another's is worked on; and of the sum over
    their mixture where they are cut into parts.
    """
    most = 0
    for level in shapes.levels:
        sizes = [8 * shapes.layer.linears[names[0]][1] ** 2 for names in level]
        at_once = min(sum(sizes), max(_AT_ONCE, *sizes))
        shared = max(sizes) if at_once < sum(sizes) else 0
        most = max(most, at_once - max(sizes) + shared)
    return most


def _steps(shapes: Shapes) -> int:
    """Sites that are worked on in turn, all experts of a mixture in as many parts as they take."""
    steps = 0
    for level in shapes.levels:
        sizes = [8 * shapes.layer.linears[names[0]][1] ** 2 for names in level]
        steps += max(1, -(-sum(sizes) // _AT_ONCE)) if len(level) > 1 else 1
    return steps


@dataclass(frozen=True)
class _Shares:
    """What one rank does of the work on sites that are reached at once.

    Attributes:
        factors: the share of their factors. rows: of their columns, where rows are coded apart.
            linears: of their columns, where linears are.
    """

    factors: float
    rows: float
    linears: float

    @classmethod
    def of(cls, shapes: Shapes, sites: Sequence[Sequence[str]]) -> _Shares:
        """As `_sites` deals them out."""
        ranks, count = shapes.rows.ranks, len(sites)
        if count >= ranks:
            whole = -(-count // ranks) / count
            return cls(whole, whole, whole)
        sizes = [math.prod(shapes.layer.linears[n]) for names in sites for n in names]
        most = max(max(sizes) / sum(sizes), 1 / ranks)
        return cls(1 / count, 1 / (count * (ranks // count)), most)


def column_cost(walk: Walk, shapes: Shapes, by_rows: bool = True) -> Cost:
    """Of a column-loop method: Hessians and their factors in float64, columns in float32; the
    loop's launches are not counted.

    Args:
        by_rows: whether ranks share the rows of a linear, or only linears.
    """
    layer, rows = shapes.layer, shapes.learned(walk.rows)
    square = 8 * layer.widest**2
    widths = {b for _, b in layer.linears.values()}
    waiting = _waiting(shapes) if walk.true_sequential else sum(8 * b * b for b in widths)
    working = max(square + shapes.passing, 5 * square, 2 * square + 24 * layer.largest)
    tokens = rows * shapes.rows.length
    # The part of the block from one step to the next, half of it on the average.
    passes = _steps(shapes) / 2 if walk.true_sequential else 1
    seen = factors = columns = 0.0
    levels = shapes.levels or [[names] for names in shapes.sites]
    for level in levels if walk.true_sequential else [shapes.sites]:
        at_once = len(level)
        if walk.true_sequential:
            largest = max(8 * layer.linears[names[0]][1] ** 2 for names in level)
            at_once = min(at_once, max(1, _AT_ONCE // largest))
        share = _Shares.of(shapes, level[:at_once])
        for names in level:
            width = layer.linears[names[0]][1]
            seen += 2.0 * tokens * layer.share(names[0]) * width**2
            factors += 2.0 * width**3 * share.factors
            outputs = sum(layer.linears[n][0] for n in names)
            columns += 2.0 * outputs * width**2 * (share.rows if by_rows else share.linears)
    squares = sum(8.0 * n * n for n in shapes.widths)
    return Cost(
        held=5 * layer.weights + waiting + working,
        least=16 * max(widths, default=0) ** 2,  # a Hessian and its factor
        lighter="awq or rtn",
        parts={
            "passes": shapes.forward(rows) * passes,
            "Hessians": shapes.grams(seen) + shapes.rows.summed(squares),
            "factors": Work(single=factors),
            "columns": Work(single=columns) + shapes.rows.gathered(layer.weights),
        },
    )
