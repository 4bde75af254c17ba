"""Sums that come out the same on every run of a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_kernels import kernels

# Numbers in one launch: a column of a weight takes three, however many levels it has.
_AT_ONCE = 1 << 22


def sums_by(index: Tensor, values: Tensor, count: int) -> Tensor:
    """(rows, count) sums of (rows, length) values by their (rows, length) int64 index, each added
    up in one order.

    An accelerator's scatter adds in whatever order its threads arrive; the sum of a masked row has
    one order.
    """
    if values.device.type == "cpu":
        return values.new_zeros(len(values), count).scatter_add_(1, index, values)
    triton = kernels(f"{__package__}.sums_gpu", values.device)
    if triton is None:
        return _masked(index, values, count)
    found: Tensor = triton.sums_by(index, values, count)
    return found


def _masked(index: Tensor, values: Tensor, count: int) -> Tensor:
    if values.numel() * count <= _AT_ONCE:
        each = torch.arange(count, dtype=index.dtype, device=index.device)[:, None]
        return torch.where(index[:, None] == each, values[:, None], 0).sum(2)
    return torch.stack([torch.where(index == i, values, 0).sum(1) for i in range(count)], dim=1)
