"""Scales in float16, for layouts that take no other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LowbitError

_LEAST = 2.0**-24  # the smallest float16 above zero
_NOTHING = 1e-4  # of a linear's largest step


def in_half(scale: Tensor, name: str) -> Tensor:
    """Positive scales as the nearest float16 numbers above zero.

    A group that was tuned to nothing has a scale below all of them: it gets the smallest, if that
    is nothing beside the largest scale.

    Raises:
        LowbitError: one is beyond float16, or would vanish in it though it is not small beside the
            others.
    """
    half = scale.to(torch.float16).contiguous()
    if _NOTHING * float(scale.max()) >= _LEAST:
        half = half.clamp(min=_LEAST)
    if not bool((torch.isfinite(half) & (half > 0)).all()):
        raise LowbitError(
            f"'{name}' has scales from {float(scale.min()):.3g} to {float(scale.max()):.3g}, which "
            "float16 does not hold."
        )
    return half
