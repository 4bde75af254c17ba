"""Weights on uniform grids as tensors: `pack-quantized` of compressed-tensors, which transformers
and vLLM load without this library.

Per linear X: X.weight_packed int32 (out, ceil(in*bits/32)), X.weight_scale (out, groups) in the
model's dtype, X.weight_shape int64 [out, in], and, if asymmetric, X.weight_zero_point int32
(ceil(out*bits/32), groups), packed along the output dimension. Codes and zero points are stored
unsigned, least significant bit first, without padding between codes (layout of compressed-tensors
>= 0.17; 2, 4 and 8 bits are the same in older versions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, AffineParams, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import packed_words
from ..grid.bits import unpack as unpack_bits
from .dense import Dense
from .layout import Buffers, Layout, Scheme

FORMAT = "pack-quantized"


def pack(q: QTensor[Affine, AffineParams], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear by their local names.

    Args:
        dtype: of the stored scales; they must be representable in it.

    Raises:
        LowbitError: a scale would change when stored.
    """
    grid, scale = q.grid, q.params.scale.to(dtype)
    if not torch.equal(scale.to(q.params.scale.dtype), q.params.scale):
        raise LowbitError(
            f"scales are not representable in {dtype}: fix their dtype before tuning, not at "
            "export."
        )
    out = {
        "weight_packed": pack_bits(q.codes, grid.bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        zero = q.params.zero_point.to(torch.uint8)
        out["weight_zero_point"] = pack_bits(zero.T.contiguous(), grid.bits).T.contiguous()
    return out


def unpack(
    tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight"
) -> QTensor[Affine, AffineParams]:
    """The inverse of `pack`. Arguments and errors are those of `opened`."""
    return opened(tensors, grid, name).coded()


def opened(tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight") -> Dense:
    """The same weight, its codes still packed.

    Args:
        tensors: local names -> tensors of one linear.
        name: full name of the linear, for errors.

    Raises:
        LowbitError: a tensor is missing or has the wrong shape.
    """
    try:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        words = tensors["weight_packed"]
        scale = tensors["weight_scale"].float()
        groups = columns // grid.group(columns)
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise LowbitError(f"'{name}.weight_scale' holds values that are not positive numbers.")
        if len(words) != rows or scale.shape != (rows, groups):
            raise ValueError(
                f"codes ({len(words)}, {columns}) and scales {tuple(scale.shape)} do not belong to "
                f"a {rows} x {columns} weight"
            )
        if grid.symmetric:
            zero = torch.full_like(scale, 2 ** (grid.bits - 1))
        else:
            zero = (
                unpack_bits(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows)
                .T.float()
                .contiguous()
            )
        return Dense(grid, words, columns, AffineParams(scale, zero))
    except KeyError as e:
        raise LowbitError(f"'{name}' has no tensor {e} in this artifact.") from e
    except ValueError as e:
        raise LowbitError(f"'{name}' is not a packed {grid} weight: {e}.") from e


def tensor_bytes(grid: Affine, rows: int, columns: int, scale_bytes: int = 2) -> int:
    """Bytes of one packed linear on disk, headers apart."""
    groups = columns // grid.group(columns)
    zero = 0 if grid.symmetric else 4 * packed_words(rows, grid.bits) * groups
    return 4 * rows * packed_words(columns, grid.bits) + scale_bytes * rows * groups + zero + 16


def _buffers(
    grid: Affine, rows: int, width: int, stored: torch.dtype, columns: Mapping[int, int]
) -> Buffers:
    groups = width // grid.group(width)
    held: Buffers = {
        "weight_shape": ((2,), torch.int64),
        "weight_packed": ((rows, packed_words(width, grid.bits)), torch.int32),
        "weight_scale": ((rows, groups), stored),
    }
    if not grid.symmetric:
        held["weight_zero_point"] = ((packed_words(rows, grid.bits), groups), torch.int32)
    return held


def _scheme(grid: Affine) -> Scheme:
    # transformers (5.23, with any compressed-tensors) prepares unpacked zero points for packed ones
    # and refuses asymmetric files, unless it is told to dequantize while loading. Its other path
    # dequantizes at the first forward pass anyway.
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return Scheme(FORMAT, weights, unpacked=not grid.symmetric)


def _read_scheme(said: Scheme) -> Affine | None:
    if said.format != FORMAT:
        return None
    w: Mapping[str, Any] = said.weights
    group = w["group_size"] if w["strategy"] == "group" else None
    return Affine(w["num_bits"], group, w["symmetric"])


def _words(grid: Affine) -> str:
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return f"{grid.bits}-bit {kind}, " + (
        f"groups of {grid.group_size}" if grid.group_size else "one scale per output"
    )


LAYOUT = Layout(
    kind="uniform grids",
    pack=pack,
    unpack=unpack,
    opened=opened,
    tensor_bytes=tensor_bytes,
    buffers=_buffers,
    scheme=_scheme,
    read_scheme=_read_scheme,
    words=_words,
)
