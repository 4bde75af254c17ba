"""Straight-through gradients: a rounded value whose gradient is that of what was rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smooth: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(smooth: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` exactly; its gradient goes to ``smooth``, both of one shape."""
    if not (torch.is_grad_enabled() and smooth.requires_grad):
        return value
    out: Tensor = _Through.apply(smooth, value.detach())  # type: ignore[no-untyped-call]
    return out
