"""The uniform grid: w = (code - zero_point) * scale, one scale and zero point per group of
consecutive inputs of one row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Fixed, Levels, Linear, LinearGrid, Neighbours, RangedGrid
from .params import Params, stacked
from .straight import through

_LEAST_RANGE = 1e-5  # as the reference implementations of AWQ, OmniQuant and TesseraQ
_NAME = re.compile(r"w(\d+)(?:g(\d+))?(sym|asym)?", re.IGNORECASE)


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
class Affine(LinearGrid[AffineParams], RangedGrid[AffineParams]):
    """Uniform integer grid with codes 0 ... 2**bits - 1.

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
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        return f"W{self.bits}{group}{'sym' if self.symmetric else ''}"

    @classmethod
    def parse(cls, text: str) -> Affine | None:
        found = _NAME.fullmatch(text)
        if not found:
            return None
        bits, group, kind = found.groups()
        return cls(int(bits), int(group) if group else None, (kind or "").lower() == "sym")

    def with_bits(self, bits: int) -> Affine:
        return replace(self, bits=bits)

    @property
    def top(self) -> int:
        """The highest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    def check(self, width: int) -> None:
        self.group(width)

    def group(self, in_features: int) -> int:
        size = self.group_size or in_features
        if in_features % size:
            raise ValueError(f"group size {size} does not divide the {in_features} inputs")
        return size

    @property
    def rows_apart(self) -> bool:
        return True

    @property
    def of_lists(self) -> Affine:
        return replace(self, group_size=None)

    def lists(self, w: Tensor) -> Tensor:
        return w.reshape(-1, self.group(w.shape[1]))

    def unlisted(self, lists: Tensor, rows: int) -> Tensor:
        return lists.reshape(rows, -1)

    def period(self, width: int) -> int:
        return self.group(width)

    def join(self, parts: list[AffineParams]) -> AffineParams:
        return stacked(parts, 1)

    def ends(self, w: Tensor) -> tuple[Tensor, Tensor]:
        g = self.grouped(w)  # (out, groups, group)
        return g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)  # (out, groups) each

    def fit(self, w: Tensor, importance: Tensor | None = None) -> AffineParams:
        """Scale and zero point from the minimum and maximum of each group.

        Args:
            w: (out, in) float; the arithmetic is done in its dtype. importance: has no effect.
        """
        return self.from_range(*self.ends(w))

    def from_range(self, low: Tensor, high: Tensor) -> AffineParams:
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            scale = torch.maximum(-low, high).clamp(min=_LEAST_RANGE) / (half - 1)
            return AffineParams(scale, torch.full_like(scale, half))
        scale = (high - low).clamp(min=_LEAST_RANGE) / self.top
        zero = -low / scale
        return AffineParams(scale, through(zero, zero.round()).clamp(0, self.top))

    def encode(self, w: Tensor, params: AffineParams) -> Tensor:
        """Nearest codes: round-half-even of w / scale, plus the zero point, clamped."""
        g = (self.grouped(w) / params.scale[..., None]).round() + params.zero_point[..., None]
        return g.clamp(0, self.top).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: AffineParams) -> Tensor:
        """(out, in) codes -> (out, in) weights in the scale's dtype."""
        g = self.grouped(codes).to(params.scale.dtype)
        return ((g - params.zero_point[..., None]) * params.scale[..., None]).flatten(1)

    def rounded(self, w: Tensor, params: AffineParams) -> Tensor:
        scale, zero = params.scale[..., None], params.zero_point[..., None]
        steps = self.grouped(w) / scale  # (out, groups, group)
        codes = (through(steps, steps.round()) + zero).clamp(0, self.top)
        return ((codes - zero) * scale).flatten(1)

    def stored(self, params: AffineParams, dtype: torch.dtype) -> AffineParams:
        """The same parameters after a trip through the dtype in which an artifact stores its
        scales.

        Tuning with these, nothing is lost when the artifact is written. A scale that would vanish
        becomes the least normal number of that dtype.
        """
        held = params.scale.detach().to(dtype).clamp(min=torch.finfo(dtype).tiny)
        return AffineParams(through(params.scale, held.to(params.scale.dtype)), params.zero_point)

    def take(self, params: AffineParams, column: int) -> Levels:
        group = column // self.group_size if self.group_size else 0
        here = slice(group, group + 1)
        one = AffineParams(params.scale[:, here], params.zero_point[:, here])  # (out, 1) each
        return Fixed(replace(self, group_size=None), one)

    def neighbours(self, w: Tensor, params: AffineParams) -> Neighbours:
        ratio = self.grouped(w).float() / params.scale[..., None]  # (out, groups, group)
        floor, zero = ratio.floor(), params.zero_point[..., None]
        below, above = (t.clamp(0, self.top) for t in (floor + zero, floor + 1 + zero))
        low, high = (t.to(torch.uint8).flatten(1) for t in (below, above))
        return Neighbours(low, high, (ratio - floor).clamp(0, 1 - 2**-24).flatten(1))

    def beside(self, codes: Tensor, toward: Tensor, params: AffineParams) -> Tensor:
        wanted = codes.to(torch.int16) + toward.to(torch.int16)
        return wanted.clamp(0, self.top).to(torch.uint8)

    def freedom(self, params: AffineParams) -> torch.Size:
        return params.scale.shape

    def moved(self, params: AffineParams, factor: Tensor) -> AffineParams:
        return AffineParams(params.scale * factor, params.zero_point)

    def linear(self, params: AffineParams) -> Linear:
        return Linear(params.zero_point.reshape(-1, 1), params.scale.reshape(-1, 1), None)
