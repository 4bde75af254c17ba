"""MLX's affine layout, as mlx-lm loads it.

Per linear X: X.weight uint32 (out, in*bits/32), the dense bit stream of `lowbit.grid.bits`;
X.scales and X.biases (out, groups) in the model's dtype, w = scales * code + biases. So biases =
-scale * zero_point, rounded to that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, AffineParams, QTensor
from .dense import Dense, Weight, packed
from .uniform import Uniform, most_common

NAME = "mlx"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)


def group_of(grid: Uniform, columns: int, name: str) -> int:
    """The group size that the format will have: the grid's, or the largest of `GROUPS` that divides
    it, scales repeated.

    Raises:
        LowbitError: the format cannot say it.
    """
    if grid.bits not in BITS:
        raise LowbitError(
            f"'{name}' has {grid.bits}-bit weights; MLX takes {', '.join(map(str, BITS))} bits."
        )
    for size in GROUPS:
        if grid.group(columns) % size == 0:
            return size
    raise LowbitError(
        f"'{name}' has groups of {grid.group(columns)} inputs; MLX takes 32, 64 and 128, and "
        "multiples of them."
    )


def pack(q: Weight, dtype: torch.dtype, name: str = "weight") -> dict[str, Tensor]:
    """The tensors of one linear by their local names.

    Args:
        dtype: of scales and biases. name: full name, for errors.
    """
    grid, columns = q.grid, q.shape[1]
    repeat = grid.group(columns) // group_of(grid, columns, name)
    scale = q.params.scale
    biases = (-scale.double() * q.params.zero_point.double()).to(dtype)
    if not bool(torch.isfinite(biases).all()):
        raise LowbitError(f"'{name}' has zero points beyond {dtype}.")
    return {
        "weight": packed(q).words.view(torch.uint32),
        "scales": scale.to(dtype).repeat_interleave(repeat, 1),
        "biases": biases.repeat_interleave(repeat, 1),
    }


def unpack(
    tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight"
) -> QTensor[Affine, AffineParams]:
    """The inverse of `pack`, but for the rounding of biases: zero points are floats, what the file
    says in units of the scale. Raises as `opened` does.
    """
    return opened(tensors, grid, name).coded()


def opened(tensors: Mapping[str, Tensor], grid: Affine, name: str = "weight") -> Dense:
    """The same weight, its codes still packed.

    Raises:
        LowbitError: a tensor is missing or does not fit the others.
    """
    try:
        scales, biases = tensors["scales"], tensors["biases"]
        columns = tensors["weight"].shape[1] * 32 // grid.bits
        words = tensors["weight"].view(torch.int32)
        size = group_of(grid, columns, name)
        if scales.shape != (len(words), columns // size) or biases.shape != scales.shape:
            raise ValueError(
                f"scales {tuple(scales.shape)}, biases {tuple(biases.shape)} and codes "
                f"({len(words)}, {columns}) do not belong together"
            )
        scales, biases = (t.double()[:, :: grid.group(columns) // size] for t in (scales, biases))
        return Dense(grid, words, columns, AffineParams(scales, -biases / scales))
    except KeyError as e:
        raise LowbitError(f"'{name}' has no tensor {e} in this model.") from e
    except ValueError as e:
        raise LowbitError(f"'{name}' is not a weight of MLX on {grid}: {e}.") from e


def describe(grids: Mapping[str, Uniform], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """`quantization` for config.json.

    Args:
        grids, shapes: of every quantized linear by full name; what is not among them has no scales
            and stays as it is.
    """
    common, others = most_common(grids)

    def said(name: str, grid: Uniform) -> dict[str, Any]:
        return {
            "group_size": group_of(grid, shapes[name][1], name),
            "bits": grid.bits,
            "mode": "affine",
        }

    first = next(n for n, g in grids.items() if g == common)
    base = said(first, common)
    single = {n: said(n, g) for n, g in sorted(grids.items()) if n in others or said(n, g) != base}
    return {**base, **single}


def grid_of(config: Mapping[str, Any], name: str) -> Affine:
    """The grid of a linear that has scales in a model with this `quantization`."""
    said = config.get(name) or config
    return Affine(said["bits"], said["group_size"])
