"""Activation grids: integers computed anew for every token while the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import Affine


@dataclass(frozen=True)
class PerToken:
    """One scale and zero point for each vector along the last dimension, from its own minimum and maximum.

    On a linear's input that is per token; on keys and values (rows, heads, length, head width) it is per token and head.

    Attributes:
        bits: 2 to 8.
        symmetric: levels on both sides of zero, scale = max|x| / (2**(bits-1) - 1); else scale = (max - min) / (2**bits - 1)
            with the range extended to zero and an integer zero point.
        clip: both ends of the range are multiplied by it, in (0, 1].
        full_range: symmetric only, scale = max|x| / (2**(bits-1) - 0.5) as compressed-tensors has it: the lowest level is used
            too, the largest positive value is cut by half a step.

    Source: dynamic per-token quantization as in SmoothQuant (arXiv 2211.10438), QuaRot (2404.00456) and TesseraQ's WxAx runs.
    """

    bits: int
    symmetric: bool = False
    clip: float = 1.0
    full_range: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activation bits must be 2 to 8 (or 16 for none), got {self.bits}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"an activation clip must be in (0, 1], got {self.clip}")
        if self.full_range and not self.symmetric:
            raise ValueError("full_range is a kind of symmetric grid: set symmetric too")

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., n) float -> codes of the same shape in 0 ... 2**bits - 1, scale (..., 1), zero_point (..., 1); all float32."""
        wide = x.detach().float()
        grid = Affine(self.bits, symmetric=self.symmetric)
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        params = grid.from_range(low * self.clip, high * self.clip)
        scale = params.scale
        if self.full_range:
            # -max|x| lies halfway between two codes: only the very division of the other loaders rounds it as they do.
            scale = (torch.maximum(-low, high) * self.clip).clamp(min=1e-5) / (2 ** (self.bits - 1) - 0.5)
        codes = ((wide / scale).round_() + params.zero_point).clamp_(0, grid.top)
        return codes, scale, params.zero_point

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest representable values, in x's dtype; gradients pass unchanged (straight-through)."""
        codes, scale, zero_point = self.codes(x)
        value = codes.sub_(zero_point).mul_(scale).to(x.dtype)
        return x + (value - x).detach() if torch.is_grad_enabled() and x.requires_grad else value
