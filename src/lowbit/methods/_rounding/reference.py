"""Soft rounding in plain torch, in any float dtype: what the faster versions are measured by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._adam import Adam, moved

FROZEN = 100.0


class SoftRows(NamedTuple):
    """Weights between two codes: (code - zero + way * h(nu)) * scale - offset. All are contiguous.

    Attributes:
        nu: (rows, length) float32, any float dtype for the plain version.
        code: (rows, length) uint8. way: (rows, length) int8, -1, 0 or 1.
        zero, scale: (rows, 1) in nu's dtype. offset: the same, None for zeros.
    """

    nu: Tensor
    code: Tensor
    way: Tensor
    zero: Tensor
    scale: Tensor
    offset: Tensor | None = None


def rectified(nu: Tensor) -> Tensor:
    """h(nu), the stretched and clamped sigmoid of AdaRound."""
    return (1.2 * torch.sigmoid(nu) - 0.1).clamp(0, 1)


def slope(nu: Tensor) -> Tensor:
    """h'(nu), zero where h is clamped."""
    sigmoid = torch.sigmoid(nu)
    inside = (sigmoid > 0.1 / 1.2) & (sigmoid < 1.1 / 1.2)
    return 1.2 * sigmoid * (1 - sigmoid) * inside


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nu: Tensor) -> Tensor:
        ctx.save_for_backward(nu)
        return rectified(nu)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (nu,) = ctx.saved_tensors
        return gradients[0] * slope(nu)


def soft_rectified(nu: Tensor) -> Tensor:
    """h(nu), differentiable with `slope`."""
    if not (torch.is_grad_enabled() and nu.requires_grad):
        return rectified(nu)
    h: Tensor = _Rectified.apply(nu)  # type: ignore[no-untyped-call]
    return h


def inverse_rectified(h: Tensor) -> Tensor:
    """nu with h(nu) = h, for h in [0, 1]."""
    return -torch.log(1.2 / (h + 0.1) - 1)


def _position(soft: SoftRows) -> Tensor:
    dtype = soft.nu.dtype
    return torch.addcmul(soft.code.to(dtype) - soft.zero, soft.way.to(dtype), rectified(soft.nu))


def weights(soft: SoftRows, out: Tensor) -> None:
    """Soft weights into ``out``, (rows, length) in any float dtype."""
    found = _position(soft).mul_(soft.scale)
    out.copy_(found if soft.offset is None else found.sub_(soft.offset))


def gradients(gradient: Tensor, soft: SoftRows) -> tuple[Tensor, Tensor]:
    """By nu (rows, length), and by scale and minus the offset (rows, 2), from the gradient by the
    weights.

    Nothing is kept from `weights`: everything is computed from its inputs again.
    """
    g = gradient.to(soft.nu.dtype)
    sums = torch.stack([(g * _position(soft)).sum(1), g.sum(1)], 1)
    return g * soft.scale * soft.way * slope(soft.nu), sums


def descend(
    gradient: Tensor, soft: SoftRows, first: Tensor, second: Tensor, adam: Adam, sums: Tensor
) -> None:
    """One step of Adam on nu in place, and the sums of `gradients`; see the package."""
    by_nu, found = gradients(gradient, soft)
    sums.copy_(found)
    moved(soft.nu, by_nu, first, second, adam)
