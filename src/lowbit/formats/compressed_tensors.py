"""compressed-tensors `pack-quantized`: integer weights that transformers and vLLM load without this
library.

Per linear X: X.weight_packed int32 (out, ceil(in*bits/32)), X.weight_scale (out, groups) in the
model's dtype, X.weight_shape int64 [out, in], and, if asymmetric, X.weight_zero_point int32
(ceil(out*bits/32), groups), packed along the output dimension. Codes and zero points are stored
unsigned, least significant bit first, without padding between codes (layout of compressed-tensors
>= 0.17; 2, 4 and 8 bits are the same in older versions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import ActivationGrid, Affine, AffineParams, PerToken, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import packed_words
from ..grid.bits import unpack as unpack_bits

NAME = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def pack(q: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear by their local names.

    Args:
        dtype: of the stored scales; they must be representable in it.

    Raises:
        LowbitError: a scale would change when stored.
    """
    if not isinstance(q.grid, Affine):
        raise LowbitError(f"compressed-tensors has no layout for a {q.grid}.")
    scale = q.params.scale.to(dtype)
    if not torch.equal(scale.to(q.params.scale.dtype), q.params.scale):
        raise LowbitError(
            f"scales are not representable in {dtype}: fix their dtype before tuning, not at "
            "export."
        )
    out = {
        "weight_packed": pack_bits(q.codes, q.grid.bits),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }
    if not q.grid.symmetric:
        zero = q.params.zero_point.to(torch.uint8)
        out["weight_zero_point"] = pack_bits(zero.T.contiguous(), q.grid.bits).T.contiguous()
    return {k: v.cpu() for k, v in out.items()}


def unpack(tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight") -> QTensor:
    """The inverse of `pack`.

    Args:
        tensors: local names -> tensors of one linear.
        name: full name of the linear, for errors.

    Raises:
        LowbitError: a tensor is missing or has the wrong shape.
    """
    try:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        codes = unpack_bits(tensors["weight_packed"], grid.bits, columns)
        scale = tensors["weight_scale"].float()
        groups = columns // grid.group(columns)
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise LowbitError(f"'{name}.weight_scale' holds values that are not positive numbers.")
        if codes.shape[0] != rows or scale.shape != (rows, groups):
            raise ValueError(
                f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} do not belong to a "
                f"{rows} x {columns} weight"
            )
        if grid.symmetric:
            zero = torch.full_like(scale, 2 ** (grid.bits - 1))
        else:
            zero = (
                unpack_bits(tensors["weight_zero_point"].T.contiguous(), grid.bits, rows)
                .T.float()
                .contiguous()
            )
    except KeyError as e:
        raise LowbitError(f"'{name}' has no tensor {e} in this artifact.") from e
    except ValueError as e:
        raise LowbitError(f"'{name}' is not a packed {grid} weight: {e}.") from e
    return QTensor(grid, codes, AffineParams(scale, zero))


def tensor_bytes(grid: Affine, rows: int, columns: int, scale_bytes: int = 2) -> int:
    """Bytes of one packed linear on disk, headers apart."""
    groups = columns // grid.group(columns)
    zero = 0 if grid.symmetric else 4 * packed_words(rows, grid.bits) * groups
    return 4 * rows * packed_words(columns, grid.bits) + scale_bytes * rows * groups + zero + 16


def carries(grids: Iterable[Affine], activations: ActivationGrid | None) -> bool:
    """Whether the format can say how activations are quantized, and its loaders do it.

    4 and 8 bits, symmetric on both sides: transformers ignores the activations of asymmetric
    weights, and vLLM has no kernels for others. Full range, since that is the scale that
    transformers computes; vLLM's is larger by 0.4 % at 8 bits.
    """
    if activations is None:
        return True
    a = activations
    return (
        isinstance(a, PerToken)
        and a.full_range
        and a.clip == 1
        and a.bits in (4, 8)
        and all(g.symmetric for g in grids)
    )


def describe(
    grids: Mapping[str, Affine], skipped: list[str], activations: ActivationGrid | None = None
) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        grids: full linear name -> grid, for every quantized linear.
        skipped: full names of the linears kept in floating point.
        activations: grid of the linears' inputs, one that `carries` allows.
    """
    dynamic = (
        None
        if activations is None
        else {
            "num_bits": activations.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
            "actorder": None,
            "block_structure": None,
            "observer": None,
            "observer_kwargs": {},
        }
    )
    kinds = sorted(
        set(grids.values()), key=lambda g: (-sum(x == g for x in grids.values()), str(g))
    )
    groups: dict[str, Any] = {}
    for i, grid in enumerate(kinds):
        names = sorted(n for n, g in grids.items() if g == grid)
        # As AutoModel calls them.
        names += [headless for n in names if (headless := n.partition(".")[2]) not in grids]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "input_activations": dynamic,
            "output_activations": None,
            "format": "pack-quantized",
            "weights": {
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
            },
        }
    # transformers (5.23, with any compressed-tensors) prepares unpacked zero points for packed ones
    # and refuses asymmetric files, unless it is told to dequantize while loading. Its other path
    # dequantizes at the first forward pass anyway.
    asymmetric = any(not grid.symmetric for grid in kinds)
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted({*skipped, *_outside(grids)}),
        "config_groups": groups,
        "version": "0.17.1",
        **({"dequantize": True} if asymmetric else {}),
    }


def _outside(names: Iterable[str]) -> set[str]:
    """A pattern of all linears that lie outside of the blocks, whatever a model's class calls its
    head.

    A runtime that puts the model into a larger one adds to the front of the names, AutoModel takes
    the first part away.
    """
    trunks = {found[1] for n in names if (found := re.match(r"(.+?\.)\d+\.", n))}
    headless = {t.partition(".")[2] for t in trunks} - {""}
    inside = sorted([rf"(.*\.)?{re.escape(t)}" for t in trunks] + [re.escape(t) for t in headless])
    return {f"re:(?!{'|'.join(inside)})"} if inside else set()


def grid_of(config: Mapping[str, Any], name: str) -> Affine | None:
    """The grid of a linear in an artifact with this `quantization_config`; None if it is not
    quantized.
    """
    group = _group_of(config, name)
    if group is None:
        return None
    w = group["weights"]
    return Affine(
        w["num_bits"], w["group_size"] if w["strategy"] == "group" else None, w["symmetric"]
    )


def _group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    if any(_matches(entry, name) for entry in config["ignore"]):
        return None
    for group in config["config_groups"].values():
        if any(target == "Linear" or _matches(target, name) for target in group["targets"]):
            found: Mapping[str, Any] = group
            return found
    return None


def _matches(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def activations_of(config: Mapping[str, Any], name: str) -> PerToken | None:
    """The grid of a linear's input in an artifact with this `quantization_config`; None for
    floating point.
    """
    group = _group_of(config, name)
    a = None if group is None else group["input_activations"]
    return None if a is None else PerToken(a["num_bits"], symmetric=a["symmetric"], full_range=True)
