"""The uniform grid: w = (code - zero_point) * scale, one scale and zero point per group of
consecutive inputs of one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Params

_LEAST_RANGE = 1e-5  # as the reference implementations of AWQ, OmniQuant and TesseraQ


@dataclass(frozen=True)
class AffineParams(Params):
    """What an `Affine` grid needs besides its codes.

    Attributes:
        scale: (out, groups) float, > 0.
        zero_point: (out, groups) float holding integers in [0, 2**bits - 1].
    """

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class Affine:
    """Uniform integer grid with codes 0 ... 2**bits - 1. Holds no tensors.

    Attributes:
        bits: 1 to 8.
        group_size: consecutive input channels that share a scale; None means the whole row (per
            output channel).
        symmetric: the zero point is fixed at 2**(bits-1), so the levels are -2**(bits-1) ...
            2**(bits-1)-1 times the scale.

    Source: TesseraQ's weight quantizer (asymmetric, integer zero point clamped to the code range).
    A group whose weights all have one sign gets its range extended to zero, as in GPTQ; otherwise
    part of the code range would be lost.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.symmetric and self.bits == 1:
            raise ValueError(
                "a symmetric grid needs at least 2 bits: with one, its only positive level would "
                "be missing"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")

    @property
    def top(self) -> int:
        """The highest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    def group(self, in_features: int) -> int:
        """The number of inputs that share a scale in a layer this wide.

        Raises:
            ValueError: the group size does not divide the width.
        """
        size = self.group_size or in_features
        if in_features % size:
            raise ValueError(f"group size {size} does not divide the {in_features} inputs")
        return size

    def grouped(self, w: Tensor) -> Tensor:
        """View (out, in) as (out, groups, group)."""
        return w.reshape(w.shape[0], -1, self.group(w.shape[1]))

    def fit(self, w: Tensor, clip: Tensor | float = 1.0) -> AffineParams:
        """Scale and zero point from the minimum and maximum of each group, both multiplied by
        ``clip``.

        Args:
            w: (out, in) float; the arithmetic is done in its dtype.
            clip: a number or (out, groups), in (0, 1].
        """
        g = self.grouped(w)  # (out, groups, group)
        low, high = g.amin(-1).clamp(max=0) * clip, g.amax(-1).clamp(min=0) * clip
        return self.from_range(low, high)

    def from_range(self, low: Tensor, high: Tensor) -> AffineParams:
        """Scale and zero point for given group minima (<= 0) and maxima (>= 0), each (out,
        groups).
        """
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            scale = torch.maximum(-low, high).clamp(min=_LEAST_RANGE) / (half - 1)
            return AffineParams(scale, torch.full_like(scale, half))
        scale = (high - low).clamp(min=_LEAST_RANGE) / self.top
        return AffineParams(scale, (-(low / scale).round()).clamp(0, self.top))

    def position(self, w: Tensor, params: AffineParams) -> Tensor:
        """Where each weight lies between the codes: w / scale + zero_point, (out, in), not clamped,
        not rounded.
        """
        return (self.grouped(w) / params.scale[..., None] + params.zero_point[..., None]).flatten(1)

    def encode(self, w: Tensor, params: AffineParams) -> Tensor:
        """Nearest codes: round-half-even of w / scale, plus the zero point, clamped. (out, in)
        float -> (out, in) uint8.
        """
        g = (self.grouped(w) / params.scale[..., None]).round() + params.zero_point[..., None]
        return g.clamp(0, self.top).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: AffineParams) -> Tensor:
        """(out, in) codes -> (out, in) weights in the scale's dtype."""
        g = self.grouped(codes).to(params.scale.dtype)
        return ((g - params.zero_point[..., None]) * params.scale[..., None]).flatten(1)

    def stored(self, params: AffineParams, dtype: torch.dtype) -> AffineParams:
        """The same parameters after a trip through the dtype in which an artifact stores its
        scales.

        Tuning with these, nothing is lost when the artifact is written. A scale that would vanish
        becomes the least normal number of that dtype.
        """
        scale = params.scale.to(dtype).clamp(min=torch.finfo(dtype).tiny).to(params.scale.dtype)
        return AffineParams(scale, params.zero_point)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of one layer: codes, scales and packed zero points (its few words
        of padding apart).
        """
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.group(
            in_features
        )

    def __str__(self) -> str:
        return (
            f"W{self.bits}"
            + (f"g{self.group_size}" if self.group_size else "")
            + ("sym" if self.symmetric else "")
        )
