"""QTensor: integer codes with the grid that gives them meaning. The currency between methods,
formats and kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

P = TypeVar("P", bound="Params")


@dataclass(frozen=True)
class Params:
    """What a grid needs besides codes. Each grid has a subclass, whose fields are all tensors."""

    def map(self: P, change: Callable[[Tensor], Tensor]) -> P:
        """The same with every tensor changed."""
        return type(self)(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self: P, device: torch.device) -> P:
        """The same on a device."""
        return self.map(lambda t: t.to(device))

    def differing(self: P, other: P) -> str | None:
        """Name of the first field whose numbers differ; None if all are equal."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return next((name for name, a, b in pairs if not torch.equal(a.float(), b.float())), None)


class Grid(Protocol):
    """Which numbers a weight may take: `Affine`, `Codebook` and `KQuant` are the ones there are. A
    grid holds no tensors.

    What a grid needs besides codes are its `Params`, of a type of its own.
    """

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def group_size(self) -> int | None:
        """Neighbouring inputs that share params; None for the grid's own default."""
        ...

    def fit(self, w: Tensor) -> Any:
        """Params for an (out, in) float weight."""
        ...

    def encode(self, w: Tensor, params: Any) -> Tensor:
        """Nearest codes, (out, in) uint8."""
        ...

    def decode(self, codes: Tensor, params: Any) -> Tensor:
        """(out, in) weights."""
        ...

    def stored(self, params: Any, dtype: torch.dtype) -> Any:
        """Params as an artifact of a model in ``dtype`` will hold them."""
        ...


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
class QTensor:
    """A weight as it will be stored. The codes are the product of this library: nothing ever
    re-derives them from floats.

    Attributes:
        grid: which numbers the codes stand for.
        codes: (out, in) uint8.
        params: the grid's own, such as `AffineParams`.
        outliers: entries that are not what their codes say, or None.
    """

    grid: Grid
    codes: Tensor
    params: Any
    outliers: Outliers | None = None

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (out, in) weight, computed in the params' dtype, then rounded to ``dtype``."""
        dense = self.grid.decode(self.codes, self.params).to(dtype)
        if self.outliers is not None:
            dense = (
                dense.flatten()
                .index_copy(0, self.outliers.index, self.outliers.values.to(dtype))
                .view(self.codes.shape)
            )
        return dense

    def to(self, device: torch.device) -> QTensor:
        """The same on a device."""
        return QTensor(
            self.grid,
            self.codes.to(device),
            self.params.to(device),
            self.outliers and self.outliers.to(device),
        )

    def same_as(self, other: QTensor) -> str | None:
        """None if both are equal bit for bit, else which part differs."""
        if self.grid != other.grid:
            return f"grid ({self.grid} against {other.grid})"
        if not torch.equal(self.codes, other.codes):
            return "codes"
        if (self.outliers or other.outliers) and (
            self.outliers is None or self.outliers.differing(other.outliers)
        ):
            return "outliers"
        part: str | None = self.params.differing(other.params)
        return part
