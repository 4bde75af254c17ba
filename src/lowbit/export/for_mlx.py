"""mlx-lm: the model types whose packed weights it reads, and what it wants in config.json.

Source: models/*.py of mlx-lm 0.32. It takes packed weights under the plain names of the linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .windows import period

_GEMMA3_PERIOD = 6
# Every one was exported and run by mlx-lm.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "gemma3_text",
    "olmo2",
    "granite",
    "smollm3",
    "glm4",
    "olmo3",
    "seed_oss",
    "cohere",
    "hunyuan_v1_dense",
    "ernie4_5",
    "helium",
)
_STACKED = "it wants the experts of a block stacked in one tensor, which is not written"
# Model type -> why it is not taken.
REASONS = {
    "opt": "it has no such model",
    "bitnet": "it packs these linears in a way of its own",
    "gemma2": "it attends to all tokens where this model has windows",
    "glm": "it gave other logits when it was tried",
    "olmo": "it wants a package that reads checkpoints of another layout",
    "exaone4": "it wants keys in config.json that transformers 5 does not write",
    "mixtral": _STACKED,
    "qwen3_moe": _STACKED,
    "qwen2_moe": _STACKED,
    "olmoe": _STACKED,
}


def misread(config: Any) -> str | None:
    """Why mlx-lm does not read packed weights of a model; None if it does.

    Args:
        config: of transformers.
    """
    family = config.model_type
    if family not in FAMILIES:
        why = f": {REASONS[family]}" if family in REASONS else ""
        return (
            f"mlx-lm does not read packed weights of '{family}' models{why}; it reads those of "
            f"{', '.join(FAMILIES)}."
        )
    if family == "gemma3_text":
        every = period(config.layer_types, _GEMMA3_PERIOD)
        if every is None or every > config.num_hidden_layers:
            return "mlx-lm wants every n-th block of 'gemma3_text' to attend to all tokens."
    return None


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json is to say besides: mlx-lm looks for rotary embeddings where transformers
    before 5 had them, and falls back on its own numbers in silence.

    Args:
        config: the model's config.json.
    """
    rope = config.get("rope_parameters") or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    made = {k: full[k] for k in ("rope_theta", "partial_rotary_factor") if k in full}
    if full.get("rope_type", "default") != "default":
        made["rope_scaling"] = {k: v for k, v in full.items() if k not in made}
    if local is not None:
        made["rope_local_base_freq"] = local["rope_theta"]
    if config["model_type"] == "gemma3_text" and config.get("layer_types"):
        made["sliding_window_pattern"] = period(config["layer_types"], _GEMMA3_PERIOD)
    return {k: v for k, v in made.items() if config.get(k) is None}
