"""One weight to tensors and back, whatever its grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, Codebook, Grid, KQuant, QTensor
from . import blocks, columns
from . import compressed_tensors as ct


def pack(q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight by their local names; see `compressed_tensors`, `columns` and
    `blocks`.

    Args:
        dtype: of stored scales.
    """
    if isinstance(q.grid, Codebook):
        return columns.pack(q)
    if isinstance(q.grid, KQuant):
        return blocks.pack(q)
    return {**ct.pack(q, dtype), **columns.pack_outliers(q)}


def unpack(tensors: Mapping[str, Tensor], grid: Grid, name: str) -> QTensor:
    """The inverse of `pack`.

    Raises:
        LowbitError: a tensor is missing, damaged or of the wrong shape.
    """
    if isinstance(grid, Codebook):
        return columns.unpack(tensors, grid, name)
    if isinstance(grid, KQuant):
        return blocks.unpack(tensors, grid, name)
    if not isinstance(grid, Affine):
        raise LowbitError(f"'{name}' has a grid that no format stores: {grid}.")
    q = ct.unpack(tensors, grid, name)
    rows, width = q.codes.shape
    return replace(q, outliers=columns.unpack_outliers(tensors, (rows, width), name))


def local_tensors(tensors: Mapping[str, Tensor], full: str) -> dict[str, Tensor]:
    """The packed tensors of the linear with this full name, by their local names."""
    prefix = f"{full}.weight_"
    return {k[len(full) + 1 :]: t for k, t in tensors.items() if k.startswith(prefix)}


def packed_linears(tensors: Mapping[str, Tensor]) -> list[str]:
    """Full names of the linears that are packed among these tensors."""
    return sorted({k.rpartition(".")[0] for k in tensors if k.endswith(".weight_shape")})


def tensor_bytes(grid: Grid, rows: int, width: int, scale_bytes: int = 2) -> int:
    """Bytes of one packed linear on disk, headers, wider columns and outliers apart."""
    if isinstance(grid, Codebook):
        return columns.tensor_bytes(grid, rows, width)
    if isinstance(grid, KQuant):
        return blocks.tensor_bytes(grid, rows, width)
    assert isinstance(grid, Affine)
    return ct.tensor_bytes(grid, rows, width, scale_bytes)
