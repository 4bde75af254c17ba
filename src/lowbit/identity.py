"""What decides the bytes of a run: an interrupted one is continued by the same only, and ranks share one if all have the same."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .artifact import file_hash
from .methods import OmniQuant, TesseraQ
from .model.calibration import Rows
from .model.stream import ModelStream
from .recipe import Recipe


def fingerprint(stream: ModelStream, recipe: Recipe, rows: Rows, seed: int) -> dict[str, Any]:
    """The model, the recipe with the files it names, the tokens, the seed, the arithmetic and the versions."""
    config = stream.checkpoint.file("config.json")
    assert config is not None
    files = [m.clips for m in recipe.methods if isinstance(m, OmniQuant) and m.clips]
    return {
        "model": hashlib.sha256(config.read_bytes() + stream.checkpoint.digest().encode()).hexdigest(),
        "recipe": {k: v for k, v in recipe.as_dict().items() if k != "calibration"},  # its tokens count, not their path
        "files": {f: file_hash(Path(f)) for f in files},
        "calibration": rows.sha256, "seed": seed, "compute": str(stream.compute), "versions": {"lowbit": own_version(), **versions()},
        "bfloat16_steps": any(isinstance(m, TesseraQ) and m.in_bfloat16(stream.device) for m in recipe.methods),
    }  # fmt: skip


def own_version() -> str:
    """Of this library."""
    from . import __version__

    return __version__


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide bytes."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "safetensors", "compressed-tensors")}}


def sources() -> str:
    """sha256 over this library's own modules: a working copy has one version and many states."""
    root = Path(__file__).parent
    files = sorted(p for kind in ("*.py", "*.c", "*.toml") for p in root.rglob(kind))
    return hashlib.sha256("".join(f"{p.relative_to(root)} {file_hash(p)}\n" for p in files).encode()).hexdigest()
