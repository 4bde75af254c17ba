"""Which files of a model hold its weights, by transformers' own rule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .repository import Repository

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NAMED = "transformers_weights"  # config.json may say which file holds the weights


def weight_files(repository: Repository, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the safetensors files that transformers reads: the one that config.json names, else
    model.safetensors, else the shards of the index.

    Args:
        config: what config.json says.

    Raises:
        LowbitError: there are none, or a name that is no file of the folder.
    """
    name, named = repository.name, config.get(_NAMED)
    if named is not None and (not isinstance(named, str) or _is_outside(named)):
        raise LowbitError(
            f"config.json of '{name}' has {_NAMED} = {named!r}, which is no file of this "
            "folder: remove the entry."
        )
    for file in (_SINGLE, INDEX) if named is None else (named,):
        if repository.file(file) is not None:
            return _listed(repository, file) if file.endswith(".json") else (file,)
    unreached = "" if repository.folder else " (or none is cached, and the hub was not reached)"
    wanted = f"neither {_SINGLE} nor {INDEX}"
    if named is not None:
        wanted = f"no '{named}', which its config.json names as {_NAMED}"
    raise LowbitError(
        f"'{name}' has {wanted}{unreached}. Only safetensors are read; convert other "
        "formats with transformers' save_pretrained."
    )


def _listed(repository: Repository, index: str) -> tuple[str, ...]:
    """The shards that an index names."""
    where = repository.read_json(index).get("weight_map")
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(v, str) for v in where.values())
    ):
        raise LowbitError(
            f"{repository.file(index)} is not a readable safetensors index (no weight_map). "
            "Download it again."
        )
    for shard in where.values():
        if _is_outside(shard):
            raise LowbitError(
                f"{repository.file(index)} names the shard '{shard}', which is no file of this "
                "folder."
            )
    return tuple(sorted(set(where.values())))


def _is_outside(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts
