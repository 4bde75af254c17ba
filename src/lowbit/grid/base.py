"""QTensor: integer codes with the grid that gives them meaning. The currency between methods, formats and kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import Affine, AffineParams


@dataclass(frozen=True)
class QTensor:
    """A weight as it will be stored. The codes are the product of this library: nothing ever re-derives them from floats.

    Attributes:
        grid: which numbers the codes stand for.
        codes: (out, in) uint8.
        params: the grid's scale and zero point, each (out, groups).
    """

    grid: Affine
    codes: Tensor
    params: AffineParams

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (out, in) weight, computed in the scale's dtype, then rounded to ``dtype``."""
        return self.grid.decode(self.codes, self.params).to(dtype)

    def same_as(self, other: QTensor) -> str | None:
        """None if both are equal bit for bit, else which part differs."""
        if self.grid != other.grid:
            return f"grid ({self.grid} against {other.grid})"
        if not torch.equal(self.codes, other.codes):
            return "codes"
        if not torch.equal(self.params.scale.float(), other.params.scale.float()):
            return "scale"
        if not torch.equal(self.params.zero_point.float(), other.params.zero_point.float()):
            return "zero_point"
        return None
