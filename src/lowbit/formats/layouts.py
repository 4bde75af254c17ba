"""The layouts that keep every linear's codes as tensors of a safetensors model, by name: one pack /
unpack pair each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Grid, QTensor
from . import awq, gptq, mlx, native, packing
from . import compressed_tensors as ct


@dataclass(frozen=True)
class Layout:
    """How a format stores linears.

    Attributes:
        name: as in report.json. mark: local name of a tensor that quantized linears have and others
            do not. tensors: all local names.
        key: of config.json, where the format says what it holds.
        pack: (weight, dtype of the model, full name) -> tensors by local names. unpack: (tensors,
            grid, full name) -> weight.
        grid_of: (what config.json has under ``key``, full name) -> grid, or None if it says the
            linear is not quantized.
    """

    name: str
    mark: str
    tensors: tuple[str, ...]
    key: str
    pack: Callable[[QTensor, torch.dtype, str], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any, str], QTensor]
    grid_of: Callable[[Mapping[str, Any], str], Grid | None]

    def linears(self, held: Mapping[str, Tensor]) -> list[str]:
        """Full names of the linears among the tensors of a file."""
        return sorted(k.rpartition(".")[0] for k in held if k.rpartition(".")[2] == self.mark)

    def local(self, held: Mapping[str, Tensor], full: str) -> dict[str, Tensor]:
        """The tensors of one linear by their local names."""
        if not self.tensors:
            return packing.local_tensors(held, full)
        return {t: held[f"{full}.{t}"] for t in self.tensors if f"{full}.{t}" in held}

    def read(self, held: Mapping[str, Tensor], full: str, config: Mapping[str, Any]) -> QTensor:
        """One linear of a file, on the grid that config.json gives it.

        Raises:
            LowbitError: it gives it none, or the tensors are damaged.
        """
        grid = self.grid_of(config[self.key], full)
        if grid is None:
            raise LowbitError(f"'{full}' is packed, but config.json gives it no scheme.")
        return self.unpack(self.local(held, full), grid, full)


def _gptq(version: str) -> Layout:
    return Layout(
        version,
        "qweight",
        ("qweight", "qzeros", "scales", "g_idx"),
        "quantization_config",
        lambda q, _, name: gptq.pack(q, version, name),
        lambda tensors, grid, name: gptq.unpack(tensors, grid, version, name),
        gptq.grid_of,
    )


def _own(name: str) -> Layout:
    return Layout(
        name,
        "weight_shape",
        (),
        "quantization_config",
        lambda q, dtype, _: packing.pack(q, dtype),
        packing.unpack,
        native.grid_of,
    )


LAYOUTS = {
    layout.name: layout
    for layout in (
        _own(ct.NAME),
        _own(native.NAME),
        _gptq(gptq.V1),
        _gptq(gptq.V2),
        Layout(
            awq.NAME,
            "qweight",
            ("qweight", "qzeros", "scales"),
            "quantization_config",
            lambda q, _, name: awq.pack(q, name),
            awq.unpack,
            awq.grid_of,
        ),
        Layout(
            mlx.NAME,
            "scales",
            ("weight", "scales", "biases"),
            "quantization",
            mlx.pack,
            mlx.unpack,
            mlx.grid_of,
        ),
    )
}
