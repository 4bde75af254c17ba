"""One weight to tensors and back, whatever its grid, weights kept apart included."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, Coded
from . import LAYOUTS, outliers
from .dense import Dense
from .layout import Buffers, Layout


def pack(q: Coded, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight by their local names, on the CPU.

    Args:
        dtype: of stored scales.

    Raises:
        LowbitError: the grid has no layout, or a number would change when stored.
    """
    if type(q.grid) not in LAYOUTS:
        raise LowbitError(f"no format stores a {q.grid}.")
    out = {**LAYOUTS[type(q.grid)].pack(q, dtype), **outliers.pack(q)}
    return {k: t.cpu() for k, t in out.items()}


def unpack(tensors: Mapping[str, Tensor], grid: AnyGrid, name: str) -> Coded:
    """The inverse of `pack`.

    Args:
        tensors: local names -> tensors of one linear. name: its full name, for errors.

    Raises:
        LowbitError: a tensor is missing, damaged or of the wrong shape.
    """
    q = _layout(grid, name).unpack(tensors, grid, name)
    return replace(q, outliers=outliers.unpack(tensors, q.shape, name))


def opened(tensors: Mapping[str, Tensor], grid: AnyGrid, name: str) -> Coded | Dense:
    """The same weight for a look at it: its codes still packed if the layout can say so, without
    its outliers. Damage is found in them all the same.
    """
    layout = _layout(grid, name)
    q = (layout.opened or layout.unpack)(tensors, grid, name)
    outliers.unpack(tensors, q.shape, name)
    return q


def _layout(grid: AnyGrid, name: str) -> Layout[Any]:
    if type(grid) not in LAYOUTS:
        raise LowbitError(f"'{name}' has a grid that no format stores: {grid}.")
    return LAYOUTS[type(grid)]


def local_tensors(tensors: Mapping[str, Tensor], full: str) -> dict[str, Tensor]:
    """The packed tensors of the linear with this full name, by their local names."""
    prefix = f"{full}.weight_"
    return {k[len(full) + 1 :]: t for k, t in tensors.items() if k.startswith(prefix)}


def packed_linears(names: Collection[str]) -> list[str]:
    """Full names of the linears that are packed among the tensors of these names."""
    marks = _marks()
    return sorted({k.rpartition(".")[0] for k in names if k.rpartition(".")[2] in marks})


def is_packed(full: str, names: Collection[str]) -> bool:
    """Whether the linear with this full name is packed among the tensors of these names."""
    return any(f"{full}.{mark}" in names for mark in _marks())


def _marks() -> set[str]:
    return {layout.mark for layout in LAYOUTS.values()}


def tensor_bytes(grid: AnyGrid, rows: int, width: int, scale_bytes: int = 2) -> int:
    """Bytes of one packed linear on disk, headers, wider columns and outliers apart."""
    return LAYOUTS[type(grid)].tensor_bytes(grid, rows, width, scale_bytes)


def buffers(
    grid: AnyGrid,
    shape: tuple[int, int],
    stored: torch.dtype,
    columns: Mapping[int, int],
    kept: int | None,
) -> Buffers:
    """What `pack` makes: shape and dtype of each tensor by its local name.

    Args:
        shape: (out, in). stored: dtype of scales. columns: bits -> number of columns, by rising
            bits, of a grid whose columns differ. kept: number of outliers, None without any.
    """
    own = LAYOUTS[type(grid)].buffers(grid, *shape, stored, columns)
    return {**own, **outliers.buffers(*shape, kept)}


def counts(q: Coded) -> dict[str, Any]:
    """What the report says of a weight besides its shape and bytes: "columns" by their bits, where
    they may differ, and "outliers", where there are any.
    """
    out: dict[str, Any] = LAYOUTS[type(q.grid)].counts(q)
    return out if q.outliers is None else {**out, "outliers": len(q.outliers.index)}


def said(grid: AnyGrid) -> str:
    """A grid in words."""
    return LAYOUTS[type(grid)].words(grid) if type(grid) in LAYOUTS else str(grid)


def stays_packed(grid: AnyGrid) -> bool:
    """Whether a loaded model computes products from the packed tensors of such weights."""
    return type(grid) in LAYOUTS and LAYOUTS[type(grid)].stays_packed(grid)
