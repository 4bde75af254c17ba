"""Sums over tokens of what follows from their logits, in parts: with a vocabulary of 262,144 the
logits of a thousand tokens take a gigabyte, and their gradients as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# (1, n, hidden) outputs and what belongs to the same tokens -> a sum over them
OfTokens = Callable[..., Tensor]


def summed(of: OfTokens, y: Tensor, others: Sequence[Tensor], most: int) -> Tensor:
    """``of(y, *others)``, a sum over tokens, with at most so many tokens at a time; differentiable
    by y, the gradient made with the value.

    Args:
        y: (n, length, hidden). others: (n, length, ...) each; not differentiated by.
    """
    if y.shape[0] * y.shape[1] <= most:
        return of(y, *others)
    found: Tensor = _Summed.apply(y, of, tuple(others), most)  # type: ignore[no-untyped-call]
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, of: OfTokens, others: tuple[Tensor, ...], most: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        flat = (t.detach().flatten(0, 1) for t in (y, *others))
        parts = [torch.split(t, most) for t in flat]
        total: Tensor | None = None
        gradients: list[Tensor] = []
        for part in zip(*parts, strict=True):
            own, *rest = (t[None] for t in part)  # (1, tokens, ...)
            with torch.set_grad_enabled(wanted):
                value = of(own.requires_grad_(wanted), *rest)
            if wanted:
                gradients += torch.autograd.grad(value, own)
            total = value.detach() if total is None else total + value.detach()
        assert total is not None
        if wanted:
            ctx.save_for_backward(torch.cat(gradients, 1).view_as(y))
        return total

    @staticmethod
    def backward(ctx: Any, *by_value: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_value[0], None, None, None
