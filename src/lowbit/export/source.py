"""A finished artifact opened for export: its linears, shard by shard, and everything else, as they
lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..artifact.files import INDEX, read_shard
from ..artifact.hashing import Hashing
from ..artifact.proof import check_tensors, read_report
from ..errors import LowbitError, VerificationError
from ..formats import affine, native
from ..formats import compressed_tensors as ct
from ..formats.dense import Dense
from ..formats.packing import is_packed, local_tensors, packed_linears, unpack
from ..grid import Affine, AnyGrid
from ..model.checkpoint import Stored


@dataclass(frozen=True)
class Linear:
    """A quantized linear as it lies in an artifact.

    Attributes:
        name: full. grid: of its weight. tensors: by local names.
    """

    name: str
    grid: AnyGrid
    tensors: dict[str, Tensor]

    def packed(self) -> Dense:
        """Its weight, on a uniform grid, codes packed. Raises LowbitError if it is damaged."""
        assert isinstance(self.grid, Affine)
        return affine.opened(self.tensors, self.grid, self.name)

    def blocks(self) -> Tensor:
        """(out, bytes of a row) uint8, a weight on a K-quant. Raises LowbitError if it is
        damaged.
        """
        unpack(self.tensors, self.grid, self.name)
        return self.tensors["weight_blocks"]


Shard = tuple[str, dict[str, Linear], dict[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """An artifact of this library, in one of the two formats that `quantize` writes.

    Attributes:
        folder: where it lies. report: its report.json. config: its config.json. proved: files of
            weights that were found to be what was written.
    """

    folder: Path
    report: dict[str, Any]
    config: dict[str, Any]
    proved: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Raises LowbitError if the folder is not such an artifact."""
        report = read_report(folder)
        if "exported_from" in report:
            raise LowbitError(
                f"'{folder}' is an export itself ({report['format']}): export from the artifact it "
                "was made of."
            )
        config = json.loads((folder / "config.json").read_text())
        own = config.get("quantization_config")
        if own is None or own.get("quant_method") not in (ct.NAME, native.NAME):
            raise LowbitError(f"'{folder}' is not in a format that lowbit quantizes to.")
        if own["quant_method"] == native.NAME:
            native.check(own)
        return cls(folder, report, config)

    @property
    def own(self) -> dict[str, Any]:
        """Its quantization_config."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def is_native(self) -> bool:
        """Whether it is in the library's own format."""
        return bool(self.own["quant_method"] == native.NAME)

    @cached_property
    def grids(self) -> dict[str, AnyGrid]:
        """Full linear name -> grid."""
        out = {}
        for entry in self.report["linears"]:
            if "skipped" not in entry:
                grid = native.grid_of(self.own, entry["name"])
                if grid is None:
                    raise LowbitError(
                        f"'{entry['name']}' is listed as quantized in '{self.folder}', but "
                        "config.json gives it no scheme."
                    )
                out[entry["name"]] = grid
        return out

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full linear name -> (out, in)."""
        return {
            e["name"]: (e["shape"][0], e["shape"][1])
            for e in self.report["linears"]
            if "skipped" not in e
        }

    @property
    def skipped(self) -> list[str]:
        """Full names of the linears kept in floating point."""
        return [e["name"] for e in self.report["linears"] if "skipped" in e]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the stored scales, and of the model that was quantized."""
        if self.is_native:
            return native.dtype_of(self.own)
        named = str(
            self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        ).removeprefix("torch.")
        found: torch.dtype = getattr(torch, named)
        return found

    @cached_property
    def copied(self) -> dict[str, Stored]:
        """The tensors that the model's class does not know."""
        names = self.report.get("copied", {})
        return {n: t for n, t in self.others().items() if n in names} if names else {}

    def only_weights(self, target: str) -> None:
        """Raise LowbitError if anything but weights on grids would be lost in a format that says no
        more than that.
        """
        if self.report["recipe"].get("activations") is not None:
            raise LowbitError(
                f"'{self.folder}' quantizes activations, which {target} cannot say: quantize with "
                "A16 in the scheme."
            )
        if not self.is_native:
            return
        if self.own["kv"] is not None:
            raise LowbitError(
                f"'{self.folder}' quantizes keys and values, which {target} cannot say: quantize "
                "without KV in the scheme."
            )
        if self.own["rotations"]:
            raise LowbitError(
                f"'{self.folder}' rotates activations while it runs, which {target} cannot say: "
                "quantize with --set quarot.online=false."
            )
        kept = [n for n in self.grids if native.outliers_of(self.own, n)]
        if kept:
            raise LowbitError(
                f"'{kept[0]}' keeps weights in floating point, which {target} cannot say."
            )

    def shards(self, hashing: Hashing) -> Iterator[Shard]:
        """(file name, its linears, its other tensors), one file in memory at a time. Each is hashed
        meanwhile, and found to be what was written before the next one comes.

        Raises:
            VerificationError: a file is not what the report says, or a linear is in none.
        """
        left = set(self.grids)
        for name, record in self.report["shards"].items():
            digest = hashing.source(self.folder / name)
            held = read_shard(self.folder / name)
            linears = {}
            for linear in [n for n in self.grids if is_packed(n, held)]:
                local = local_tensors(held, linear)
                linears[linear] = Linear(linear, self.grids[linear], local)
                for key in local:
                    del held[f"{linear}.{key}"]
            yield name, linears, held
            left -= linears.keys()
            if digest.result() != record["sha256"]:
                raise VerificationError(f"'{self.folder / name}' is not what was written.")
            self.proved.add(name)
        if left:
            raise VerificationError(f"'{min(left)}' is in no file of '{self.folder}'.")

    def check(self) -> None:
        """Look for damage where an export failed before all of the artifact was found to be what
        was written.

        Raises:
            VerificationError: naming the tensor that differs.
        """
        if self.proved != set(self.report["shards"]):
            check_tensors(self.folder, self.report)

    def others(self) -> dict[str, Stored]:
        """Full names, shapes and dtypes of the tensors that belong to no quantized linear."""
        out: dict[str, Stored] = {}
        for name in self.report["shards"]:
            with safe_open(self.folder / name, framework="pt") as f:
                keys = set(f.keys())
                packed = {n for n in packed_linears(keys) if n in self.grids}
                for key in sorted(keys):
                    if key.rpartition(".")[0] not in packed or not key.rpartition(".")[
                        2
                    ].startswith("weight_"):
                        part = f.get_slice(key)
                        out[key] = Stored(tuple(part.get_shape()), part.get_dtype())
        return out

    @cached_property
    def index(self) -> dict[str, Any]:
        """Its model.safetensors.index.json."""
        found: dict[str, Any] = json.loads((self.folder / INDEX).read_text())
        return found
