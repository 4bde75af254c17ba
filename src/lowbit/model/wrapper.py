"""Models whose decoder lies inside a larger one, which sees or hears as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import LowbitError


def is_wrapper(config: Any) -> bool:
    """Whether a transformers config is of a model around a text model with a config of its own."""
    return config.get_text_config() is not config


def text_config(config: Any, name: str) -> Any:
    """The config of the decoder of a model: of the text model inside of a wrapper, else the model's
    own.

    Args:
        config: of transformers. name: of the model, for errors.

    Raises:
        LowbitError: a model around others, none of which continues a text.
    """
    try:
        text = config.get_text_config()
    except ValueError:  # of several text models
        text = None
    inside = text is not config
    if text is None or (config.sub_configs and not inside) or (inside and not _writes(config)):
        raise LowbitError(
            f"'{name}' is a '{config.model_type}' model without a text model that continues a "
            "text: lowbit quantizes decoders, alone or inside of a larger model."
        )
    return text


def _writes(config: Any) -> bool:
    """Whether a class of transformers continues texts with a wrapper."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    return type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING or (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    )


def is_text_of_wrapper(config: Any) -> bool:
    """Whether a config is of the text model of some wrapper that continues texts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    return any(
        kind.sub_configs.get("text_config") is type(config)
        for kind in MODEL_FOR_MULTIMODAL_LM_MAPPING
    )


def class_for(config: Any) -> Any:
    """The automatic class of transformers that loads all of a model: of a wrapper its towers as
    well.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    if is_wrapper(config) and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def whole_model(config: Any) -> Any | None:
    """A wrapper on the meta device; None if its class cannot be built."""
    try:
        with torch.device("meta"):
            return class_for(config).from_config(config)
    except Exception:  # each class fails in ways of its own
        return None


def headed(config: Any, **options: Any) -> nn.Module:
    """The text model of a wrapper whose own class has no output head, with that head.

    Args:
        config: of the text model. options: of ``AutoModel.from_config``.
    """
    from transformers import AutoModel, GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    trunk = AutoModel.from_config(config, **options)

    class Headed(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
        _supports_sdpa = trunk._supports_sdpa

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = trunk
            self.lm_head = nn.Linear(
                config.hidden_size, config.vocab_size, bias=False, dtype=options.get("dtype")
            )

        def _init_weights(self, module: nn.Module) -> None:
            trunk._init_weights(module)

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            out = self.model(input_ids=input_ids, **kwargs)
            return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))

    # transformers reads the source of a class's module to see which settings it takes.
    Headed.__module__ = type(trunk).__module__
    return Headed(trunk.config)
