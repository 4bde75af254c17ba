"""The formats that keep every linear's codes as tensors of a safetensors model, by name: one pack /
unpack pair each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, Coded, QTensor
from . import awq, gptq, mlx, native, packing
from . import compressed_tensors as ct
from .dense import Dense


@dataclass(frozen=True)
class Format:
    """How a format stores linears.

    Attributes:
        name: as in report.json. mark: local name of a tensor that quantized linears have and others
            do not; None for those of an artifact, which differ from grid to grid. tensors: all
            local names; none for those of an artifact.
        key: of config.json, where the format says what it holds.
        pack: (weight, dtype of the model, full name) -> tensors by local names. unpack: (tensors,
            grid, full name) -> weight. opened: the same, its codes still packed if its grid is
            uniform.
        grid_of: (what config.json has under ``key``, full name) -> grid, or None if it says the
            linear is not quantized.
    """

    name: str
    mark: str | None
    tensors: tuple[str, ...]
    key: str
    pack: Callable[[Any, torch.dtype, str], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any, str], QTensor[Any, Any]]
    opened: Callable[[Mapping[str, Tensor], Any, str], QTensor[Any, Any] | Dense]
    grid_of: Callable[[Mapping[str, Any], str], AnyGrid | None]

    def linears(self, held: Collection[str]) -> list[str]:
        """Full names of the linears among the tensors of a file, by their names."""
        if self.mark is None:
            return packing.packed_linears(held)
        return sorted(k.rpartition(".")[0] for k in held if k.rpartition(".")[2] == self.mark)

    def local(self, held: Mapping[str, Tensor], full: str) -> dict[str, Tensor]:
        """The tensors of one linear by their local names."""
        if not self.tensors:
            return packing.local_tensors(held, full)
        return {t: held[f"{full}.{t}"] for t in self.tensors if f"{full}.{t}" in held}

    def read(self, held: Mapping[str, Tensor], full: str, config: Mapping[str, Any]) -> Coded:
        """One linear of a file, on the grid that config.json gives it.

        Raises:
            LowbitError: it gives it none, or the tensors are damaged.
        """
        return self.unpack(self.local(held, full), self._grid(full, config), full)

    def look(
        self, held: Mapping[str, Tensor], full: str, config: Mapping[str, Any]
    ) -> Coded | Dense:
        """As `read`, codes of a uniform grid still packed."""
        return self.opened(self.local(held, full), self._grid(full, config), full)

    def _grid(self, full: str, config: Mapping[str, Any]) -> AnyGrid:
        grid = self.grid_of(config[self.key], full)
        if grid is None:
            raise LowbitError(f"'{full}' is packed, but config.json gives it no scheme.")
        return grid


def _gptq(version: str) -> Format:
    return Format(
        version,
        "qweight",
        ("qweight", "qzeros", "scales", "g_idx"),
        "quantization_config",
        lambda q, _, name: gptq.pack(q, version, name),
        lambda tensors, grid, name: gptq.unpack(tensors, grid, version, name),
        lambda tensors, grid, name: gptq.opened(tensors, grid, version, name),
        gptq.grid_of,
    )


def _own(name: str) -> Format:
    return Format(
        name,
        None,
        (),
        "quantization_config",
        lambda q, dtype, _: packing.pack(q, dtype),
        packing.unpack,
        packing.opened,
        native.grid_of,
    )


FORMATS = {
    format_.name: format_
    for format_ in (
        _own(ct.NAME),
        _own(native.NAME),
        _gptq(gptq.V1),
        _gptq(gptq.V2),
        Format(
            awq.NAME,
            "qweight",
            ("qweight", "qzeros", "scales"),
            "quantization_config",
            lambda q, _, name: awq.pack(q, name),
            awq.unpack,
            awq.opened,
            awq.grid_of,
        ),
        Format(
            mlx.NAME,
            "scales",
            ("weight", "scales", "biases"),
            "quantization",
            mlx.pack,
            mlx.unpack,
            mlx.opened,
            mlx.grid_of,
        ),
    )
}
