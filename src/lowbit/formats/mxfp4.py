"""Weights on the MXFP4 grid as tensors: `mxfp4-pack-quantized` of compressed-tensors.

Per linear X: X.weight_packed uint8 (out, in / 2), two codes a byte, that of the even column in the
low half; X.weight_scale uint8 (out, in / 32), exponent + 127. A code is the sign in bit 3 and the
index of the magnitude among 0, 0.5, 1, 1.5, 2, 3, 4 and 6. Loaders decode to bfloat16, in which the
products are exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import MXFP4, MXFP4Params, QTensor
from ..grid.mxfp4 import GROUP, LEAST, MOST, TOP, ZERO
from .layout import Buffers, Layout, Scheme

FORMAT = "mxfp4-pack-quantized"
_BIAS, _SIGN = 127, 8


def pack(q: QTensor[MXFP4, MXFP4Params], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear by their local names.

    Args:
        dtype: has no effect: scales are exponents.

    Raises:
        LowbitError: a scale is no power of two, or a code beyond the grid.
    """
    mantissa, exponent = torch.frexp(q.params.scale)
    stored = exponent.to(torch.int32) - 1
    if not bool(((mantissa == 0.5) & (stored >= LEAST) & (stored <= MOST)).all()):
        raise LowbitError("scales are no powers of two: round them before tuning, not at export.")
    if q.codes.numel() and int(q.codes.max()) > TOP:
        raise LowbitError(f"a code is {int(q.codes.max())}, and {q.grid} ends at {TOP}.")
    codes = q.codes.to(torch.int16)
    halves = torch.where(codes < ZERO, _SIGN | (ZERO - codes), codes - ZERO).to(torch.uint8)
    return {
        "weight_packed": (halves[:, ::2] | halves[:, 1::2] << 4).contiguous(),
        "weight_scale": (stored + _BIAS).to(torch.uint8).contiguous(),
    }


def unpack(
    tensors: Mapping[str, Tensor], grid: MXFP4, name: str = "weight"
) -> QTensor[MXFP4, MXFP4Params]:
    """The inverse of `pack`.

    Args:
        tensors: local names -> tensors of one linear. name: its full name, for errors.

    Raises:
        LowbitError: a tensor is missing or does not fit the other, or a scale is not finite.
    """
    try:
        packed, stored = tensors["weight_packed"], tensors["weight_scale"]
    except KeyError as e:
        raise LowbitError(f"'{name}' has no tensor {e} in this artifact.") from e
    if (
        packed.dtype != torch.uint8
        or stored.dtype != torch.uint8
        or packed.dim() != 2
        or (len(packed), 2 * packed.shape[1]) != (len(stored), GROUP * stored.shape[-1])
    ):
        raise LowbitError(
            f"'{name}' is not a packed {grid} weight: codes {tuple(packed.shape)} {packed.dtype} "
            f"and scales {tuple(stored.shape)} {stored.dtype} do not belong together."
        )
    exponent = stored.to(torch.int32) - _BIAS
    if not bool(((exponent >= LEAST) & (exponent <= MOST)).all()):
        raise LowbitError(f"'{name}.weight_scale' is damaged: an exponent is beyond {MOST}.")
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int16)
    size = halves & (_SIGN - 1)
    codes = torch.where(halves >= _SIGN, ZERO - size, ZERO + size).to(torch.uint8)
    scale = ((exponent + _BIAS) << 23).view(torch.float32)  # the bits of that power of two
    return QTensor(grid, codes, MXFP4Params(scale))


def tensor_bytes(grid: MXFP4, rows: int, width: int, scale_bytes: int = 2) -> int:
    """Bytes of one packed linear on disk, headers apart."""
    return rows * (width // 2 + width // grid.group(width))


def _buffers(
    grid: MXFP4, rows: int, width: int, stored: torch.dtype, columns: Mapping[int, int]
) -> Buffers:
    return {
        "weight_packed": ((rows, width // 2), torch.uint8),
        "weight_scale": ((rows, width // grid.group(width)), torch.uint8),
    }


def _scheme(grid: MXFP4) -> Scheme:
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": GROUP,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    return Scheme(FORMAT, weights, decoded=torch.bfloat16)


def _read_scheme(said: Scheme) -> MXFP4 | None:
    return MXFP4() if said.format == FORMAT else None


LAYOUT = Layout(
    kind="MXFP4",
    pack=pack,
    unpack=unpack,
    tensor_bytes=tensor_bytes,
    buffers=_buffers,
    mark="weight_packed",
    scheme=_scheme,
    read_scheme=_read_scheme,
    words=lambda _: "4-bit floats, groups of 32 (MXFP4)",
)
