"""A model without data, built by transformers on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import LowbitError
from .wrapper import headed, is_text_of_wrapper

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def build_skeleton(config: Any, name: str, **options: Any) -> Any:
    """The causal language model of a config, on the meta device, in evaluation mode.

    Args:
        config: of transformers. name: of the model, for errors. options: of
            ``AutoModelForCausalLM.from_config``.

    Raises:
        LowbitError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            if type(config) not in AutoModelForCausalLM._model_mapping and is_text_of_wrapper(
                config
            ):
                return headed(config, **options).eval()
            return AutoModelForCausalLM.from_config(config, **options).eval()
    except Exception as e:  # each model class fails in ways of its own
        raise LowbitError(
            f"config.json of '{name}' describes a '{config.model_type}' model that transformers "
            f"cannot build: {reason_of(e)}"
        ) from e


def fast_attention(config: Any) -> dict[str, str]:
    """The option of `build_skeleton` for torch's own attention, where the model's class can use it;
    else for the plain one.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(config), None) or (
        AutoModel._model_mapping.get(type(config), None)
    )
    fast = getattr(kind, "_supports_sdpa", False)
    return {"attn_implementation": "sdpa" if fast else "eager"}


def compute_buffers(model: Any) -> None:
    """Make real what is computed rather than stored (rotary frequencies, Gemma's embedding factor).

    Some models fill the buffers of their blocks; so everything that holds a buffer is asked, from
    the inside out.

    Args:
        model: of transformers, on the meta device; parameters stay there.

    Raises:
        LowbitError: its class cannot, naming the module.
    """
    loose = []
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device="cpu"))
                loose.append(path)
    holders = set(loose)
    for path in loose:
        parts = path.split(".")
        holders |= {".".join(parts[:n]) for n in range(len(parts))}
    for path in sorted(holders, key=lambda p: (-len(p.split(".")), not p, p)):
        try:
            with torch.no_grad():
                _initialize(model, model.get_submodule(path))
        except Exception as e:  # each model class fails in ways of its own
            raise LowbitError(
                f"'{model.config.model_type}' models cannot compute the buffers of '{path}' from "
                f"their config: {reason_of(e)}"
            ) from e


def _initialize(model: Any, module: nn.Module) -> None:
    """Have a model's class fill a module, or the module's own class where it is a model itself:
    some take the attributes of the one for those of the other.
    """
    from transformers import PreTrainedModel

    try:
        model._init_weights(module)
    except AttributeError:
        if module is model or not isinstance(module, PreTrainedModel):
            raise
        module._init_weights(module)


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, with its kind where that alone would not be
    understood.
    """
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    plain = type(error).__name__
    if not said:
        return plain
    unclear = isinstance(error, (KeyError, AttributeError, TypeError, AssertionError))
    return f"{plain} {said}" if unclear else said
