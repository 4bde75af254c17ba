"""Activation grids: integers computed anew while the model runs, for every token or for all that
pass together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args

import torch
from torch import Tensor

from .affine import Affine


@dataclass(frozen=True)
class PerToken:
    """One scale and zero point for each vector along the last dimension, from its own minimum and
    maximum.

    On a linear's input that is per token; on keys and values (rows, heads, length, head width) it
    is per token and head.

    Attributes:
        bits: 2 to 8.
        symmetric: levels on both sides of zero, scale = max|x| / (2**(bits-1) - 1); else scale =
            (max - min) / (2**bits - 1) with the range extended to zero and an integer zero point.
        clip: both ends of the range are multiplied by it, in (0, 1].
        full_range: symmetric only, scale = max|x| / (2**(bits-1) - 0.5) as compressed-tensors has
            it: the lowest level is used too, the largest positive value is cut by half a step.

    Source: dynamic per-token quantization as in SmoothQuant (arXiv 2211.10438), QuaRot (2404.00456)
    and TesseraQ's WxAx runs.
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

    def mixes_rows(self, flat: bool) -> bool:
        """Whether a row's numbers depend on the other rows of a call.

        Args:
            flat: some linears get the tokens of all rows in one matrix.
        """
        return False

    def apart(self, flat: bool) -> str | None:
        """The option under which `mixes_rows` no longer holds, None if there is none."""
        return None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., n) float -> codes of the same shape in 0 ... 2**bits - 1, scale (..., 1),
        zero_point (..., 1); all float32.
        """
        wide = x.detach().float()
        grid = Affine(self.bits, symmetric=self.symmetric)
        low = wide.amin(-1, keepdim=True).clamp(max=0)
        high = wide.amax(-1, keepdim=True).clamp(min=0)
        params = grid.from_range(low * self.clip, high * self.clip)
        scale = params.scale
        if self.full_range:
            # -max|x| lies halfway between two codes: only the very division of the other loaders
            # rounds it as they do.
            scale = (torch.maximum(-low, high) * self.clip).clamp(min=1e-5) / (
                2 ** (self.bits - 1) - 0.5
            )
        codes = ((wide / scale).round_() + params.zero_point).clamp_(0, grid.top)
        return codes, scale, params.zero_point

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest representable values, in x's dtype; gradients pass unchanged
        (straight-through).
        """
        codes, scale, zero_point = self.codes(x)
        return _straight_through(x, codes.sub_(zero_point).mul_(scale).to(x.dtype))


Columns = Literal["call", "sequence"]

_LEAST_COLUMN = 1e-5  # of the largest column's maximum
_LEAST_SCALE = 1e-30


@dataclass(frozen=True)
class CrossQuant:
    """A scale for every element, from the maxima of its row (token) and its column (channel): t**a
    * c**(1-a) / (2**(bits-1) - 1).

    Dynamic, as published: column maxima are those of what is being quantized. That makes it a
    simulation: a token's numbers depend on tokens after it and, with ``columns="call"``, on the
    other sequences of the batch and on padding; a token that comes alone, as in generation, has
    scales that hold its own values; and no integer product can apply a scale that varies along the
    channels it sums over.

    Attributes:
        bits: 2 to 8, levels on both sides of zero.
        row_exponent: a in [0, 1], the paper's alpha, 0.15 there; 1 is one scale per token, 0 one
            per channel.
        columns: tokens over which a channel's maximum is taken: all of a "call", or those of each
            "sequence". Where a model hands a linear the tokens of all sequences in one matrix, as
            OPT does in its MLP, they are one sequence there.

    Source: CrossQuant (arXiv 2410.07505). Nothing is ever clipped: |x| is at most t and at most c,
    so at most t**a * c**(1-a).
    """

    bits: int
    row_exponent: float = 0.15
    columns: Columns = "call"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"activation bits must be 2 to 8 (or 16 for none), got {self.bits}")
        if not 0 <= self.row_exponent <= 1:
            raise ValueError(f"row_exponent must be in [0, 1], got {self.row_exponent}")
        if self.columns not in get_args(Columns):
            raise ValueError(
                f"columns must be one of {', '.join(get_args(Columns))}, got {self.columns!r}"
            )

    def mixes_rows(self, flat: bool) -> bool:
        return self.columns == "call" or flat

    def apart(self, flat: bool) -> str | None:
        return None if flat else "--set activations.columns=sequence"

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., tokens, channels) float -> signed codes and scales of the same shape, float32
        both.
        """
        wide = x.detach().float()
        size = wide.abs()
        rows = size.amax(-1, keepdim=True)
        if self.columns == "sequence":
            columns = size.amax(-2, keepdim=True)
        else:
            columns = size.flatten(0, -2).amax(0)
        columns = columns.clamp(min=_LEAST_COLUMN * columns.amax(-1, keepdim=True))
        top = 2 ** (self.bits - 1) - 1
        scale = (rows.pow(self.row_exponent) * columns.pow(1 - self.row_exponent) / top).clamp(
            min=_LEAST_SCALE
        )
        return (wide / scale).round_(), scale

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest representable values, in x's dtype; gradients pass unchanged
        (straight-through).
        """
        codes, scale = self.codes(x)
        return _straight_through(x, codes.mul_(scale).to(x.dtype))


@dataclass(frozen=True)
class LLMInt8:
    """Symmetric per token, but for channels in which some |x| reaches a threshold: those stay in
    floating point.

    The channels are looked for anew in everything that passes together, so a token's numbers depend
    on the others of its call. They count for no token's scale. In the product they meet the weight
    as it is decoded.

    Attributes:
        bits: 8 as published; 2 to 8. threshold: > 0.

    Source: LLM.int8() (arXiv 2208.07339), vector-wise quantization with mixed-precision
    decomposition.
    """

    bits: int = 8
    threshold: float = 6.0

    def __post_init__(self) -> None:
        PerToken(self.bits)
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")

    def mixes_rows(self, flat: bool) -> bool:
        return True

    def apart(self, flat: bool) -> str | None:
        return None

    def outliers(self, x: Tensor) -> Tensor:
        """(..., channels) -> (channels,) bool, the channels kept in floating point."""
        # In float32: a 16-bit tensor is compared with the threshold rounded to 16 bits.
        return (x.detach().float().abs() >= self.threshold).flatten(0, -2).any(0)

    @property
    def rest(self) -> PerToken:
        """The grid of the other channels."""
        return PerToken(self.bits, symmetric=True)

    def __call__(self, x: Tensor) -> Tensor:
        """The representable values, in x's dtype; gradients pass unchanged (straight-through)."""
        kept = self.outliers(x)
        return torch.where(kept, x, self.rest(x.masked_fill(kept, 0)))


ActivationGrid = Union[PerToken, CrossQuant, LLMInt8]


def activation_grid(fields: Mapping[str, Any]) -> type[PerToken] | type[CrossQuant] | type[LLMInt8]:
    """The kind of grid that has these options: `CrossQuant` with a row exponent, `LLMInt8` with a
    threshold, else `PerToken`.
    """
    return (
        CrossQuant if "row_exponent" in fields else LLMInt8 if "threshold" in fields else PerToken
    )


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach() if torch.is_grad_enabled() and x.requires_grad else value
