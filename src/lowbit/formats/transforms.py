"""`transform_config` of compressed-tensors: Hadamard rotations of a linear's whole input, which
vLLM applies while the model runs.

A scheme of type "hadamard" is Sylvester's matrix, one of type "random-hadamard" any matrix of +-1,
stored as `NAME_input.weight` beside one of the linears that use it (all of a scheme share it). Both
are divided by the square root of their size when applied. The other half of a rotation, that of the
weight, is listed with the location "weight_input" and is in the stored weight already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Rotation
from ..grid.rotation import sylvester


def describe(
    rotations: Mapping[str, Rotation], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry for `quantization_config`, and the tensors that belong to it.

    Args:
        rotations: full linear name -> rotation of its input.
        dtype: in which matrices are stored and applied; +-1 is exact in any.

    Returns:
        {"config_groups": ...}, full tensor name -> (size, size) matrix of +-1.

    Raises:
        LowbitError: a rotation leaves a part of the index alone, which the format cannot say.
    """
    groups: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for size in sorted({r.size for r in rotations.values()}):
        names = sorted(n for n, r in rotations.items() if r.size == size)
        matrix = _signs(rotations[names[0]], names[0])
        if any(not torch.equal(_signs(rotations[n], n), matrix) for n in names):
            raise LowbitError(
                f"the rotations of the {len(names)} linears with {size} inputs differ: "
                "compressed-tensors shares one matrix."
            )
        plain = size & (size - 1) == 0 and torch.equal(matrix, sylvester(size))
        scheme = f"R{len(groups)}"
        groups[scheme] = {
            "type": "hadamard" if plain else "random-hadamard",
            "apply": [
                {"targets": names, "location": "input", "inverse": False, "ignore": []},
                {"targets": names, "location": "weight_input", "inverse": True, "ignore": []},
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": None,
            "precision": str(dtype),
        }
        tensors[f"{names[0]}.{scheme}_input.weight"] = matrix.to(dtype)
    return {"config_groups": groups}, tensors


def _signs(rotation: Rotation, name: str) -> Tensor:
    """(size, size) int8 matrix of +-1."""
    out = torch.ones(1, 1, dtype=torch.int8)
    for factor in rotation.factors:
        if isinstance(factor, int):
            raise LowbitError(
                f"the input of '{name}' is rotated across heads, which compressed-tensors cannot "
                "say: quantize with "
                "--set quarot.across_heads=false."
            )
        out = torch.kron(out, factor)
    return out
