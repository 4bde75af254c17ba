"""Soft weights on K-quants: the units of scales and minima are tuned, their small multiples stay;
see `_buckets`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grid import KQuant, KQuantParams, QTensor
from ..grid.kquant import SUPER
from ..model.block import Block
from . import _rounding
from ._buckets import Moments, Room, aimed
from ._rounding import FROZEN, Adam, inverse_rectified, moved, rectified, slope


class KQuantBucket:
    """weight = (code - middle + way * h(nu)) * scale - offset: one row per 256 inputs, scale and
    offset by its sub-blocks.

    scale = half(unit * phi(v_0)) * multiple and offset = half(unit_min * phi(v_1)) * multiple_min,
    phi(v) = 2 h(v). ``way`` is 1, or 0 where the other code lies outside the range; after `aim`
    also -1.

    Args:
        block: what is tuned. names: linears on one and the same grid. from_codes: start on their
            codes, frozen.
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
                code = block.coded[name].codes.reshape(-1, SUPER)
                nu, way = (
                    torch.full(code.shape, -FROZEN, device=code.device),
                    torch.zeros_like(code, dtype=torch.int8),
                )
            else:
                position = grid.position(weight.float(), params).reshape(-1, SUPER)
                floor = position.floor()
                low, high = (t.clamp(0, grid.top) for t in (floor, floor + 1))
                nu = inverse_rectified((position - floor).clamp(0, 1 - 2**-24))
                code, way = low.to(torch.uint8), (high - low).to(torch.int8)
            unit, least = params.unit.reshape(-1, 1), params.unit_min.reshape(-1, 1)
            multiples = [t.reshape(len(unit), -1) for t in (params.scale, params.min)]
            parts.append(
                (
                    nu,
                    code,
                    way,
                    torch.cat([unit, least], 1).float(),
                    *(t.float() for t in multiples),
                )
            )
            self.rows.append(slice(at, at + len(unit)))
            at += len(unit)
        self.nu, self.code, self.way, self.units, self.scale, self.min = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        self.v = torch.zeros_like(self.units)
        self._nu_moments, self._v_moments, self._room = Moments(self.nu), Moments(self.v), Room()
        self._middle = torch.full(
            (self.scale.numel(), 1), float(grid.middle), device=self.nu.device
        )
        self._by_unit = torch.zeros_like(self.units)
        self._now = self._steps()

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

    def values(self, dtype: torch.dtype) -> Tensor:
        self._now = self._steps()
        scale, offset = (t.reshape(-1, 1) for t in self._now)
        out = self._room.like(self.nu, dtype)
        nu, code, way, to = (
            t.view(-1, self.grid.group_size) for t in (self.nu, self.code, self.way, out)
        )
        _rounding.weights(nu, code, way, self._middle, scale, offset, to)
        return out

    def start(self) -> None:
        self._nu_moments.reset()
        self._v_moments.reset()

    def descend(self, rows: slice, gradient: Tensor, adam: Adam) -> None:
        m, width = self._nu_moments, self.grid.group_size
        nu, code, way, first, second = (
            t[rows].view(-1, width) for t in (self.nu, self.code, self.way, m.first, m.second)
        )
        scale = self._now[0][rows].reshape(-1, 1)
        sums = _rounding.descend(
            gradient.reshape(-1, width),
            nu,
            code,
            way,
            self._middle[: len(scale)],
            scale,
            first,
            second,
            adam,
        )
        by_scale, by_offset = (sums[:, i].view(-1, SUPER // width) for i in (0, 1))
        self._by_unit[rows] = torch.stack(
            [(by_scale * self.scale[rows]).sum(1), -(by_offset * self.min[rows]).sum(1)], 1
        )

    def retune(self, adam: Adam, decay: float) -> None:
        gradient = self._by_unit * self.units * (2 * slope(self.v))
        moved(
            self.v,
            gradient.add_(self.v, alpha=decay),
            self._v_moments.first,
            self._v_moments.second,
            adam,
        )

    def coded(self, rows: slice, shape: torch.Size) -> QTensor:
        codes = self.code[rows] + self.way[rows] * (self.nu[rows] > 0)
        units = self.stored_units()[rows]
        params = KQuantParams(
            *(
                t.reshape(shape[0], -1).clone()
                for t in (units[:, 0], self.scale[rows], units[:, 1], self.min[rows])
            )
        )
        return QTensor(self.grid, codes.to(torch.uint8).view(shape), params)

    def aim(self, rows: slice, gradient: Tensor, curvature: Tensor) -> None:
        code, way, nu = self.code[rows], self.way[rows], self.nu[rows]
        scale = self._steps()[0][rows].expand(-1, -1, self.grid.group_size).flatten(1)
        code.copy_(code + way * (nu > 0))
        way.copy_(-torch.sign(gradient) * torch.sign(scale))
        other = code.to(torch.int16) + way
        outside = (other < 0) | (other > self.grid.top) | (scale == 0)
        way.masked_fill_(outside, 0)
        nu.copy_(aimed(gradient, curvature, scale.abs().clamp(min=1e-12), outside))
