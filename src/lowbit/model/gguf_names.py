"""What transformers makes of a GGUF file: a config, and where each parameter lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import LowbitError
from .gguf_file import GGUFFile
from .gguf_header import Header
from .skeleton import build_skeleton, reason_of

# Keys of transformers' table that are no architectures, encoders, and one of which it reads files
# without their experts.
_NO_DECODERS = {"general", "tokenizer", "t5", "umt5", "gpt_oss"}
_EXPERTS = ("num_experts", "num_local_experts")
_HEAD = "output.weight"
_TIED = ("falcon", "bloom")  # whatever the file holds, as transformers has it


def architectures() -> list[str]:
    """Architectures of decoders that transformers reads from GGUF files, as it calls them."""
    from transformers import CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = set(GGUF_SUPPORTED_ARCHITECTURES) - _NO_DECODERS
    return sorted(known & set(CONFIG_MAPPING.keys()))


@dataclass(frozen=True)
class Translated:
    """A GGUF file in the terms of transformers.

    Attributes:
        config: of transformers. said: what it was made of.
        file: the GGUF file. unread: entries of its header about the model that are not read.
    """

    file: GGUFFile
    said: Mapping[str, Any]
    config: Any
    unread: tuple[str, ...]

    @classmethod
    def of(cls, file: GGUFFile) -> Translated:
        """Read the metadata.

        Raises:
            LowbitError: transformers does not know the architecture, reads it as another model, or
                cannot make a config of what the file says.
        """
        from transformers import AutoConfig
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_CONFIG_MAPPING,
            load_gguf_checkpoint,
        )

        if file.architecture.replace("-", "_") in _NO_DECODERS:
            raise _unknown(file)
        try:
            said = load_gguf_checkpoint(file.first)["config"]
            if len(file.parts) > 1:  # transformers looks for the head in the first part alone
                tied = _HEAD not in file.tensors or file.architecture in _TIED
                said["tie_word_embeddings"] = tied
            header = Header(file, vars(AutoConfig.for_model(said["model_type"])))
            said |= header.added(said)
            config = AutoConfig.for_model(**said)
        except Exception as e:  # each family fails in ways of its own
            reason = reason_of(e)
            if "not supported yet" in reason or "Unrecognized model identifier" in reason:
                raise _unknown(file) from e
            raise LowbitError(
                f"transformers cannot make a model config of '{file.path}': {reason}"
            ) from e
        _check_same_model(file, config)
        read = GGUF_CONFIG_MAPPING.get(said["model_type"].removesuffix("_text"), {})
        return cls(file, said, config, header.unread(read))

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


def _unknown(file: GGUFFile) -> LowbitError:
    return LowbitError(
        f"'{file.path}' is a '{file.architecture}' model, of which transformers cannot read GGUF "
        f"files. It reads {', '.join(architectures())}. Start from the model's own safetensors."
    )


def _check_same_model(file: GGUFFile, config: Any) -> None:
    """Raise LowbitError if a file is of a kind of its architecture that transformers takes for
    another one.
    """
    own = file.architecture
    experts, groups = (
        file.field(f"{own}.{key}") for key in ("expert_count", "attention.head_count_kv")
    )
    kind = None
    if experts and not any(getattr(config, name, None) == experts for name in _EXPERTS):
        kind = f"with {experts} experts"
    elif own == "falcon" and groups is not None and groups > 1:
        kind = f"with {groups} heads of keys and values"
    elif own == "mamba" and file.field(f"{own}.ssm.dt_b_c_rms"):
        kind = "with norms inside its blocks"
    if kind is not None:
        raise LowbitError(
            f"'{file.path}' is a '{own}' model {kind}, which transformers does not read from GGUF "
            "files of this architecture. Start from the model's own safetensors."
        )
