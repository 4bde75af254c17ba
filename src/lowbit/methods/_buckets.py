"""Soft weights of linears in one matrix, on any ordered grid: how their variables make weights and
move.

    weight = low + h(nu) * (high - low)         low, high = decoded(base), decoded(other)

A row is a list of weights that share the grid's params (`OrderedGrid.lists`). ``base`` and
``other`` are neighbouring codes, or the same where there is none further. The levels are tuned,
too: `OrderedGrid.moved` by factors 2 h(v), which start at 1.

On a `LinearGrid` this is (code + way * h(nu) - zero) * scale - offset with way = other - base, and
goes through the fused operations of `_rounding`; other grids go through `decode`. What the levels'
gradient is for v, autograd says in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Coded, LinearGrid, OrderedGrid, Params, QTensor
from ..grid.base import Linear
from ..grid.params import stacked
from ..grid.straight import through
from ..model.block import Block
from . import _rounding
from ._rounding import (
    FROZEN,
    Adam,
    SoftRows,
    inverse_rectified,
    moved,
    rectified,
    slope,
    soft_rectified,
)
from ._slices import Slice

# Measured: 0.5 ends no better than without the round, 0.15 to 0.25 are alike.
_LEAST_AIM, _MOST_AIM = 0.02, 0.2


class Bucket:
    """Linears whose lists have one length and one grid; a linear is a range of rows.

    Args:
        block: what is tuned. names: the linears. from_codes: start on their codes, frozen.

    Attributes:
        grid: of the lists. places: rows of each linear.
        part: which of the rows are this rank's: what follows is of those.
        nu: (rows, length) rounding variable of every weight. v: variables that tune the levels.
        base, other: (rows, length) codes, see the module.
    """

    def __init__(self, block: Block, names: Sequence[str], from_codes: bool) -> None:
        self._own = own = ordered(block, names[0])
        self.grid: OrderedGrid[Any] = own.of_lists
        self._line = self.grid if isinstance(self.grid, LinearGrid) else None
        self._stored, self._ranks = block.stored, block.ranks
        self.places: list[slice] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        params: list[Params] = []
        for name in names:
            at = self.places[-1].stop if self.places else 0
            self.places.append(slice(at, at + len(own.lists(block.weight(name)))))
        self.part = Slice(block.ranks.near, self.places[-1].stop)
        for name, rows in zip(names, self.places, strict=True):
            mine = self._mine(rows)
            if mine.start == mine.stop:
                continue
            lists, held = _listed(block, name, own, from_codes)
            if mine.stop - mine.start < len(lists):
                lists, held = lists[mine], held.rows(mine)
            parts.append(self._start(lists, held, from_codes))
            params.append(held)
        self.nu, self.base, self.other = (torch.cat(c) for c in zip(*parts, strict=True))
        self._params = stacked(params)
        self.v = torch.zeros(self.grid.freedom(self._params), device=self.nu.device)
        self._nu_moments, self._v_moments = Moments(self.nu), Moments(self.v)
        self._scratch = Scratch()
        self._way = self._ways(slice(None))

    def _mine(self, rows: slice) -> slice:
        """Which of some rows are this rank's, counted from the first of them."""
        local, shift = self.part.local(rows), self.part.own.start - rows.start
        return slice(local.start + shift, local.stop + shift)

    def _start(
        self, lists: Tensor, params: Params, from_codes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """nu, base and other of some lists of weights, or of codes."""
        if from_codes:
            frozen = torch.full(lists.shape, -FROZEN, device=lists.device)
            return frozen, self._codes(lists), self._codes(lists)
        found = self.grid.neighbours(lists, params)
        nu = inverse_rectified(found.fraction)
        return nu, self._codes(found.low), self._codes(found.high)

    def _codes(self, codes: Tensor) -> Tensor:
        """Codes as they are held: those of levels that are looked up, as an index."""
        return codes if self._line is not None else codes.to(torch.int64)

    def _ways(self, rows: slice) -> Tensor | None:
        """The step from base to other on a uniform grid, int8; None on others."""
        if self._line is None:
            return None
        return self.other[rows].to(torch.int8) - self.base[rows].to(torch.int8)

    # --- weights ----------------------------------------------------------------------------------

    def now(self, v: Tensor | None = None) -> Params:
        """The params of all lists as tuned so far, as an artifact will hold them.

        Args:
            v: in place of the bucket's own; they are differentiable by it.
        """
        tuned = self.grid.moved(self._params, 2 * soft_rectified(self.v if v is None else v))
        held: Params = self.grid.stored(tuned, self._stored)
        return held

    def values(self, dtype: torch.dtype) -> Tensor:
        """(rows, length) soft weights of all ranks' rows, good until the next call."""
        with torch.enable_grad():
            self._leaf = self.v.detach().clone().requires_grad_()
            now = self.now(self._leaf)
            if self._line is not None:
                self._form = self._line.linear(now)
                return self.part.gathered(self._in_one_pass(self._form, dtype))
            decoded = [self.grid.decode(c, now) for c in (self.base, self.other)]
            self._ends = [through(t, t.to(self._stored).to(t.dtype)) for t in decoded]
        low, high = (t.detach() for t in self._ends)
        self._gap = high - low
        return self.part.gathered(torch.addcmul(low, self._gap, rectified(self.nu)).to(dtype))

    def _in_one_pass(self, form: Linear, dtype: torch.dtype) -> Tensor:
        assert self._way is not None
        out = self._scratch.like(self.nu, dtype)
        length = self.nu.numel() // len(form.scale)
        nu, code, way, to = (t.view(-1, length) for t in (self.nu, self.base, self._way, out))
        zero, scale, offset = (None if t is None else t.detach().contiguous() for t in form)
        assert zero is not None and scale is not None
        self._held = zero, scale
        _rounding.weights(SoftRows(nu, code, way, zero, scale, offset), to)
        self._by = torch.zeros(len(scale), 2, device=scale.device)
        return out

    def lists(self, weight: Tensor) -> Tensor:
        """(out, in) in the layout of this bucket, (rows, length)."""
        return self._own.lists(weight)

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        """The inverse for one linear, from what `values` gave."""
        return self._own.unlisted(flat[rows], shape[0])

    # --- steps ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Forget where Adam stood."""
        self._nu_moments.reset()
        self._v_moments.reset()

    def descend(self, rows: slice, gradient: Tensor, adam: Adam) -> None:
        """Move nu of some of this rank's rows against their (rows, length) gradient by what
        `values` gave last, and note the gradient by the levels.
        """
        m = self._nu_moments
        if self._way is None:
            gradient = gradient.float()
            upper = gradient * rectified(self.nu)
            self._by_ends = gradient - upper, upper
            by_nu = gradient * self._gap * slope(self.nu)
            moved(self.nu, by_nu, m.first, m.second, adam)
            return
        zero, scale = self._held
        per_row = len(scale) // len(self.nu)
        here = slice(rows.start * per_row, rows.stop * per_row)
        length = self.nu.numel() // len(scale)
        nu, code, way, first, second = (
            t[rows].view(-1, length) for t in (self.nu, self.base, self._way, m.first, m.second)
        )
        soft = SoftRows(nu, code, way, zero[here], scale[here])
        self._by[here] = _rounding.descend(gradient.reshape(-1, length), soft, first, second, adam)

    def retune(self, adam: Adam, decay: float) -> None:
        """Move v by what `descend` noted since `values`; ``decay`` is L2 inside Adam."""
        if self._way is None:
            [gradient] = torch.autograd.grad(
                self._ends, self._leaf, self._by_ends, retain_graph=True
            )
        else:
            by_scale, by_offset = self._by[:, :1], self._by[:, 1:]
            made, by = [self._form.scale], [by_scale]
            if self._form.offset is not None:
                made, by = [*made, self._form.offset], [*by, -by_offset]
            [gradient] = torch.autograd.grad(made, self._leaf, by, retain_graph=True)
        m = self._v_moments
        moved(self.v, gradient.add_(self.v, alpha=decay), m.first, m.second, adam)

    # --- the result -------------------------------------------------------------------------------

    def _hard(self, rows: slice) -> Tensor:
        """(rows, length) codes by the sign of nu."""
        return torch.where(self.nu[rows] > 0, self.other[rows], self.base[rows])

    def codes(self) -> tuple[Tensor, Params]:
        """Of all ranks' rows: (rows, length) uint8 codes by the sign of nu, and `now`. The first
        machine's where there are several: they might differ in a bit.
        """
        hard = self.part.gathered(self._hard(slice(None)).to(torch.uint8))
        now = self.now().map(lambda t: self.part.gathered(t).contiguous())
        if self._ranks.near is not self._ranks:
            self._ranks.hand_round([hard, *vars(now).values()], 0)
        return hard, now

    def coded(self, rows: slice, shape: torch.Size, codes: Tensor, now: Params) -> Coded:
        """One linear on its grid, each weight by the sign of its nu.

        Args:
            codes, now: what `codes` gives.
        """
        codes, params = self.grid.arranged(codes[rows], now.rows(rows))
        return QTensor(
            self._own,
            self._own.unlisted(codes, shape[0]),
            self._own.uncut(params, shape[0]),
        )

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor, params: Params) -> None:
        """Let one linear's weights, as far as they are this rank's, start again between their codes
        and the neighbours toward which the loss falls.

        Args:
            gradient, curvature: (rows, length) float32. params: what `now` gives.
        """
        mine, rows = self._mine(rows), self.part.local(rows)
        if rows.start == rows.stop:
            return
        gradient, curvature, params = gradient[mine], curvature[mine], params.rows(rows)
        hard = self._hard(rows)
        other = self._codes(self.grid.beside(hard.to(torch.uint8), -torch.sign(gradient), params))
        if self._line is not None:
            scale = self._line.linear(params).scale  # (lists * groups, 1)
            gap = scale.abs().expand(-1, hard.numel() // len(scale)).reshape(hard.shape)
        else:
            gap = (self.grid.decode(other, params) - self.grid.decode(hard, params)).abs()
        self.base[rows], self.other[rows] = hard, other
        way = self._ways(rows)
        if self._way is not None and way is not None:
            self._way[rows] = way
        nu = aimed(gradient, curvature, gap.clamp(min=1e-12), other == hard)
        self.nu[rows] = nu


def _listed(
    block: Block, name: str, grid: OrderedGrid[Any], from_codes: bool
) -> tuple[Tensor, Params]:
    """(rows, length) weights or codes of a linear, and the params of its lists, float32."""
    held = block.coded[name].params if from_codes else block.range_of(name)
    lists = grid.lists(block.coded[name].codes if from_codes else block.weight(name)).contiguous()
    wide = held.map(lambda t: t.float() if t.is_floating_point() else t)
    return lists, grid.cut(wide, len(lists))


def aimed(gradient: Tensor, curvature: Tensor, gap: Tensor, outside: Tensor) -> Tensor:
    """nu for a restart: h is half the weight's own Newton step in units of the gap to its other
    value, kept small.

    All weights start at once, and together the full steps overshoot by far. Where there is no other
    value, h makes the weight freeze first.
    """
    newton = (gradient / curvature.clamp(min=1e-30) / gap).abs()
    return inverse_rectified((0.5 * newton).clamp_(_LEAST_AIM, _MOST_AIM).masked_fill_(outside, 0))


def ordered(block: Block, linear: str) -> OrderedGrid[Any]:
    """The grid of a linear, one whose codes have neighbours.

    Raises:
        LowbitError: it is none.
    """
    grid = block.grids[linear]
    if not isinstance(grid, OrderedGrid):
        raise LowbitError(
            f"tesseraq rounds between neighbouring codes, and '{block.name}.{linear}' is on "
            f"{grid}, whose codes have no order: leave tesseraq out of the recipe."
        )
    return grid


class Moments:
    """Adam's two moments of a variable, made when they are first needed."""

    def __init__(self, variable: Tensor) -> None:
        self._like = variable
        self.first = self.second = variable.new_empty(0)

    def reset(self) -> None:
        """Both zero."""
        if self.first.shape != self._like.shape:
            self.first, self.second = torch.zeros_like(self._like), torch.zeros_like(self._like)
        else:
            self.first.zero_()
            self.second.zero_()


class Scratch:
    """A tensor that is written again and again: large ones cost more to allocate than to fill."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def like(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised, of t's shape and device."""
        if self._held is None or self._held.dtype != dtype or self._held.shape != t.shape:
            self._held = torch.empty_like(t, dtype=dtype)
        return self._held
