"""A model that has been opened: its checkpoint, and what its config says it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, Stored
from .config import load_config
from .declared import without_quantization
from .intake import check_source
from .source import open_source
from .wrapper import is_wrapper, text_config


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its configs.

    Attributes:
        checkpoint: of which no tensor data has been read. stored: its tensors.
        whole_config: of transformers, as config.json has it. config: that of the decoder.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, Stored]
    whole_config: Any
    config: Any

    @classmethod
    def of(cls, model: str | Path, revision: str | None = None) -> Opened:
        """Open a model.

        Args:
            model: local folder, hub id or GGUF file. revision: hub branch, tag or commit.

        Raises:
            LowbitError: it cannot be read, or is no causal language model to be quantized.
        """
        checkpoint = open_source(model, revision)
        check_source(checkpoint)
        stored = checkpoint.stored()
        whole = load_config(checkpoint)
        return cls(checkpoint, stored, whole, text_config(whole, checkpoint.name))

    @property
    def name(self) -> str:
        """As it was given, for errors."""
        return self.checkpoint.name

    @property
    def wrapped(self) -> bool:
        """Whether the decoder lies inside a larger model."""
        return is_wrapper(self.whole_config)

    @property
    def says_tied(self) -> bool:
        """Whether the decoder's config ties the output head to the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of code that comes with the model."""
        if not self.checkpoint.config_json.get("auto_map"):
            return ()
        return (
            "the model brings code of its own (auto_map in config.json), which is carried along "
            "and was not run: what was quantized is "
            "transformers' own class",
        )

    def artifact_config(self, dtype: torch.dtype, untied: bool) -> dict[str, Any]:
        """What an artifact's config.json says, but for its quantization: the original's, and what
        is true of the tensors written.

        Args:
            dtype: of most tensors written. untied: the head has become a matrix of its own.
        """
        said = without_quantization(self.checkpoint.config_json)
        if self.wrapped:
            if untied:
                said["tie_word_embeddings"] = False
                said["text_config"] = {**said["text_config"], "tie_word_embeddings": False}
            return said
        if untied:
            said["tie_word_embeddings"] = False
        named = str(dtype).removeprefix("torch.")
        keys = [k for k in ("dtype", "torch_dtype") if k in said] or ["dtype"]
        return {**said, **dict.fromkeys(keys, named)}
