"""What transformers makes of a GGUF file: a config, and where each parameter lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import LowbitError
from .gguf_file import GGUFFile
from .skeleton import build_skeleton, reason_of

# Keys of transformers' table that are no architectures, and encoders.
_NO_DECODERS = {"general", "tokenizer", "t5", "umt5"}
# Sizes that transformers takes from its defaults for some architectures.
_SIZES = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
_HEAD = "output.weight"
_TIED = ("falcon", "bloom")  # whatever the file holds, as transformers has it


def architectures() -> list[str]:
    """Architectures of decoders that transformers reads from GGUF files, as it calls them."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - _NO_DECODERS)


@dataclass(frozen=True)
class Translated:
    """A GGUF file in the terms of transformers.

    Attributes:
        config: of transformers. said: what it was made of.
        file: the GGUF file.
    """

    file: GGUFFile
    said: Mapping[str, Any]
    config: Any

    @classmethod
    def of(cls, file: GGUFFile) -> Translated:
        """Read the metadata.

        Raises:
            LowbitError: transformers does not know the architecture, or cannot make a config of
                what the file says.
        """
        from transformers import AutoConfig
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        try:
            said = load_gguf_checkpoint(file.first)["config"]
            if len(file.parts) > 1:  # transformers looks for the head in the first part alone
                tied = _HEAD not in file.tensors or file.architecture in _TIED
                said["tie_word_embeddings"] = tied
            known = vars(AutoConfig.for_model(said["model_type"]))
            for key, name in _SIZES.items():
                size = file.field(f"{file.architecture}.{key}")
                if size is not None and name in known:
                    said.setdefault(name, size)
            config = AutoConfig.for_model(**said)
        except Exception as e:  # each family fails in ways of its own
            reason = reason_of(e)
            if "not supported yet" in reason or "Unrecognized model identifier" in reason:
                raise LowbitError(
                    f"'{file.path}' is a '{file.architecture}' model, of which transformers cannot "
                    f"read GGUF files. It reads {', '.join(architectures())}. Start from the "
                    "model's own safetensors."
                ) from e
            raise LowbitError(
                f"transformers cannot make a model config of '{file.path}': {reason}"
            ) from e
        return cls(file, said, config)

    @cached_property
    def skeleton(self) -> Any:
        """The model of transformers, without data."""
        return build_skeleton(self.config, str(self.file.path))

    @cached_property
    def processor(self) -> Any:
        """What transformers does to a tensor after it is dequantized."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        kind = TENSOR_PROCESSORS.get(self.file.architecture, TensorProcessor)
        return kind(config=self.said)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Tensor of GGUF -> parameter of the model, also of tensors that are not in the file."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        skeleton = self.skeleton
        try:
            return dict(get_gguf_hf_weights_map(skeleton, self.processor))
        except Exception as e:  # an architecture that the gguf package does not know
            raise LowbitError(
                f"the tensors of '{self.file.path}' cannot be named: {reason_of(e)}"
            ) from e
