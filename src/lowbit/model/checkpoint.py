"""Tensors by name from a Hugging Face checkpoint: a local folder or a hub id, one file or sharded,
safetensors only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LowbitError
from .raw import Raw, raw_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NAMED = "transformers_weights"  # config.json may say which file holds the weights
_ADAPTER = "adapter_config.json"
TEMPLATES = "additional_chat_templates/"  # where transformers saves chat templates that have names
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


def config_at(path: Path) -> Any:
    """The transformers config in a config.json, without running any code that comes with it.

    Raises:
        LowbitError: transformers cannot make a config of it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            path.parent if path.name == "config.json" else path, trust_remote_code=False
        )
    except Exception as e:  # each family's config class fails in ways of its own
        own = _own_code(path)
        if own is not None:
            raise LowbitError(
                f"{path} asks for code that comes with the model ({own}), and its model type is "
                "none of transformers': lowbit runs no such code (trust_remote_code stays off). "
                "Nothing was written."
            ) from e
        raise LowbitError(
            f"{path} cannot be read as a model config: "
            f"{(str(e) or type(e).__name__).splitlines()[0]}"
        ) from e


def _own_code(path: Path) -> str | None:
    """The code of its own that a config.json names first; None if it names none."""
    try:
        said = json.loads((path / "config.json" if path.is_dir() else path).read_text("utf-8"))
        named = said["auto_map"]
        return f"auto_map: {next(iter(named.values()))}"
    except (OSError, ValueError, LookupError, AttributeError, TypeError, StopIteration):
        return None


def hub_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """Download (or find in the cache) one file of a hub repository; None if the repository has no
    such file.

    Without a network, a repository whose config.json is cached has the files that are cached and no
    others.

    Raises:
        LowbitError: the repository cannot be reached or does not exist.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError as e:
        if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            return None
        raise LowbitError(
            f"'{model}' is not a local folder, and '{name}' of that hub repository is neither "
            "cached nor reachable. "
            "Check the path, or the network (HF_HUB_OFFLINE, HF_ENDPOINT)."
        ) from e
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise LowbitError(
            f"'{model}' is neither a local folder nor a hub repository you can read."
        ) from e
    except (HfHubHTTPError, OSError) as e:
        raise LowbitError(f"could not fetch '{name}' of '{model}' from the hub: {e}") from e


def hub_files(model: str, revision: str | None = None) -> list[str]:
    """Names of all files of a hub repository; without a network, of those that are cached.

    Raises:
        LowbitError: the repository does not exist or cannot be read.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        found = HfApi().model_info(model, revision=revision).siblings
        return [f.rfilename for f in found or ()]
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise LowbitError(
            f"'{model}' is neither a local folder nor a hub repository you can read."
        ) from e
    except (
        Exception
    ) as e:  # of the hub, of the network, of offline mode: each has a family of its own
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise LowbitError(f"the files of '{model}' on the hub cannot be listed: {e}") from e
        snapshot = Path(cached).parent
        return [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]


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
        self.name = str(model)
        self.revision = revision
        self.folder = Path(model) if Path(model).is_dir() else None
        if self.folder is None and Path(model).exists():
            raise LowbitError(
                f"'{model}' is a file: give the folder that holds config.json and the safetensors, "
                "or a GGUF file."
            )
        if self.folder is None and (
            str(model).startswith((".", "/", "~")) or str(model).count("/") != 1
        ):
            raise LowbitError(f"no such folder: '{model}'.")
        if self.file("config.json") is None:
            self._refuse_adapter(alone=True)
            raise LowbitError(f"'{self.name}' has no config.json: {self._instead()}")
        if self.folder is None:
            self.revision = self._commit()
        self.config_json = self._read_json("config.json")
        self._refuse_adapter(alone=False)
        self.shards = self._find_shards()

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

    def _commit(self) -> str | None:
        """The commit that a hub's branch points at now: what is pushed later is another model."""
        path = self.file("config.json")
        snapshot = path.parent if path is not None else Path()
        return snapshot.name if snapshot.parent.name == "snapshots" else self.revision

    def _instead(self) -> str:
        """What a folder without a config.json may be meant for."""
        found = sorted(p.name for p in self.folder.glob("*.gguf")) if self.folder else []
        if found:
            return f"to quantize '{found[0]}' in it, give that file."
        return "is it a Hugging Face model folder?"

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.file(name)
        assert path is not None  # the caller has found it
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as e:
            raise LowbitError(f"{path} is not readable JSON ({e}). Download it again.") from e
        if not isinstance(data, dict):
            raise LowbitError(f"{path} does not hold a JSON object. Download it again.")
        return data

    def _refuse_adapter(self, alone: bool) -> None:
        """Raise LowbitError if an adapter is there: transformers would add it to the weights, which
        it is not part of.
        """
        path = self.file(_ADAPTER)
        if path is None:
            return
        how = "merge it into the model first (peft: merge_and_unload, then save_pretrained)"
        if not alone:
            raise LowbitError(
                f"{path} says that an adapter belongs to these weights: {how}, or move the "
                "adapter's files away."
            )
        base = self._read_json(_ADAPTER).get("base_model_name_or_path")
        of = f"'{base}'" if isinstance(base, str) and base else "a base model that it does not name"
        raise LowbitError(f"'{self.name}' holds an adapter of {of} and no model ({path}): {how}.")

    def _find_shards(self) -> tuple[str, ...]:
        """Names of the files that hold the weights, by transformers' own rule."""
        named = self.config_json.get(_NAMED)
        if named is not None and (
            not isinstance(named, str) or ".." in Path(named).parts or Path(named).is_absolute()
        ):
            raise LowbitError(
                f"config.json of '{self.name}' has {_NAMED} = {named!r}, which is no file of this "
                "folder: remove the entry."
            )
        for name in (_SINGLE, _INDEX) if named is None else (named,):
            if self.file(name) is not None:
                return self._listed(name) if name.endswith(".json") else (name,)
        unreached = "" if self.folder else " (or none is cached, and the hub was not reached)"
        wanted = f"neither {_SINGLE} nor {_INDEX}"
        if named is not None:
            wanted = f"no '{named}', which its config.json names as {_NAMED}"
        raise LowbitError(
            f"'{self.name}' has {wanted}{unreached}. Only safetensors are read; convert other "
            "formats with transformers' save_pretrained."
        )

    def _listed(self, index: str) -> tuple[str, ...]:
        where = self._read_json(index).get("weight_map")
        if (
            not isinstance(where, dict)
            or not where
            or not all(isinstance(v, str) for v in where.values())
        ):
            raise LowbitError(
                f"{self.file(index)} is not a readable safetensors index (no weight_map). Download "
                "it again."
            )
        for shard in where.values():
            if Path(shard).is_absolute() or ".." in Path(shard).parts:
                raise LowbitError(
                    f"{self.file(index)} names the shard '{shard}', which is no file of this "
                    "folder."
                )
        return tuple(sorted(set(where.values())))

    def files(self) -> list[str]:
        """Names of all files at the top and of the named chat templates, sorted; other folders by
        their names, which end in "/".

        Raises:
            LowbitError: the hub cannot be reached.
        """
        if self.folder is not None:
            names = {p.name + "/" * p.is_dir() for p in self.folder.iterdir()}
            names |= {
                TEMPLATES + p.name for p in (self.folder / TEMPLATES).glob("*") if p.is_file()
            }
        else:
            listed = hub_files(self.name, self.revision)
            names = {
                n if "/" not in n or n.startswith(TEMPLATES) else n.partition("/")[0] + "/"
                for n in listed
            }
        return sorted(names - {TEMPLATES})

    def is_regular(self, name: str) -> bool:
        """Whether a listed name is a file with bytes, not a link that leads nowhere or a pipe; of a
        hub all are.
        """
        return self.folder is None or (self.folder / name).is_file()

    def file(self, name: str) -> Path | None:
        """Path of one file of the model, fetched from the hub if need be; None if the model has no
        such file.
        """
        if self.folder is None:
            return hub_file(self.name, name, self.revision)
        path = self.folder / name
        return path if path.is_file() else None

    def _open(self, shard: str) -> safe_open:
        path = self.file(shard)
        if path is None:
            raise LowbitError(
                f"'{shard}', which {_INDEX} names, is missing from '{self.name}'. Download it "
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
