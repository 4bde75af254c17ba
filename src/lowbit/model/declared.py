"""What a config.json declares of weights: what they were trained for, how they are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import LowbitError

_KEYS = ("quantization_config", "quantization", "compression_config")
_FORMATS = ("format", "quant_algo")  # of a quantizer that has several
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """How config.json says that the weights are quantized, None if it does not."""
    for key in _KEYS:
        said = config.get(key)
        if said:
            method = method_of(said) if isinstance(said, Mapping) else None
            return f"{key} says {method}" if method else key
    return None


def method_of(said: Mapping[str, Any]) -> str | None:
    """The quantizer that a quantization_config names, and which of its formats."""
    method = said.get("quant_method")
    named = [str(said[key]) for key in _FORMATS if said.get(key)]
    return ", ".join([method, *named]) if isinstance(method, str) else None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with no word of a quantization."""
    return {k: v for k, v in config.items() if k not in _KEYS}


def check_declared(config: Mapping[str, Any], name: str) -> None:
    """Refuse what no weights could make a source of: a model that is trained for something else
    than the next token, or that computes with other numbers than its weights.

    Args:
        config: a config.json. name: of the model, for errors.

    Raises:
        LowbitError: naming what config.json says.
    """
    named = config.get("architectures")
    classes = named if isinstance(named, list) else []
    other = [c for c in classes if isinstance(c, str) and "For" in c and not c.endswith(_CAUSAL)]
    if other and len(other) == len(classes):
        raise LowbitError(
            f"'{name}' is a {other[0]} (architectures in its config.json): lowbit quantizes causal "
            "language models."
        )
    for key, said in _quantizations(config):
        _check_quantization(key, said, name)


def _quantizations(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Entries about a quantization, those of the text model of a wrapper included."""
    inner = config.get("text_config")
    for held in (config, inner if isinstance(inner, Mapping) else {}):
        for key in _KEYS:
            said = held.get(key)
            if isinstance(said, Mapping):
                yield key, said


def _check_quantization(key: str, said: Mapping[str, Any], name: str) -> None:
    if said.get("quant_method") == "bitnet":
        raise LowbitError(
            f"'{name}' has packed weights of three values, or float weights that transformers "
            f"rounds to three values while it loads them ({key} says bitnet): lowbit would "
            "quantize other numbers than those. Remove the entry from its config.json if the "
            "weights are floats and meant as they are."
        )
    transforms = said.get("transform_config")
    if transforms and (not isinstance(transforms, Mapping) or transforms.get("config_groups", 1)):
        raise LowbitError(
            f"'{name}' is computed with transforms around its linears ({key} has a "
            "transform_config), which lowbit does not apply: without them it is another function. "
            "Start from the model that was transformed, in 16 or 32 bits."
        )
    for part, kept in (("sparsity_config", "dense"), ("moe_sparsity_config", None)):
        sparse = said.get(part)
        form = sparse.get("format") or "dense" if isinstance(sparse, Mapping) else sparse
        if sparse and (kept is None or form != kept):
            raise LowbitError(
                f"'{name}' is stored sparse ({key} has a {part} that is not dense), which lowbit "
                "does not read. Start from the model in 16 or 32 bits."
            )
