"""The KL divergence between two next-token distributions, with its gradient made in the same few
passes over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(softmax(expected) || softmax(logits)) summed over tokens, () float32 at
    least; differentiable by ``logits``.

    Its derivative is the difference of the two distributions, so that neither the logarithms nor a
    graph of them need be kept.

    Args:
        logits, expected: (..., vocab) floats.
    """
    found: Tensor = _Divergence.apply(logits, expected)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        own = logits.detach().to(wide).log_softmax(-1)
        wanted = expected.to(wide).log_softmax(-1)
        probability = wanted.exp()
        total = wanted.sub_(own).mul_(probability).sum()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(own.exp_().sub_(probability).to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *by_value: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_value[0], None
