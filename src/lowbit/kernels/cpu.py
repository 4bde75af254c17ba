"""The product on the CPU in compiled C (columns.c): for few tokens from the packed codes, for many
through decoded tiles.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..grid.compiled import library as _library
from ..grid.compiled import pointer, threads
from ..grid.packed import PackedColumns
from .reference import TILE as _TILE
from .reference import tiles

_SOURCE = Path(__file__).with_name("columns.c")
# tokens up to which the codes are read again for each handful of them, rather than decoded for a
# matrix product
_FEW = 32


class _Segment(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
    )


class _Weight(ctypes.Structure):
    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("parts", ctypes.c_int64),
        ("part", ctypes.POINTER(_Segment)),
        ("starts", ctypes.c_void_p),
        ("inputs_of", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is no compiler."""
    return _library(_SOURCE)


def product(x: Tensor, packed: PackedColumns, code: ctypes.CDLL) -> Tensor:
    """x W^T in float32 arithmetic.

    Args:
        x: (tokens, in) float32, bfloat16 or float16 on the CPU.
        packed: as `check` accepts it, on the CPU.
        code: from `library`.

    Returns:
        (tokens, out) in x's dtype.

    Raises:
        MemoryError: none left for the tables.
    """
    given = x.float().contiguous()
    weight, _kept = _described(packed)
    product = _from_codes if 0 < len(x) <= _FEW else _from_tiles
    return product(given, packed, code, weight).to(x.dtype)


def _described(packed: PackedColumns) -> tuple[_Weight, list[Tensor]]:
    """The weight as C sees it, and the tensors made for it, which must live as long."""
    kept = [_padded_levels(s.levels.to(packed.dtype).float(), s.bits) for s in packed.segments]
    parts = (_Segment * len(kept))(
        *(
            _Segment(
                s.bits, s.columns.numel(), pointer(s.columns), pointer(s.codes), pointer(levels)
            )
            for s, levels in zip(packed.segments, kept, strict=True)
        )
    )
    if packed.sparse is None:
        return _Weight(*packed.shape, len(parts), parts), kept
    values = packed.sparse.values.to(packed.dtype).float()
    sparse = (pointer(packed.sparse.starts), pointer(packed.sparse.columns), pointer(values))
    return _Weight(*packed.shape, len(parts), parts, *sparse), [*kept, values]


def _padded_levels(levels: Tensor, bits: int) -> Tensor:
    """(n, 2**bits) with rows of zeros up to columns whose codes fill whole words."""
    missing = -len(levels) % (32 // (bits & -bits))
    return torch.nn.functional.pad(levels, (0, 0, 0, missing)) if missing else levels.contiguous()


def _from_codes(x: Tensor, packed: PackedColumns, code: ctypes.CDLL, weight: _Weight) -> Tensor:
    y = torch.empty(len(x), packed.shape[0])
    if code.columns_product(
        ctypes.byref(weight),
        pointer(x),
        ctypes.c_int64(len(x)),
        pointer(y),
        ctypes.c_int64(threads()),
    ):
        raise MemoryError(
            f"no memory for the product of {len(x)} tokens with a weight of {packed.shape[0]} x "
            f"{packed.shape[1]}"
        )
    return y


def _from_tiles(x: Tensor, packed: PackedColumns, code: ctypes.CDLL, weight: _Weight) -> Tensor:
    y = torch.empty(len(x), packed.shape[0])
    spans = list(tiles(packed, _TILE))
    # Taken once: new pages would cost more than the decoding.
    memory = torch.empty(packed.shape[1] * spans[0].stop)
    for rows in spans:
        count = rows.stop - rows.start
        w = memory[: packed.shape[1] * count].view(packed.shape[1], count)
        code.columns_decode(
            ctypes.byref(weight),
            ctypes.c_int64(rows.start),
            ctypes.c_int64(count),
            pointer(w),
            ctypes.c_int64(threads()),
        )
        y[:, rows] = x @ w
    return y
