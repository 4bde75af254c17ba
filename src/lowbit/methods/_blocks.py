"""Soft weights on K-quants: the units of scales and minima are tuned, their small multiples stay; see `_buckets`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grid import KQuant, KQuantParams, QTensor
from ..grid.kquant import SUPER
from ..model.block import Block
from ._buckets import FROZEN, aimed, inverse_rectified, rectified, slope


class KQuantBucket:
    """weight = (base + step * h(nu)) * scale - offset: one row per 256 inputs, scale and offset by its sub-blocks.

    scale = half(unit * phi(v_0)) * multiple and offset = half(unit_min * phi(v_1)) * multiple_min, phi(v) = 2 h(v). ``base`` is a code
    with the middle taken off, ``step`` is 1, or 0 where the other code lies outside the range; after `aim` also -1.

    Args:
        block: what is tuned. names: linears on one and the same grid. from_codes: start on their codes, frozen.
    """

    def __init__(self, block: Block, names: Sequence[str], from_codes: bool) -> None:
        grid = block.grids[names[0]]
        assert isinstance(grid, KQuant)
        self.grid, self.rows = grid, list[slice]()
        parts: list[tuple[Tensor, ...]] = []
        at = 0
        for name in names:
            weight = block.weight(name)
            params: KQuantParams = block.coded[name].params if from_codes else block.range_of(name)
            if from_codes:
                low = block.coded[name].codes.reshape(-1, SUPER).float() - grid.middle
                nu, step = torch.full_like(low, -FROZEN), torch.zeros_like(low)
            else:
                position = grid.position(weight.float(), params).reshape(-1, SUPER)
                floor = position.floor()
                low, high = (t.clamp(0, grid.top) for t in (floor, floor + 1))
                nu, step, low = inverse_rectified((position - floor).clamp(0, 1 - 2**-24)), high - low, low - grid.middle
            unit, least = params.unit.reshape(-1, 1), params.unit_min.reshape(-1, 1)
            multiples = [t.reshape(len(unit), -1) for t in (params.scale, params.min)]
            parts.append((nu, low, step, torch.cat([unit, least], 1), *multiples))
            self.rows.append(slice(at, at + len(unit)))
            at += len(unit)
        columns = [torch.cat(column).float() for column in zip(*parts, strict=True)]
        self.nu, self.base, self.step, self.units, self.scale, self.min = columns
        self.v = torch.zeros_like(self.units)

    def lists(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, SUPER)

    def weight(self, rows: slice, shape: torch.Size, flat: Tensor) -> Tensor:
        return flat[rows].view(shape)

    def stored_units(self) -> Tensor:
        """(rows, 2) as blocks will hold them; rounding is transparent to gradients."""
        limit = torch.finfo(torch.float16).max
        return (self.units * (2 * rectified(self.v))).clamp(-limit, limit).to(torch.float16).float()

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Scale and offset of every sub-block, (rows, sub-blocks, 1)."""
        units = self.stored_units()
        return (units[:, :1] * self.scale)[..., None], (units[:, 1:] * self.min)[..., None]

    def _subs(self, t: Tensor) -> Tensor:
        return t.reshape(len(t), -1, self.grid.group_size)

    def values(self) -> Tensor:
        self.h = rectified(self.nu)
        self.soft = torch.addcmul(self.base, self.step, self.h)
        scale, offset = self._steps()
        return (self._subs(self.soft) * scale - offset).flatten(1)

    def backward(self, gradient: Tensor, *, scales: bool) -> None:
        g = self._subs(gradient)
        if scales:
            by_unit = torch.stack([(self._subs(gradient * self.soft).sum(-1) * self.scale).sum(1), -(g.sum(-1) * self.min).sum(1)], 1)
            self.v.grad = by_unit * self.units * (2 * slope(self.v))
        self.nu.grad = (g * self._steps()[0]).flatten(1).mul_(self.step).mul_(slope(self.nu))

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        codes = self.base[rows] + self.step[rows] * (self.nu[rows] > 0) + self.grid.middle
        units = self.stored_units()[rows]
        params = KQuantParams(*(t.reshape(shape[0], -1).clone() for t in (units[:, 0], self.scale[rows], units[:, 1], self.min[rows])))
        return QTensor(self.grid, codes.to(torch.uint8).view(shape), params)

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        base, step, nu = self.base[rows], self.step[rows], self.nu[rows]
        scale = self._steps()[0][rows].expand(-1, -1, self.grid.group_size).flatten(1)
        hard = base + step * (nu > 0)
        toward = -torch.sign(gradient) * torch.sign(scale)
        code = hard + self.grid.middle + toward
        outside = (code < 0) | (code > self.grid.top) | (scale == 0)
        base.copy_(hard)
        step.copy_(toward.masked_fill_(outside, 0))
        nu.copy_(aimed(gradient, curvature, scale.abs().clamp(min=1e-12), outside))
