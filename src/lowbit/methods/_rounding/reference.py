"""Soft rounding in plain torch, in any float dtype: what the faster versions are measured by.

weight = (code - zero + way * h(nu)) * scale - offset, a row at a time: ``zero``, ``scale`` and
``offset`` are those of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._adam import Adam, moved


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


def _position(nu: Tensor, code: Tensor, way: Tensor, zero: Tensor) -> Tensor:
    return torch.addcmul(code.to(nu.dtype) - zero, way.to(nu.dtype), rectified(nu))


def weights(
    nu: Tensor,
    code: Tensor,
    way: Tensor,
    zero: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    """Soft weights into ``out``, (rows, length) in any float dtype; see the package for the
    rest.
    """
    soft = _position(nu, code, way, zero).mul_(scale)
    out.copy_(soft if offset is None else soft.sub_(offset))


def gradients(
    gradient: Tensor, nu: Tensor, code: Tensor, way: Tensor, zero: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """By nu (rows, length), and by scale and minus the offset (rows, 2), from the gradient by the
    weights.

    Nothing is kept from `weights`: everything is computed from its inputs again.
    """
    g = gradient.to(nu.dtype)
    sums = torch.stack([(g * _position(nu, code, way, zero)).sum(1), g.sum(1)], 1)
    return g * scale * way * slope(nu), sums


def descend(
    gradient: Tensor,
    nu: Tensor,
    code: Tensor,
    way: Tensor,
    zero: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
    adam: Adam,
    sums: Tensor,
) -> None:
    """One step of Adam on nu in place, and the sums of `gradients`; see the package."""
    by_nu, found = gradients(gradient, nu, code, way, zero, scale)
    sums.copy_(found)
    moved(nu, by_nu, first, second, adam)
