"""K-quants in an artifact of this library: the very blocks that a GGUF file holds, a row of them
per output.

Per linear X: X.weight_blocks (out, bytes of a row) uint8, as `lowbit.formats.ggml` packs them, and
X.weight_shape int64 (2,).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import KQuant, QTensor
from .ggml import BLOCKS, pack_k, unpack_k


def row_bytes(grid: KQuant, width: int) -> int:
    """Bytes of a row of blocks."""
    return BLOCKS[grid.kind.upper()].row_bytes(width)


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of one weight by their local names."""
    return {
        "weight_blocks": pack_k(q),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], grid: KQuant, name: str) -> QTensor:
    """The inverse of `pack`.

    Raises:
        LowbitError: a tensor is missing or does not fit the shape, or a unit is not finite.
    """
    try:
        held, (rows, width) = tensors["weight_blocks"], tensors["weight_shape"].tolist()
    except (KeyError, ValueError) as e:
        raise LowbitError(f"'{name}' is damaged: no tensor {e}, or a shape that is none.") from e
    if (
        held.dtype != torch.uint8
        or width < 1
        or width % 256
        or held.shape != (rows, row_bytes(grid, width))
    ):
        raise LowbitError(
            f"'{name}.weight_blocks' is damaged: {tuple(held.shape)} {held.dtype} is no ({rows}, "
            f"{width}) weight on {grid}."
        )
    q = unpack_k(held, grid)
    if not bool((torch.isfinite(q.params.unit) & torch.isfinite(q.params.unit_min)).all()):
        raise LowbitError(f"'{name}.weight_blocks' is damaged: a unit is not finite.")
    return q


def tensor_bytes(grid: KQuant, rows: int, width: int) -> int:
    """Bytes of one packed weight on disk, headers apart."""
    return rows * row_bytes(grid, width) + 16
