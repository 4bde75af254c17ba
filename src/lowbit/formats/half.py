"""Scales in float16, for layouts that take no other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LowbitError


def in_half(scale: Tensor, name: str) -> Tensor:
    """Positive scales as the nearest float16 numbers.

    Raises:
        LowbitError: one is beyond float16, or would vanish in it.
    """
    half = scale.to(torch.float16).contiguous()
    if not bool((torch.isfinite(half) & (half > 0)).all()):
        raise LowbitError(
            f"'{name}' has scales from {float(scale.min()):.3g} to {float(scale.max()):.3g}, which "
            "float16 does not hold."
        )
    return half
