"""The model families that llama.cpp computes as transformers does, each with what it wants said.

Source: the models, the metadata keys and the converter of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..windows import period

_GELU = "gelu_pytorch_tanh"
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_ALL = (*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# llama.cpp's own numbers, which no key of a file changes.
_GEMMA3_LARGEST = 62  # blocks of the one whose scores are scaled by another width than the heads'
_GEMMA3_PERIOD = 6
_SMOLLM3_PERIOD = 4

Keys = dict[str, Any]


def _nothing(config: Any) -> Keys:
    return {}


def _no_fault(config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a model type of transformers.

    Attributes:
        name: `general.architecture`. activation: of the MLP there, by its name in transformers.
        pairs: whether it rotates neighbouring channels of queries and keys, where transformers
            rotates channels half a head apart.
        gain: what it adds to the weights of norms beforehand.
        windows: whether it can limit how far attention reaches.
        partial: whether it can rotate a part of each head.
        factors: whether it divides rotary frequencies by numbers of the file.
        biases: its tensors that may have one.
        keys: config -> metadata beyond what all have, without the name of the architecture.
        fault: config -> what it computes otherwise, in words after "llama.cpp"; None without.
    """

    name: str
    activation: str = "silu"
    pairs: bool = False
    gain: float = 0.0
    windows: bool = False
    partial: bool = False
    factors: bool = False
    biases: tuple[str, ...] = _ATTENTION
    keys: Callable[[Any], Keys] = field(default=_nothing)
    fault: Callable[[Any], str | None] = field(default=_no_fault)


def head_width(config: Any) -> int:
    """Channels of a head."""
    found: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return found


# --- gemma3 ---------------------------------------------------------------------------------------


def _gemma3_keys(config: Any) -> Keys:
    keys: Keys = {}
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if "sliding_attention" in config.layer_types:
        keys["attention.sliding_window"] = config.sliding_window
        if (every := period(config.layer_types, _GEMMA3_PERIOD)) != _GEMMA3_PERIOD:
            keys["attention.sliding_window_pattern"] = every
        local = config.rope_parameters["sliding_attention"]
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    return keys


def _gemma3_fault(config: Any) -> str | None:
    largest = config.num_hidden_layers == _GEMMA3_LARGEST
    width = config.hidden_size // config.num_attention_heads if largest else head_width(config)
    if config.attn_logit_softcapping:
        return "does not cap attention scores in 'gemma3'"
    if config.use_bidirectional_attention:
        return "does not look ahead in 'gemma3'"
    if config.query_pre_attn_scalar != width:
        return (
            f"scales scores by the root of {width} in 'gemma3' of {config.num_hidden_layers} "
            f"blocks, and this model by that of {config.query_pre_attn_scalar}"
        )
    if period(config.layer_types, _GEMMA3_PERIOD) is None:
        return "repeats windows with a period in 'gemma3', which this model's layer_types have not"
    if config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
        return "scales no rotary embeddings of blocks with a window in 'gemma3'"
    return None


# --- the others -----------------------------------------------------------------------------------


def _phi3_keys(config: Any) -> Keys:
    # Zero is what the converter writes for models without one.
    return {"attention.sliding_window": config.sliding_window or 0}


def _phi3_fault(config: Any) -> str | None:
    joined = head_width(config) * config.num_attention_heads
    if joined == config.hidden_size:
        return None
    return (
        f"wants heads as wide as the model in 'phi3', and these have {joined} channels of "
        f"{config.hidden_size}"
    )


def _granite_keys(config: Any) -> Keys:
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _granite_fault(config: Any) -> str | None:
    if all(_granite_keys(config).values()):
        return None
    return "takes a multiplier of 0 for none in 'granite'"


def _smollm3_fault(config: Any) -> str | None:
    blocks = range(1, config.num_hidden_layers + 1)
    if [bool(r) for r in config.no_rope_layers] == [i % _SMOLLM3_PERIOD != 0 for i in blocks]:
        return None
    return f"rotates all but every {_SMOLLM3_PERIOD}th block in 'smollm3', and this model others"


def _mixtral_keys(config: Any) -> Keys:
    return {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def _qwen3_moe_keys(config: Any) -> Keys:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _qwen3_moe_fault(config: Any) -> str | None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "wants experts in every block of 'qwen3moe', and this model has some without"
    if not config.norm_topk_prob:
        return "makes the weights of the chosen experts sum to 1 in 'qwen3moe', this model does not"
    return None


FAMILIES = {
    "llama": Family("llama", pairs=True, factors=True, biases=_ALL),
    "mistral": Family("llama", pairs=True, factors=True, biases=_ALL),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family(
        "gemma3", _GELU, gain=1.0, windows=True, keys=_gemma3_keys, fault=_gemma3_fault
    ),
    "phi3": Family("phi3", partial=True, keys=_phi3_keys, fault=_phi3_fault),
    "granite": Family(
        "granite", pairs=True, factors=True, biases=_ALL, keys=_granite_keys, fault=_granite_fault
    ),
    "smollm3": Family("smollm3", pairs=True, fault=_smollm3_fault),
    "glm4": Family("glm4", partial=True),
    "mixtral": Family("llama", pairs=True, factors=True, keys=_mixtral_keys),
    "qwen3_moe": Family("qwen3moe", keys=_qwen3_moe_keys, fault=_qwen3_moe_fault),
}
