"""Opening what a user names as a model: a folder, a hub id, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .checkpoint import Checkpoint
from .dequantized import Dequantized
from .gguf_file import GGUFFile, is_gguf
from .gguf_names import Translated
from .gguf_source import GGUFSource


def open_source(model: str | Path, revision: str | None = None) -> Checkpoint:
    """The tensors and files of a model, all of them as floats where it is quantized in a way that
    is read.

    Args:
        model: a local folder, a hub id, or a GGUF file. revision: of the hub.

    Raises:
        LowbitError: see `Checkpoint` and `GGUFSource`.
    """
    path = gguf_path(model)
    return Dequantized(model, revision) if path is None else GGUFSource(path)


def open_files(model: str | Path) -> Checkpoint:
    """The same as loaders of the model itself take it: a folder's tensors as they are stored.

    Raises:
        LowbitError: see `Checkpoint` and `GGUFSource`.
    """
    path = gguf_path(model)
    return Checkpoint(model) if path is None else GGUFSource(path)


def gguf_path(model: str | Path) -> Path | None:
    """The GGUF file that a model is named by, None if it is named otherwise.

    Raises:
        LowbitError: the name is one of a GGUF file, which is not there.
    """
    path = Path(model)
    named = path.suffix == ".gguf" and not path.is_dir()
    if named and not path.exists():
        raise LowbitError(f"no such file: '{model}'.")
    return path if named or (path.is_file() and is_gguf(path)) else None


def gguf_config(path: Path) -> Any:
    """The transformers config of a GGUF file.

    Raises:
        LowbitError: it cannot be read, or transformers does not know its architecture.
    """
    return Translated.of(GGUFFile(path)).config
