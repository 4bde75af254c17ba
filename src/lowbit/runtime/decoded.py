"""The checkpoint of an artifact as floats: packed linears as the weights that loaders decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.proof import read_report
from ..errors import LowbitError
from ..formats import compressed_tensors as ct
from ..formats import native
from ..formats.packing import is_packed, packed_linears, unpack
from ..grid import InputQuantizer, KVGrid
from ..model.checkpoint import FLOATS, Checkpoint, Stored
from ..model.computed import At, Computed
from ..model.config import load_config
from ..model.opened import Opened
from ..model.wrapper import text_config


@dataclass(frozen=True)
class Decoded:
    """A packed linear, decoded when it is read.

    Attributes:
        stored: of the weight. checkpoint: that holds its tensors. linear: its name there.
    """

    stored: Stored
    checkpoint: DecodedArtifact
    linear: str

    def read(self, at: At) -> Tensor:
        """Decode the weight, and take a part."""
        return self.checkpoint.decode(self.linear)[at]


class DecodedArtifact(Computed):
    """An artifact in one of the two formats that `quantize` writes.

    Args:
        folder: where it lies.

    Raises:
        LowbitError: it is none, or another version made it.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._report = read_report(Path(folder))
        said = self.config_json.get("quantization_config") or {}
        if said.get("quant_method") not in (ct.NAME, native.NAME):
            raise LowbitError(f"'{folder}' is not in a format that lowbit quantizes to.")
        if said["quant_method"] == native.NAME:
            native.check(said)
        self.quantization: Mapping[str, Any] = said

    @cached_property
    def _linears(self) -> list[str]:
        return packed_linears(Checkpoint.stored(self))

    @cached_property
    def dtype(self) -> torch.dtype:
        """To which decoded weights are rounded."""
        if self.quantization["quant_method"] == native.NAME:
            return native.dtype_of(self.quantization)
        inner = self.config_json.get("text_config") or {}
        named = next(
            (c[k] for c in (self.config_json, inner) for k in ("dtype", "torch_dtype") if k in c),
            "float32",
        )
        found: torch.dtype = getattr(torch, str(named).removeprefix("torch."))
        return found

    @cached_property
    def views(self) -> Mapping[str, Decoded]:
        """See `Computed`."""
        kind = next(k for k, d in FLOATS.items() if d == self.dtype)
        shapes = {e["name"]: e["shape"] for e in self._report["linears"] if "skipped" not in e}
        return {
            f"{n}.weight": Decoded(Stored((shapes[n][0], shapes[n][1]), kind), self, n)
            for n in self._linears
        }

    @cached_property
    def left_out(self) -> Mapping[str, str]:
        """See `Checkpoint`: codes and scales."""
        held = Checkpoint.stored(self)
        own = {n: f"{n}.weight_" for n in self._linears}
        return {
            name: f"codes of '{n}', which is decoded"
            for name in held
            if (n := name.rpartition(".")[0]) in own and name.startswith(own[n])
        }

    def decode(self, linear: str) -> Tensor:
        """(out, in) weight of a linear, in `dtype`."""
        names = [n for n in self.left_out if n.rpartition(".")[0] == linear]
        held = Checkpoint.read(self, names, finite=False)
        assert is_packed(linear, held)
        grid = native.grid_of(self.quantization, linear)
        if grid is None:
            raise LowbitError(f"'{linear}' is packed, but config.json gives it no scheme.")
        local = {n.removeprefix(f"{linear}."): t for n, t in held.items()}
        return unpack(local, grid, linear).decode(self.dtype)

    def input_quantizer(self, name: str) -> InputQuantizer | None:
        """What happens to the input of a linear; None for nothing.

        Args:
            name: in the model that its class loads.
        """
        if self.quantization["quant_method"] == ct.NAME:
            grid = ct.activations_of(self.quantization, name)
            return None if grid is None else InputQuantizer(grid=grid)
        found = native.input_quantizer_of(self.quantization, name)
        return None if found.grid is None and found.rotation is None else found

    @property
    def kv(self) -> KVGrid | None:
        """The grid of keys and values; None for floating point."""
        if self.quantization["quant_method"] == ct.NAME:
            return None
        found = native.kv_of(self.quantization)
        return None if found is None else found[0]

    def opened(self) -> Opened:
        """The artifact opened as any model is."""
        whole = load_config(self)
        return Opened(self, self.stored(), whole, text_config(whole, self.name))
