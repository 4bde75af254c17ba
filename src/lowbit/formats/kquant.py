"""K-quants in an artifact of this library: the very blocks that a GGUF file holds, a row of them
per output.

Per linear X: X.weight_blocks (out, bytes of a row) uint8, as `lowbit.formats.ggml` packs them, and
X.weight_shape int64 (2,).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import KQuant, KQuantParams, QTensor
from ..grid.kquant import SUPER
from .ggml import BLOCKS, pack_k, unpack_k
from .layout import Buffers, Layout


def row_bytes(grid: KQuant, width: int) -> int:
    """Bytes of a row of blocks."""
    return BLOCKS[grid.kind.upper()].row_bytes(width)


def pack(q: QTensor[KQuant, KQuantParams], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight by their local names.

    Args:
        dtype: has no effect: units are float16.
    """
    return {
        "weight_blocks": pack_k(q),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], grid: KQuant, name: str) -> QTensor[KQuant, KQuantParams]:
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
        or width % SUPER
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


def tensor_bytes(grid: KQuant, rows: int, width: int, scale_bytes: int = 2) -> int:
    """Bytes of one packed weight on disk, headers apart."""
    return rows * row_bytes(grid, width) + 16


def _buffers(
    grid: KQuant, rows: int, width: int, stored: torch.dtype, columns: Mapping[int, int]
) -> Buffers:
    return {
        "weight_shape": ((2,), torch.int64),
        "weight_blocks": ((rows, row_bytes(grid, width)), torch.uint8),
    }


def _entry(grid: KQuant, columns: Mapping[Any, int]) -> dict[str, Any]:
    return {"kquant": grid.kind}


def _read_entry(entry: Mapping[str, Any]) -> KQuant | None:
    return KQuant(entry["kquant"]) if "kquant" in entry else None


LAYOUT = Layout(
    kind="K-quants",
    pack=pack,
    unpack=unpack,
    tensor_bytes=tensor_bytes,
    buffers=_buffers,
    entry=_entry,
    read_entry=_read_entry,
    is_gguf=True,
)
