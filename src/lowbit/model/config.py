"""Configs of transformers: what a config.json says a model is, without running any code that comes
with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .checkpoint import Checkpoint
from .hub import hub_file
from .source import gguf_config, gguf_path


def read_config(model: str) -> Any:
    """The config of a local folder, of a config.json itself, of a GGUF file or of a hub repository;
    weights are not looked at.

    Raises:
        LowbitError: there is none.
    """
    path = Path(model)
    gguf = gguf_path(path)
    if gguf is not None:
        return gguf_config(gguf)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if (
            path.suffix == ".json"
            or path.name == "config.json"
            or model.count("/") != 1
            or model.startswith((".", "/"))
        ):
            raise LowbitError(f"no config.json at '{model}'.")
        found = hub_file(model, "config.json")
        if found is None:
            raise LowbitError(f"hub repository '{model}' has no config.json.")
        path = found
    return config_at(path)


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint.

    Raises:
        LowbitError: see `config_at`.
    """
    path = checkpoint.file("config.json")
    assert path is not None  # Checkpoint() has checked
    return config_at(path)


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
