"""QTensor: integer codes with the grid that gives them meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .base import AnyGrid
from .params import Params

G_co = TypeVar("G_co", bound=AnyGrid, covariant=True)
P_co = TypeVar("P_co", bound=Params, covariant=True)


@dataclass(frozen=True)
class Outliers:
    """Weights kept in floating point.

    Attributes:
        index: (n,) int64 ascending, row * in_features + column.
        values: (n,) float32, numbers that float16 can hold.
    """

    index: Tensor
    values: Tensor

    def differing(self, other: Outliers | None) -> bool:
        """Whether anything is not equal."""
        return other is None or not (
            torch.equal(self.index, other.index) and torch.equal(self.values, other.values)
        )

    def to(self, device: torch.device) -> Outliers:
        """The same on a device."""
        return Outliers(self.index.to(device), self.values.to(device))


@dataclass(frozen=True)
class QTensor(Generic[G_co, P_co]):
    """A weight as it will be stored: the currency between methods, formats and kernels.

    The codes are the product of this library: nothing ever re-derives them from floats.

    Attributes:
        grid: which numbers the codes stand for.
        codes: (out, in) uint8.
        params: the grid's own, such as `AffineParams`.
        outliers: entries that are not what their codes say, or None.
    """

    grid: G_co
    codes: Tensor
    params: P_co
    outliers: Outliers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (out, in) weight, computed in the params' dtype, then rounded to ``dtype``."""
        dense = self.grid.decode(self.codes, self.params).to(dtype)
        if self.outliers is not None:
            values = self.outliers.values.to(dtype)
            dense = dense.flatten().index_copy(0, self.outliers.index, values)
        return dense.view(self.codes.shape)

    def to(self, device: torch.device) -> QTensor[G_co, P_co]:
        """The same on a device."""
        outliers = self.outliers and self.outliers.to(device)
        return QTensor(self.grid, self.codes.to(device), self.params.to(device), outliers)

    def same_as(self, other: Coded) -> str | None:
        """None if both are equal bit for bit, else which part differs."""
        if self.grid != other.grid:
            return f"grid ({self.grid} against {other.grid})"
        if not torch.equal(self.codes, other.codes):
            return "codes"
        if (self.outliers or other.outliers) and (
            self.outliers is None or self.outliers.differing(other.outliers)
        ):
            return "outliers"
        params: Params = self.params
        return params.differing(other.params)


Coded = QTensor[AnyGrid, Params]
