"""A loaded artifact whose linears compute in integers, instead of with decoded weights and
simulated activations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artifact.files import INDEX, read_shard
from ..errors import LowbitError
from ..formats import native
from ..formats.compressed_tensors import activations_of
from ..formats.packing import local_tensors, packed_linears, unpack
from ..grid import CrossQuant, InputQuantizer, LLMInt8, PerToken, Rotation
from ..kernels.integer import IntegerWeight, linear


class IntegerLinear(nn.Module):
    """A linear with an int8 weight and int32 sums.

    Args:
        weight: on the device of the model. grid, rotation: of the input. bias: (out,) or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: IntegerWeight,
        grid: PerToken | LLMInt8,
        rotation: Rotation | None,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.integers, self.grid, self.turned = weight, grid, InputQuantizer(rotation)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = linear(self.turned(x), self.integers, self.grid)
        return y if self.bias is None else y + self.bias


def in_integers(model: Any, folder: Path) -> Any:
    """The model with every quantized linear replaced by an `IntegerLinear` on the artifact's codes.

    Scales are used as stored; decoded weights are rounded to the model's dtype, so that outputs
    differ by that rounding.

    Args:
        model: what transformers loaded from ``folder``, an artifact with quantized activations.

    Raises:
        LowbitError: activations stay in floating point or have a scale per element, or weights are
            not on uniform grids.
    """
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if config is None or config.get("quant_method") not in (native.NAME, "compressed-tensors"):
        raise LowbitError(f"'{folder}' is not an artifact: there are no codes to compute with.")
    shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    replaced = 0
    for shard in shards:
        held = read_shard(folder / shard)
        for name in packed_linears(held):
            grid = native.grid_of(config, name)
            if config["quant_method"] == native.NAME:
                before = native.input_quantizer_of(config, name)
            else:
                before = InputQuantizer(grid=activations_of(config, name))
            if before.grid is None or isinstance(before.grid, CrossQuant):
                kind = "have a scale for every element" if before.grid else "stay in floating point"
                raise LowbitError(
                    f"the activations of '{name}' {kind}: no integer product computes that."
                )
            assert grid is not None
            old = model.get_submodule(name)
            weight = IntegerWeight.of(unpack(local_tensors(held, name), grid, name), name)
            parent, _, last = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                last,
                IntegerLinear(_on(weight, model.device), before.grid, before.rotation, old.bias),
            )
            replaced += 1
    if not replaced:
        raise LowbitError(f"'{folder}' has no quantized linears.")
    return model


def _on(weight: IntegerWeight, device: Any) -> IntegerWeight:
    codes, sums, zero_point, scale = (
        t.to(device) for t in (weight.codes, weight.sums, weight.zero_point, weight.scale)
    )
    return IntegerWeight(codes, sums, zero_point, scale, weight.group, weight.centred)
