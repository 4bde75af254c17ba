"""MXFP4, the 4-bit microscaling format: w = level * 2**exponent, one exponent per 32 inputs.

Levels are the numbers of e2m1, a float of one sign, two exponent and one mantissa bit: 0, 0.5, 1,
1.5, 2, 3, 4, 6 and their negatives. Codes are in ascending order of the level, so that neighbours
differ by 1, and zero has one code. Scales are powers of two: level * scale is exact in bfloat16.

Source: OCP Microscaling Formats (MX) specification 1.0, which rounds the exponent of the largest
weight down. Here it is chosen by the squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Levels, Neighbours, OrderedGrid, RangedGrid
from .params import Params, picked, stacked
from .straight import through

GROUP = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (*(-m for m in MAGNITUDES[:0:-1]), *MAGNITUDES)
ZERO = len(MAGNITUDES) - 1  # the code of zero
TOP = len(LEVELS) - 1
# From the least normal float32 to the largest scale at which 6 is finite.
LEAST, MOST = -126, 125
# A scale between 2**e and 2**(e + 1) is rounded up from this ratio on. Of ranges: the largest
# weight may be clipped by a sixth if the others get a finer scale; least squared error of groups of
# normal, Laplace, Student's t and uniform weights alike. Of scales under codes that stay: the
# nearer one.
_OF_RANGES, _OF_SCALES = 1.2, 1.5
_FINER = 3  # exponents tried for a group: that which clips nothing, and smaller ones


@dataclass(frozen=True)
class MXFP4Params(Params):
    """What an `MXFP4` grid needs besides its codes.

    Attributes:
        scale: (out, groups) float, > 0; as stored a power of two.
    """

    scale: Tensor


@dataclass(frozen=True)
class MXFP4(OrderedGrid[MXFP4Params], RangedGrid[MXFP4Params]):
    """The grid of MXFP4, with codes 0 ... 14."""

    @property
    def name(self) -> str:
        return "mxfp4"

    @classmethod
    def parse(cls, text: str) -> MXFP4 | None:
        return cls() if text.lower() == "mxfp4" else None

    @property
    def bits(self) -> int:
        return 4

    def with_bits(self, bits: int) -> MXFP4:
        if bits != 4:
            raise ValueError(f"{self} has 4 bits, not {bits}")
        return self

    @property
    def group_size(self) -> int:
        return GROUP

    def check(self, width: int) -> None:
        self.group(width)

    def group(self, in_features: int) -> int:
        if in_features % GROUP:
            raise ValueError(
                f"{self} comes in blocks of {GROUP} inputs, which do not divide the {in_features} "
                "inputs"
            )
        return GROUP

    @property
    def rows_apart(self) -> bool:
        return True

    @property
    def of_lists(self) -> MXFP4:
        return self

    def lists(self, w: Tensor) -> Tensor:
        return w.reshape(-1, GROUP)

    def unlisted(self, lists: Tensor, rows: int) -> Tensor:
        return lists.reshape(rows, -1)

    def period(self, width: int) -> int:
        return GROUP

    def join(self, parts: list[MXFP4Params]) -> MXFP4Params:
        return stacked(parts, 1)

    def ends(self, w: Tensor) -> tuple[Tensor, Tensor]:
        g = self.grouped(w)  # (out, groups, 32)
        return g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)  # (out, groups) each

    def fit(self, w: Tensor, importance: Tensor | None = None) -> MXFP4Params:
        """The power of two with the least squared error, of those that clip up to three quarters of
        a group's largest weight.

        Args:
            w: (out, in) float. importance: (in,) or (out, in) positive, or None.
        """
        low, high = self.ends(w)
        whole = _power(torch.maximum(-low, high) / MAGNITUDES[-1], above=1.0)  # clips nothing
        g = self.grouped(w)
        weight = None if importance is None else self.grouped(importance.expand_as(w))
        tried, errors = [], []
        for finer in range(_FINER):
            params = MXFP4Params((whole / 2**finer).clamp(min=2.0**LEAST))
            square = (self.grouped(self.rounded(w, params)) - g).square()
            tried.append(params)
            errors.append((square if weight is None else square * weight).sum(-1).flatten())
        return picked(tried, torch.stack(errors).argmin(0))

    def from_range(self, low: Tensor, high: Tensor) -> MXFP4Params:
        wanted = torch.maximum(-low, high) / MAGNITUDES[-1]
        return MXFP4Params(through(wanted, _power(wanted, above=_OF_RANGES)))

    def encode(self, w: Tensor, params: MXFP4Params) -> Tensor:
        """Codes of the nearest levels; halfway, of the one whose mantissa bit is 0."""
        return _codes(self.grouped(w) / params.scale[..., None]).flatten(1)

    def decode(self, codes: Tensor, params: MXFP4Params) -> Tensor:
        """(out, in) codes -> (out, in) weights in the scale's dtype."""
        return (_levels(self.grouped(codes), params.scale) * params.scale[..., None]).flatten(1)

    def rounded(self, w: Tensor, params: MXFP4Params) -> Tensor:
        scale = params.scale[..., None]
        steps = (self.grouped(w) / scale).clamp(LEVELS[0], LEVELS[-1])  # (out, groups, 32)
        return (through(steps, _levels(_codes(steps.detach()), steps)) * scale).flatten(1)

    def stored(self, params: MXFP4Params, dtype: torch.dtype) -> MXFP4Params:
        """The nearest powers of two, whatever the ``dtype`` of the model."""
        return MXFP4Params(through(params.scale, _power(params.scale, above=_OF_SCALES)))

    def take(self, params: MXFP4Params, column: int) -> Levels:
        group = column // GROUP
        return _Column(params.scale[:, group : group + 1])

    def neighbours(self, w: Tensor, params: MXFP4Params) -> Neighbours:
        steps = (self.grouped(w).float() / params.scale[..., None]).clamp(LEVELS[0], LEVELS[-1])
        levels = torch.tensor(LEVELS, dtype=steps.dtype, device=steps.device)
        low = torch.searchsorted(levels, steps.contiguous(), right=True) - 1
        high = (low + 1).clamp(max=TOP)
        gap = (levels[high] - levels[low]).clamp(min=MAGNITUDES[1])  # 0 at the upper end
        fraction = ((steps - levels[low]) / gap).clamp(0, 1 - 2**-24)
        below, above = (t.to(torch.uint8).flatten(1) for t in (low, high))
        return Neighbours(below, above, fraction.flatten(1))

    def beside(self, codes: Tensor, toward: Tensor, params: MXFP4Params) -> Tensor:
        wanted = codes.to(torch.int16) + toward.to(torch.int16)
        return wanted.clamp(0, TOP).to(torch.uint8)

    def freedom(self, params: MXFP4Params) -> torch.Size:
        return params.scale.shape

    def moved(self, params: MXFP4Params, factor: Tensor) -> MXFP4Params:
        return MXFP4Params(params.scale * factor)


@dataclass(frozen=True, eq=False)
class _Column:
    """`Levels` of one input: scale (out, 1)."""

    scale: Tensor

    def encode(self, w: Tensor) -> Tensor:
        return _codes(w / self.scale)

    def decode(self, codes: Tensor) -> Tensor:
        return _levels(codes, self.scale) * self.scale


def _codes(steps: Tensor) -> Tensor:
    """The nearest codes, uint8, of weights divided by their scale; halfway, the even ones."""
    size = steps.abs().clamp(max=MAGNITUDES[-1])
    octave = (size >= 2).to(size.dtype) + (size >= 4)  # levels are 0.5, 1 and 2 apart in it
    # Even multiples of the distance have even codes, and `round` picks them halfway.
    number = (size * torch.exp2(1 - octave)).round() + 2 * octave
    number = number.to(torch.uint8).clamp(max=TOP - ZERO)  # whatever a weight that is not finite is
    return torch.where(steps < 0, ZERO - number, ZERO + number)


def _levels(codes: Tensor, like: Tensor) -> Tensor:
    """The levels of codes, in the dtype and on the device of another tensor."""
    levels = torch.tensor(LEVELS, dtype=like.dtype, device=like.device)
    return levels[codes.to(torch.int64)]


def _power(scale: Tensor, above: float) -> Tensor:
    """Powers of two for scales, the larger one from a ratio on, the least one for zero; what is not
    finite stays.

    Args:
        above: of the scale to the power of two below it, 1 to 2; at 1 only powers of two stay.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    mantissa, exponent = torch.frexp(scale.detach().to(wide))  # mantissa in [0.5, 1)
    ratio = 2 * mantissa
    up = ratio > 1 if above == 1 else ratio >= above
    wanted = (exponent.to(torch.int32) - 1 + up.to(torch.int32)).clamp(LEAST, MOST)
    wanted = torch.where(scale > 0, wanted, LEAST)
    # The bits of a float32 with that exponent: exp2 may be off by a digit.
    power = ((wanted + 127) << 23).view(torch.float32).to(scale.dtype)
    return torch.where(scale.isfinite(), power, scale.detach())
