"""Tensors by name from a Hugging Face checkpoint: a local folder or a hub id, one file or sharded,
safetensors only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LowbitError
from .declared import quantized_by
from .raw import Raw, raw_tensors
from .repository import Repository
from .weight_files import INDEX, weight_files

# What lowbit quantizes, as safetensors names it.
FLOATS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class Stored:
    """How a tensor lies in its file.

    Attributes:
        shape: its sizes. kind: its dtype as safetensors names it, such as "BF16".
    """

    shape: tuple[int, ...]
    kind: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        # Of F8_E4M3 the first number; BOOL has none and is a byte.
        bits = re.search(r"\d+", self.kind)
        return self.numel * (int(bits[0]) if bits else 8) // 8


class Checkpoint:
    """Read-only access to a model's tensors. Opens files when they are needed and keeps none in
    memory.

    Reads the files that transformers reads: the one that config.json names, else model.safetensors,
    else the shards of the index.

    Args:
        model: a local folder or a hub repository id.
        revision: hub branch, tag or commit.

    Raises:
        LowbitError: no such folder or repository, no safetensors in it, or an adapter that belongs
            to the weights.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.repository = Repository.of(model, revision)
        self.config_json = self.repository.read_json("config.json")
        self.repository.refuse_adapter()
        self.shards = weight_files(self.repository, self.config_json)

    @property
    def name(self) -> str:
        """The model as it was given."""
        return self.repository.name

    @property
    def folder(self) -> Path | None:
        """The local folder, None of a hub repository."""
        return self.repository.folder

    @property
    def quantized_by(self) -> str | None:
        """How the model says that its weights are quantized, None if it does not."""
        return quantized_by(self.config_json)

    @cached_property
    def _held(self) -> dict[str, tuple[str, Stored]]:
        """Tensor -> its shard and how it lies there, from the shards' own headers, which are read
        when this is first asked for.
        """
        found: dict[str, tuple[str, Stored]] = {}
        for shard in self.shards:
            with self._open(shard) as f:
                for name in f.keys():  # noqa: SIM118
                    if name in found:
                        both = f"'{found[name][0]}' and '{shard}'"
                        raise LowbitError(
                            f"tensor '{name}' of '{self.name}' lies in {both}: remove the file "
                            "that does not belong."
                        )
                    part = f.get_slice(name)
                    found[name] = shard, Stored(tuple(part.get_shape()), part.get_dtype())
        return found

    def files(self) -> list[str]:
        """See `Repository`."""
        return self.repository.files()

    def is_regular(self, name: str) -> bool:
        """See `Repository`."""
        return self.repository.is_regular(name)

    def file(self, name: str) -> Path | None:
        """See `Repository`."""
        return self.repository.file(name)

    def _open(self, shard: str) -> safe_open:
        path = self.file(shard)
        if path is None:
            raise LowbitError(
                f"'{shard}', which {INDEX} names, is missing from '{self.name}'. Download it "
                "again, or remove a stale index."
            )
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise LowbitError(
                f"{path} is not a readable safetensors file (truncated download?): {e}"
            ) from e

    def stored(self) -> dict[str, Stored]:
        """Shape and dtype of every tensor by its name, read from the headers alone."""
        return {name: kept for name, (_, kept) in self._held.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they lie in the files."""
        return sum(kept.nbytes for _, kept in self._held.values())

    @property
    def loadable(self) -> bool:
        """Whether loaders find in the folder what is read here."""
        return True

    def copied(self, name: str) -> str:
        """How a tensor is taken over that is not quantized."""
        return "copied bit for bit"

    @property
    def left_out(self) -> Mapping[str, str]:
        """Tensors of the files that are not among the stored ones -> why."""
        return {}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of how the tensors are read."""
        return ()

    def rows(self, names: Iterable[str], start: int, stop: int) -> list[Tensor]:
        """Some rows of matrices, in their stored dtypes."""
        out = []
        for name in names:
            with self._open(self._held[name][0]) as f:
                out.append(f.get_slice(name)[start:stop])
        return out

    def read(self, names: Iterable[str], *, finite: bool = True) -> dict[str, Tensor]:
        """Read tensors by name, in their stored dtype.

        Args:
            finite: refuse tensors that hold NaN or infinity.

        Raises:
            LowbitError: a tensor is missing, unreadable, or holds NaN or infinity (named).
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self._held:
                raise LowbitError(
                    f"tensor '{name}' is missing from '{self.name}': the checkpoint does not fit "
                    "its config.json."
                )
            wanted.setdefault(self._held[name][0], []).append(name)
        out: dict[str, Tensor] = {}
        for shard, keys in wanted.items():
            with self._open(shard) as f:
                for key in keys:
                    try:
                        tensor = f.get_tensor(key)
                    except (SafetensorError, OSError) as e:
                        raise LowbitError(
                            f"tensor '{key}' in shard '{shard}' of '{self.name}' cannot be read: "
                            f"{e}"
                        ) from e
                    if finite:
                        self.refuse_nan(key, tensor)
                    out[key] = tensor
        return out

    def read_part(self, name: str, at: tuple[int | slice, ...], *, finite: bool = True) -> Tensor:
        """Read a part of one tensor, in its stored dtype, without the rest of it.

        Args:
            at: a number or a slice without a step, for each leading dimension.
            finite: refuse a part that holds NaN or infinity.

        Raises:
            LowbitError: the tensor is missing, unreadable, or the part holds NaN or infinity.
        """
        if name not in self._held:
            raise LowbitError(
                f"tensor '{name}' is missing from '{self.name}': the checkpoint does not fit "
                "its config.json."
            )
        shard = self._held[name][0]
        with self._open(shard) as f:
            try:
                part: Tensor = f.get_slice(name)[at]
            except (SafetensorError, OSError) as e:
                raise LowbitError(
                    f"tensor '{name}' in shard '{shard}' of '{self.name}' cannot be read: {e}"
                ) from e
        if finite:
            self.refuse_nan(name, part)
        return part

    def raw(self, names: Iterable[str]) -> dict[str, Raw]:
        """Tensors by name as bytes in their files, whatever their dtype.

        Raises:
            LowbitError: a file cannot be read.
        """
        wanted = list(names)
        found: dict[str, Raw] = {}
        for shard in dict.fromkeys(self._held[n][0] for n in wanted):
            path = self.file(shard)
            assert path is not None  # its header was read
            try:
                found.update(raw_tensors(path))
            except (OSError, ValueError) as e:
                raise LowbitError(f"{path} is not a readable safetensors file: {e}") from e
        return {n: found[n] for n in wanted}

    def as_stored(self, names: Iterable[str]) -> dict[str, Tensor | Raw]:
        """Tensors by name, bit for bit as they are shown: where they lie in a file, or as they
        were computed.

        Raises:
            LowbitError: see `raw` and `read`.
        """
        return dict(self.raw(names))

    def refuse_nan(self, name: str, tensor: Tensor) -> None:
        """Raise LowbitError if what was read of a tensor holds NaN or infinity."""
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float64)):
            return
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise LowbitError(
                f"tensor '{name}' of '{self.name}' holds {bad} NaN or infinite "
                "values. Repair or re-download the checkpoint."
            )
