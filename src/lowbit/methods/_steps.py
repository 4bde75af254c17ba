"""Uniform levels of columns, as compiled column loops read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """Uniform levels for a run of columns: (code - zero) * scale, codes from 0 to ``top``.

    Attributes:
        scale, zero: (groups, rows) float32, contiguous.
        group: (columns,) int32, each column's row in them. top: the highest code.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    top: int
