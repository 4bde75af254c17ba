"""AWQ checkpoints in the GEMM layout: 4-bit weights with zero points, as vLLM, SGLang and GPTQModel
load them.

Per linear X: X.qweight int32 (in, out/8) packed along the outputs, X.qzeros int32 (groups, out/8)
alike, X.scales float16 (groups, out). The k-th nibble of a word, least significant first, holds
output 8 j + ORDER[k].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, AffineParams, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import unpack as unpack_bits
from .dense import Dense, Weight, nibbles_turned, nibbles_turned_back, packed
from .half import in_half
from .uniform import Uniform

NAME = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check(grid: Uniform, rows: int, name: str) -> None:
    """Raise LowbitError if a linear cannot be said in this format."""
    if grid.bits != 4:
        raise LowbitError(f"'{name}' has {grid.bits}-bit weights; AWQ's layout takes 4 bits.")
    if rows % 8:
        raise LowbitError(f"'{name}' has {rows} outputs; AWQ's layout packs 8 at a time.")


def pack(q: Weight, name: str = "weight") -> dict[str, Tensor]:
    """The tensors of one linear by their local names. Raises LowbitError if the format cannot say
    it.
    """
    rows, columns = q.shape
    check(q.grid, rows, name)
    return {
        "qweight": nibbles_turned(packed(q).words, ORDER)[:columns],
        "qzeros": pack_bits(_interleaved(q.params.zero_point.to(torch.uint8).T), 4),
        "scales": in_half(q.params.scale.T.contiguous(), name),
    }


def unpack(
    tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight"
) -> QTensor[Affine, AffineParams]:
    """The inverse of `pack`. Raises as `opened` does."""
    return opened(tensors, grid, name).coded()


def opened(tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight") -> Dense:
    """The same weight, its codes still packed. Raises LowbitError if a tensor is missing or does
    not fit the others.
    """
    try:
        rows, columns = tensors["scales"].shape[1], len(tensors["qweight"])
        words = nibbles_turned_back(_whole(tensors["qweight"], rows), ORDER)
        zero = _straight(unpack_bits(tensors["qzeros"], 4, rows)).T.float().contiguous()
        scale = tensors["scales"].float().T.contiguous()
        if scale.shape != (rows, columns // grid.group(columns)) or zero.shape != scale.shape:
            raise ValueError(
                f"scales {tuple(scale.shape)}, zero points {tuple(zero.shape)} and codes "
                f"({len(words)}, {columns}) do not belong together"
            )
        return Dense(grid, words, columns, AffineParams(scale, zero))
    except KeyError as e:
        raise LowbitError(f"'{name}' has no tensor {e} in this model.") from e
    except ValueError as e:
        raise LowbitError(f"'{name}' is not a weight of AWQ on {grid}: {e}.") from e


def describe(grids: Mapping[str, Uniform], skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Raises:
        LowbitError: linears on different grids, for which the format has no words.
    """
    kinds = sorted(set(grids.values()), key=str)
    if len(kinds) > 1:
        raise LowbitError(
            "AWQ's layout has one group size for the whole model, this one has "
            f"{' and '.join(map(str, kinds))}."
        )
    return {
        "quant_method": NAME,
        "bits": 4,
        "group_size": kinds[0].group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(skipped) or None,
    }


def grid_of(config: Mapping[str, Any], name: str) -> Affine | None:
    """The grid of a linear in a model with this `quantization_config`; None if it is not
    quantized.
    """
    if any(part in name for part in config.get("modules_to_not_convert") or ()):
        return None
    return Affine(4, None if config["group_size"] == -1 else config["group_size"])


def _whole(words: Tensor, rows: int) -> Tensor:
    """(in, out / 8) with inputs of no meaning at the end, so that eight divide them.

    Raises:
        ValueError: the words are not those of as many outputs.
    """
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] * 8 != rows:
        raise ValueError(f"{rows} outputs are no {tuple(words.shape)} {words.dtype}")
    missing = -len(words) % 8
    return torch.nn.functional.pad(words, (0, 0, 0, missing)) if missing else words


def _interleaved(codes: Tensor) -> Tensor:
    """(n, out), each eight outputs in the order of a word's nibbles."""
    return codes.reshape(len(codes), -1, 8)[..., list(ORDER)].flatten(1).contiguous()


def _straight(codes: Tensor) -> Tensor:
    back = torch.tensor(ORDER).argsort()
    return codes.reshape(len(codes), -1, 8)[..., back].flatten(1).contiguous()
