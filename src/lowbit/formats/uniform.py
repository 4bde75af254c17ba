"""Uniform weights, as other runtimes have rules about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

from ..errors import LowbitError
from ..grid import Affine, AnyGrid


class Uniform(Protocol):
    """What formats and runtimes ask of a uniform grid."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int | None:
        """None for one scale per output."""

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are 2**(bits - 1), and none is stored."""

    def group(self, in_features: int) -> int:
        """The number of inputs that share a scale in a layer this wide."""
        ...


U = TypeVar("U", bound=Uniform)


def as_uniform(grid: AnyGrid) -> Uniform | None:
    """The grid as a uniform one; None if it is of another kind."""
    return grid if isinstance(grid, Affine) else None


def uniform(grid: AnyGrid, name: str, runtime: str) -> Uniform:
    """The grid as a uniform one.

    Args:
        name: the linear's full name, runtime: who reads it, for the error.

    Raises:
        LowbitError: it is of another kind, and the runtime reads uniform weights only.
    """
    found = as_uniform(grid)
    if found is None:
        raise LowbitError(
            f"'{name}' is on {grid}, and {runtime} is known to read uniform weights only: choose a "
            "recipe and a scheme for them, such as W4A16g128."
        )
    return found


def most_common(grids: Mapping[str, U]) -> tuple[U, dict[str, U]]:
    """The grid of most linears, and the linears with another."""
    counted = list(grids.values())
    common = max(sorted(set(counted), key=str), key=counted.count)
    return common, {n: g for n, g in sorted(grids.items()) if g != common}
