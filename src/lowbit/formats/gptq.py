"""GPTQ checkpoints, version 1 and 2, as GPTQModel, transformers, SGLang and vLLM load them.

Per linear X: X.qweight int32 (in*bits/32, out) packed along the inputs, X.qzeros int32 (groups,
out*bits/32) packed along the outputs, X.scales float16 (groups, out), X.g_idx int32 (in,), the
group of each input. The bit stream is the dense one of `lowbit.grid.bits`. Version 1 stores zero
points less one, and its loaders add one to whole words: a zero point of 0 would borrow from its
neighbour, so only symmetric weights, whose zero points are all 2**(bits-1), are written in it.
Version 2 stores them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, AffineParams, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import unpack as unpack_bits
from .dense import Dense, Weight, packed, turned
from .half import in_half
from .uniform import Uniform, most_common

V1, V2 = "gptq", "gptq_v2"
BITS = (2, 3, 4, 8)


def check(grid: Uniform, rows: int, columns: int, version: str, name: str) -> None:
    """Raise LowbitError if a linear cannot be said in this version of the format."""
    if grid.bits not in BITS:
        raise LowbitError(
            f"'{name}' has {grid.bits}-bit weights; GPTQ takes {', '.join(map(str, BITS))} bits."
        )
    if version == V1 and not grid.symmetric:
        raise LowbitError(
            f"'{name}' has asymmetric weights: loaders of GPTQ version 1 shift packed zero points "
            "by a borrow that runs into the neighbours. "
            "Export to gptq_v2, or quantize with a scheme that ends in 'sym'."
        )
    if columns % 32 or rows % 32:
        raise LowbitError(
            f"'{name}' is {rows} x {columns}: GPTQ packs 32 weights at a time along both sides."
        )


def pack(q: Weight, version: str, name: str = "weight") -> dict[str, Tensor]:
    """The tensors of one linear by their local names.

    Args:
        version: `V1` or `V2`. name: full name, for errors.

    Raises:
        LowbitError: the format cannot say it.
    """
    grid, (rows, columns) = q.grid, q.shape
    check(grid, rows, columns, version, name)
    zero = q.params.zero_point.to(torch.uint8) - (1 if version == V1 else 0)
    return {
        "qweight": turned(packed(q).words),
        "qzeros": pack_bits(zero.T.contiguous(), grid.bits),
        "scales": in_half(q.params.scale.T.contiguous(), name),
        "g_idx": (torch.arange(columns) // grid.group(columns)).to(torch.int32),
    }


def unpack(
    tensors: Mapping[str, Tensor], grid: Affine, version: str, name: str = "weight"
) -> QTensor[Affine, AffineParams]:
    """The inverse of `pack`; the scales are float16 numbers in float32. Raises as `opened` does."""
    return opened(tensors, grid, version, name).coded()


def opened(
    tensors: Mapping[str, Tensor], grid: Affine, version: str, name: str = "weight"
) -> Dense:
    """The same weight, its codes still packed.

    Raises:
        LowbitError: a tensor is missing or does not fit the others.
    """
    try:
        columns, rows = len(tensors["g_idx"]), tensors["scales"].shape[1]
        group = grid.group(columns)
        if not torch.equal(tensors["g_idx"], (torch.arange(columns) // group).to(torch.int32)):
            raise ValueError("g_idx does not count groups up")
        words = turned(tensors["qweight"])
        zero = unpack_bits(tensors["qzeros"], grid.bits, rows) + (1 if version == V1 else 0)
        scale = tensors["scales"].float()
        if (
            scale.shape != (columns // group, rows)
            or zero.shape != scale.shape
            or len(words) != rows
        ):
            raise ValueError(
                f"scales {tuple(scale.shape)}, zero points {tuple(zero.shape)} and codes "
                f"({len(words)}, {columns}) do not belong together"
            )
        params = AffineParams(scale.T.contiguous(), zero.T.float().contiguous())
        return Dense(grid, words, columns, params)
    except KeyError as e:
        raise LowbitError(f"'{name}' has no tensor {e} in this model.") from e
    except ValueError as e:
        raise LowbitError(f"'{name}' is not a weight of GPTQ on {grid}: {e}.") from e


def describe(
    grids: Mapping[str, Uniform], skipped: list[str], version: str, maker: str
) -> dict[str, Any]:
    """`quantization_config` for config.json, also written as quantize_config.json.

    Args:
        grids: full linear name -> grid. skipped: linears kept in floating point. maker: name and
            version of what wrote it.
    """
    common, others = most_common(grids)
    dynamic: dict[str, Any] = {f"-:^{re.escape(n)}$": {} for n in skipped if n != "lm_head"}
    for name, grid in others.items():
        dynamic[f"+:^{re.escape(name)}$"] = {
            "bits": grid.bits,
            "group_size": grid.group_size or -1,
            "sym": grid.symmetric,
        }
    return {
        "quant_method": "gptq",
        "bits": common.bits,
        "group_size": common.group_size or -1,
        "sym": common.symmetric,
        "desc_act": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": dynamic,
        "meta": {"quantizer": [maker]},
    }


def grid_of(config: Mapping[str, Any], name: str) -> Affine | None:
    """The grid of a linear in a model with this `quantization_config`; None if it is not
    quantized.
    """
    said: dict[str, Any] = dict(config)
    for rule, changes in config.get("dynamic", {}).items():
        if re.match(rule[2:], name):
            if rule.startswith("-:"):
                return None
            said.update(changes)
            break
    if name == "lm_head" and not config.get("lm_head"):
        return None
    return Affine(
        said["bits"], None if said["group_size"] == -1 else said["group_size"], said["sym"]
    )
