"""Tensors by name from a Hugging Face checkpoint: a local folder or a hub id, one file or sharded, safetensors only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LowbitError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def config_at(path: Path) -> Any:
    """The transformers config in a config.json, without running any code that comes with it.

    Raises:
        LowbitError: transformers cannot make a config of it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path.parent if path.name == "config.json" else path, trust_remote_code=False)
    except Exception as e:  # each family's config class fails in ways of its own
        raise LowbitError(f"{path} cannot be read as a model config: {(str(e) or type(e).__name__).splitlines()[0]}") from e


def hub_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """Download (or find in the cache) one file of a hub repository; None if the repository has no such file.

    Without a network, a repository whose config.json is cached has the files that are cached and no others.

    Raises:
        LowbitError: the repository cannot be reached or does not exist.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as e:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return None
        raise LowbitError(
            f"'{model}' is not a local folder, and '{name}' of that hub repository is neither cached nor reachable. "
            "Check the path, or the network (HF_HUB_OFFLINE, HF_ENDPOINT)."
        ) from e
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise LowbitError(f"'{model}' is neither a local folder nor a hub repository you can read.") from e
    except (HfHubHTTPError, OSError) as e:
        raise LowbitError(f"could not fetch '{name}' of '{model}' from the hub: {e}") from e


class Checkpoint:
    """Read-only access to a model's tensors. Opens files when they are needed and keeps none in memory.

    Args:
        model: a local folder or a hub repository id.
        revision: hub branch, tag or commit.

    Raises:
        LowbitError: no such folder or repository, or no safetensors in it.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.name = str(model)
        self.revision = revision
        self.folder = Path(model) if Path(model).is_dir() else None
        if self.folder is None and Path(model).exists():
            raise LowbitError(f"'{model}' is a file: give the folder that holds config.json and the safetensors.")
        if self.folder is None and (str(model).startswith((".", "/", "~")) or str(model).count("/") != 1):
            raise LowbitError(f"no such folder: '{model}'.")
        if self.file("config.json") is None:
            raise LowbitError(f"'{self.name}' has no config.json: is it a Hugging Face model folder?")
        index = self.file(_INDEX)
        if index is not None:
            try:
                self._where: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as e:
                raise LowbitError(f"{index} is not a readable safetensors index ({e}). Download it again.") from e
        else:
            if self.file(_SINGLE) is None:
                unreached = "" if self.folder else " (or neither is cached, and the hub was not reached)"
                raise LowbitError(
                    f"'{self.name}' has neither {_SINGLE} nor {_INDEX}{unreached}. Only safetensors are read; convert other formats with "
                    "transformers' save_pretrained."
                )
            with self._open(_SINGLE) as f:
                self._where = {key: _SINGLE for key in f.keys()}  # noqa: SIM118

    def file(self, name: str) -> Path | None:
        """Path of one file of the model, fetched from the hub if need be; None if the model has no such file."""
        if self.folder is None:
            return hub_file(self.name, name, self.revision)
        path = self.folder / name
        return path if path.is_file() else None

    def _open(self, shard: str) -> safe_open:
        path = self.file(shard)
        if path is None:
            raise LowbitError(f"shard '{shard}' named by {_INDEX} is missing from '{self.name}'.")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise LowbitError(f"{path} is not a readable safetensors file (truncated download?): {e}") from e

    def names(self) -> Iterable[str]:
        """Names of all tensors in the checkpoint."""
        return self._where.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every tensor, read from the headers alone. Also finds missing and truncated shards."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for shard in sorted(set(self._where.values())):
            with self._open(shard) as f:
                held = set(f.keys())
                for name in (n for n, s in self._where.items() if s == shard):
                    if name not in held:
                        raise LowbitError(f"tensor '{name}' is listed in {_INDEX} but not in shard '{shard}'.")
                    part = f.get_slice(name)
                    found[name] = (tuple(part.get_shape()), part.get_dtype())
        return found

    def digest(self) -> str:
        """sha256 over every tensor's name, type, shape and first row: tells models apart without reading them whole."""
        h = hashlib.sha256()
        for shard in sorted(set(self._where.values())):
            with self._open(shard) as f:
                for name in sorted(n for n, s in self._where.items() if s == shard):
                    part = f.get_slice(name)
                    shape = part.get_shape()
                    h.update(f"{name}{part.get_dtype()}{shape}".encode())
                    row = part[:1] if shape else f.get_tensor(name)[None]
                    h.update(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by name, in their stored dtype.

        Raises:
            LowbitError: a tensor is missing, unreadable, or holds NaN or infinity (named).
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            if name not in self._where:
                raise LowbitError(f"tensor '{name}' is missing from '{self.name}': the checkpoint does not fit its config.json.")
            wanted.setdefault(self._where[name], []).append(name)
        out: dict[str, Tensor] = {}
        for shard, keys in wanted.items():
            with self._open(shard) as f:
                for key in keys:
                    try:
                        tensor = f.get_tensor(key)
                    except (SafetensorError, OSError) as e:
                        raise LowbitError(f"tensor '{key}' in shard '{shard}' of '{self.name}' cannot be read: {e}") from e
                    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
                        bad = int((~torch.isfinite(tensor)).sum())
                        if bad:
                            raise LowbitError(
                                f"tensor '{key}' of '{self.name}' holds {bad} NaN or infinite values. Repair or re-download the checkpoint."
                            )
                    out[key] = tensor
        return out
