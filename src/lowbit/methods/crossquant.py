"""CrossQuant (arXiv 2410.07505) in a form that runs: static column maxima, folded into what comes
before each linear.

The published scale of an activation, t**a * c**(1-a) with the row's and the column's maximum, is
`lowbit.grid.CrossQuant`. Here the column's part becomes a constant of the model: c is measured on
the calibration text, c**(1-a) is divided out of the activation by the norm or linear that makes it
and multiplied into the weights that read it, before those are quantized. What is left of the scale
is the row's own maximum after that, never above t**a while |x| <= c: an ordinary per-token grid,
which integer kernels take.

    t_i = max_j |x_ij|    c_j = max_i |x_ij|    x_ij / c_j**(1-a),  w_jk * c_j**(1-a)

a is ``row_exponent``, or with ``search`` that of the least squared error of the site's output over
a list of exponents. Where the weight's grid has groups of inputs, ``fold="group"`` takes one factor
a group, of channels sorted by size before (`Reorder`), so that weights keep their codes.

Helpers: `_scale_search` (the error under a factor), `_equivalent` (where a factor can go),
`model.rewrite` (folding), `model.order` (another order of channels).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, RangedGrid
from ..model.block import Block
from ..model.graph import Heads, Site
from ..model.model import Model, float_blocks
from ..model.order import check_order, reorder
from ..model.outline import Outline
from ..model.rewrite import fold, fold_values, repeated
from ..model.statistics import Seen
from ._equivalent import foldable
from ._scale_search import best_scale, collect_inputs
from .cost import Cost, Shapes, passes

_LEAST_COLUMN = 1e-5  # of the largest column's, as in the dynamic grid
_TRIED = (0.0, 0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 1.0)

ColumnSize = Literal["max", "percentile"]
Fold = Literal["channel", "group"]


_ONE_GROUP = (
    "crossquant.fold=group needs one group size for all linears, as in W4A8g128; or --set "
    "crossquant.fold=channel."
)


@dataclass(frozen=True)
class CrossQuant:
    """The knobs of the folded form. The weights quantized are those after the fold, unlike in the
    published simulation.

    Attributes:
        row_exponent: a in [0, 1]; 0.15 is the paper's. 1 folds nothing.
        search: try exponents from 0 to 1 at every site and take the one whose quantized outputs
            differ least; ``row_exponent`` is not used.
        columns: a channel's calibrated size: its "max", or its "percentile" (what lies above gives
            its token a coarser scale).
        percentile: in percent.
        skip_first: leave the first token of every row out of it: its few huge channels are no other
            token's.
        rows: calibration rows used, at most; 0 means all.
        search_rows: of those, rows the search looks at.
        fold: "channel" gives every channel its own factor. "group" sorts channels by size and gives
            those of one group of the weight's grid the factor of their largest, so that it
            multiplies the group's scale and changes no code; for schemes with a group size.
        isolate: with groups, a channel so many times as large as its group's median gets a factor
            of its own, and the others the factor of the largest of the rest.
    """

    row_exponent: float = 0.15
    search: bool = False
    columns: ColumnSize = "max"
    percentile: float = 99.99
    skip_first: bool = True
    rows: int = 0
    search_rows: int = 16
    fold: Fold = "channel"
    isolate: float = 8.0

    def __post_init__(self) -> None:
        if (
            not 0 <= self.row_exponent <= 1
            or not 0 < self.percentile <= 100
            or self.rows < 0
            or self.search_rows < 1
            or not self.isolate > 1
        ):
            raise LowbitError(
                "crossquant needs row_exponent in [0, 1], percentile in (0, 100], rows >= 0, "
                "search_rows >= 1 and isolate > 1."
            )

    def __call__(self, block: Block) -> Block:
        sites = [
            s
            for s in block.graph.sites
            if foldable(block, s) and (s.source is not None or _shared(block, s) is not None)
        ]
        rows = min(self.rows or block.tuned_rows, block.tuned_rows)
        sizes = self.sizes(block, [s.reader for s in sites], rows)
        chosen: dict[str, float] = {}
        for site in sites:
            heads, size = _shared(block, site), sizes[site.reader]
            times = 1 if heads is None else _times(block, heads)
            if self.fold == "group":
                block, size = self._sorted(block, site, size)
            before = None
            # Sharing by values and by groups may overlap: until both hold.
            while before is None or not torch.equal(before, size):
                before = size
                if heads is not None:  # channels that come from one value share its factor
                    size = repeated(
                        size.reshape(-1, times, heads.width).amax(1).flatten(), heads.width, times
                    )
                if self.fold == "group":
                    size = self._by_group(block, site, size)
            factor, exponent = _factor(size, self.row_exponent), self.row_exponent
            if self.search:
                block.announce(f"crossquant: exponent of {', '.join(site.reads)}")
                seen = collect_inputs(block, [site], min(self.search_rows, rows))[site.reader]
                factor, exponent = best_scale(block, site, seen, list(_candidates(size)))
            chosen[site.reader] = exponent
            if exponent == 1:
                continue
            if heads is None:
                block = fold(block, site, factor)
            else:
                block = fold_values(block, factor.reshape(-1, times, heads.width)[:, 0].flatten())
        return block.with_notes(crossquant_exponents=chosen)

    def _sorted(self, block: Block, site: Site, size: Tensor) -> tuple[Block, Tensor]:
        """The block and the sizes with the site's channels by falling size, where that stays inside
        the block.

        The residual stream has an order of its own, the same for all blocks (`Reorder`), and
        attention's channels stay in their heads; those that share values are left as they are, and
        so are those of which it is not known what else would have to move.
        """
        if site.residual or site.source is None:
            return block, size
        heads = block.graph.heads
        if heads is not None and site.reads == (heads.output,):
            if heads.norm is not None:
                return block, size
            inside = size.reshape(heads.count, heads.width).argsort(
                dim=1, descending=True, stable=True
            )
            order = (
                inside + torch.arange(heads.count, device=size.device)[:, None] * heads.width
            ).flatten()
        elif block.graph.movable(site):
            order = size.argsort(descending=True, stable=True)
        else:
            return block, size
        return reorder(block, site, order), size[order]

    def _by_group(self, block: Block, site: Site, size: Tensor) -> Tensor:
        """Every channel's size replaced by its group's, but for isolated ones."""
        grids = [block.grids[n] for n in site.reads]
        group = grids[0].group_size
        if (
            group is None
            or not all(isinstance(g, RangedGrid) for g in grids)
            or any(g.group_size != group for g in grids)
        ):
            raise LowbitError(_ONE_GROUP)
        g = size.reshape(-1, group)
        alone = g > self.isolate * g.median(1, keepdim=True).values
        return torch.where(alone, g, g.masked_fill(alone, 0).amax(1, keepdim=True)).flatten()

    @torch.no_grad()
    def sizes(self, block: Block, linears: list[str], rows: int) -> dict[str, Tensor]:
        """Calibrated |x| of each input channel of some linears on the float stream, (channels,)
        float64.

        Raises:
            LowbitError: an activation is not finite, or rows of one token while first tokens are
                skipped.
        """
        length, skipped = block.x.shape[1], int(self.skip_first)
        if length <= skipped:
            raise LowbitError(
                "crossquant: calibration rows of one token have nothing after their first: set "
                "crossquant.skip_first=false."
            )
        keep = 1
        if self.columns != "max":
            keep = max(1, math.floor(rows * (length - skipped) * (1 - self.percentile / 100)) + 1)

        def largest(seen: Seen) -> Tensor:
            """(keep, channels) float32, falling; -1 where there are fewer tokens."""
            # Some models give an MLP the tokens of all rows in one matrix.
            x = seen.exact.reshape(-1, length, seen.exact.shape[-1])
            if not bool(torch.isfinite(x).all()):
                raise LowbitError(
                    f"'{block.name}.{seen.linear}' gets activations that are not finite: check the "
                    "model and its dtype."
                )
            return _top(x[:, skipped:].flatten(0, -2).abs().float(), keep)

        def merged(one: Tensor, other: Tensor) -> Tensor:
            return _top(torch.cat([one, other]), keep)

        found = block.statistics(linears, "float", largest, merged, rows=rows)
        return {n: s.value[-1].double() for n, s in found.items()}


@dataclass(frozen=True)
class Reorder:
    """The stage: the channels of the residual stream by falling size, where factors are folded by
    groups. One pass of the float model, also when a run is resumed.
    """

    method: CrossQuant

    def planned(self, outline: Outline) -> Outline:
        if outline.rotated:
            raise LowbitError(
                "crossquant.fold=group sorts channels that quarot has mixed: use --set "
                "crossquant.fold=channel, or leave quarot out."
            )
        check_order(outline.described, outline.config.model_type)
        return outline

    def __call__(self, model: Model) -> Model:
        source = model.source
        total = torch.zeros(source.config.hidden_size, dtype=torch.float64, device=source.device)
        for block in float_blocks(model, "crossquant: sizes of the residual channels"):
            total += self._sizes(block)
            del block  # else it would be held while the next one is read
        order = total.argsort(descending=True, stable=True)
        return replace(model, source=source.ordered(order))

    def _sizes(self, block: Block) -> Tensor:
        """Sum over the sites that read the residual stream of the logarithm of each channel's size,
        (hidden,) float64.
        """
        method = self.method
        names = [s.reader for s in block.graph.sites if s.residual]
        found = method.sizes(block, names, min(method.rows or block.tuned_rows, block.tuned_rows))
        start = torch.zeros((), dtype=torch.float64, device=block.device)
        return sum((c.clamp(min=1e-30).log() for c in found.values()), start=start)


def _top(sizes: Tensor, keep: int) -> Tensor:
    """(n, channels) -> (keep, channels), the largest of each channel, falling; padded with -1."""
    most = sizes.topk(min(keep, len(sizes)), dim=0).values
    missing = keep - len(most)
    return torch.nn.functional.pad(most, (0, 0, 0, missing), value=-1.0) if missing else most


def _factor(size: Tensor, exponent: float) -> Tensor:
    """c**(1-a) over its geometric mean, so that the weights stay in the range of their dtype; 1
    where nothing ever arrives.
    """
    dead = size <= 0
    if bool(dead.all()):
        return torch.ones_like(size)
    factor = size.clamp(min=_LEAST_COLUMN * float(size.max())).pow(1 - exponent)
    return torch.where(dead, torch.ones_like(factor), factor / factor[~dead].log().mean().exp())


def _candidates(size: Tensor) -> Iterator[tuple[Tensor, float]]:
    for exponent in reversed(_TRIED):  # of equal ones the one that moves least
        yield _factor(size, exponent), exponent


def _shared(block: Block, site: Site) -> Heads | None:
    """The heads, where a site reads attention's output and several of its channels come from one
    value.
    """
    heads = block.graph.heads
    if heads is None or heads.norm is not None or site.source is not None or site.beside:
        return None
    return heads if site.reads == (heads.output,) else None


def _times(block: Block, heads: Heads) -> int:
    """Query heads that share one head of keys and values."""
    start, stop = heads.values.rows or (0, len(block.weight(heads.values.module)))
    return heads.count * heads.width // (stop - start)


def cost(method: CrossQuant, shapes: Shapes) -> Cost:
    """A pass that changes weights, and one of the float model where channels are sorted before."""
    own = passes(method, shapes)
    if method.fold != "group":
        return own
    return replace(own, work=own.work + shapes.forward(shapes.rows.mine(shapes.rows.count)))


def check(method: CrossQuant, grid: AnyGrid) -> None:
    """Refuse grids without groups where factors are folded by them.

    Raises:
        LowbitError: naming what to do.
    """
    if method.fold == "group" and not (isinstance(grid, RangedGrid) and grid.group_size):
        raise LowbitError(_ONE_GROUP)


def before(method: CrossQuant, grid: AnyGrid) -> Reorder | None:
    """The stage that sorts channels, where factors are folded by groups."""
    return Reorder(method) if method.fold == "group" else None
