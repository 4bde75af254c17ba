"""What a GGUF file says of a model besides its weights: architecture, names, and the order of rows
that its rotary embedding wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import LowbitError

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a model.

    Attributes:
        name: `general.architecture`. config: of transformers. metadata: key -> value, the
            architecture's part.
        context: tokens for which both compute the same.
        factors: (head_dim / 2,) float32 by which rotary frequencies are divided, or None. remarks:
            where the two runtimes part ways.
    """

    name: str
    config: Any
    metadata: dict[str, Any]
    context: int
    factors: Tensor | None
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """The architecture of a transformers config.

        Raises:
            LowbitError: llama.cpp computes something else for it.
        """
        if config.model_type not in _ARCHITECTURES:
            raise LowbitError(
                f"GGUF export knows {', '.join(_ARCHITECTURES)}, not the model family "
                f"'{config.model_type}'."
            )
        name, heads = _ARCHITECTURES[config.model_type], config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        if config.hidden_act != "silu":
            raise LowbitError(
                f"llama.cpp gates with SiLU in '{name}', and this model with {config.hidden_act}."
            )
        context, remarks = config.max_position_embeddings, []
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True) and window < context:
            remarks.append(
                f"attention reaches {window} tokens back, which '{name}' of llama.cpp cannot say: "
                "the context ends there"
            )
            context = window
        metadata: dict[str, Any] = {
            f"{name}.vocab_size": config.vocab_size,
            f"{name}.context_length": context,
            f"{name}.embedding_length": config.hidden_size,
            f"{name}.block_count": config.num_hidden_layers,
            f"{name}.feed_forward_length": config.intermediate_size,
            f"{name}.attention.head_count": heads,
            f"{name}.attention.head_count_kv": config.num_key_value_heads,
            f"{name}.attention.key_length": width,
            f"{name}.attention.value_length": width,
            f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            f"{name}.rope.dimension_count": width,
        }
        rope, factors = _rope(name, config)
        return cls(name, config, {**metadata, **rope}, context, factors, tuple(remarks))

    def tensor(self, full: str) -> str:
        """llama.cpp's name of a parameter.

        Raises:
            LowbitError: it has none.
        """
        module, _, kind = full.rpartition(".")
        if module in _OUTER:
            return f"{_OUTER[module]}.{kind}"
        parts = module.split(".", 3)
        if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in _INNER:
            return f"blk.{parts[2]}.{_INNER[parts[3]]}.{kind}"
        raise LowbitError(f"'{full}' has no place in '{self.name}' of llama.cpp.")

    def rows(self, full: str, count: int) -> Tensor | None:
        """(count,) int64, which row of a parameter goes where; None if all stay.

        llama.cpp rotates neighbouring channels of queries and keys in 'llama', transformers
        channels half a head apart.
        """
        module = full.rpartition(".")[0].rpartition(".")[2]
        if self.name != "llama" or module not in ("q_proj", "k_proj"):
            return None
        of_keys = module == "k_proj"
        heads = self.config.num_key_value_heads if of_keys else self.config.num_attention_heads
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _rope(name: str, config: Any) -> tuple[dict[str, Any], Tensor | None]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise LowbitError(
            f"this model rotates a part of each head only, which '{name}' of llama.cpp cannot say."
        )
    said: dict[str, Any] = {f"{name}.rope.freq_base": float(base)}
    if kind == "default":
        return said, None
    if kind == "linear":
        return {
            **said,
            f"{name}.rope.scaling.type": "linear",
            f"{name}.rope.scaling.factor": float(rope["factor"]),
        }, None
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        width = 2 * len(scaled)
        plain = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        return said, (plain / scaled.double()).float()
    raise LowbitError(
        f"rotary embeddings of type '{kind}' are not among those that GGUF export knows: default, "
        "linear, llama3."
    )
