"""The families described by hand: which linears read what inside a decoder block, and what lies
around the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import LowbitError
from .graph import Described, Frame, Graph, Heads, Site, Source

_MODEL = Frame(trunk="model", layers="model.layers")


def _heads(config: Any) -> tuple[int, int, int]:
    """(query width, key/value width, hidden size)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head, config.hidden_size


def _attention(config: Any, values: Source, output: str, norm: str | None = None) -> Heads:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(values, output, config.num_attention_heads, width, norm)


def _llama(config: Any, *, offset: float = 0.0) -> tuple[Frame, Graph]:
    queries, keys, _ = _heads(config)
    attention, mlp = "self_attn", "mlp"
    # With grouped queries a value channel feeds several o_proj inputs: no per-channel factor can be
    # folded there.
    value = Source(f"{attention}.v_proj", "linear") if queries == keys else None
    graph = Graph(
        sites=(
            Site(
                tuple(f"{attention}.{n}_proj" for n in "qkv"),
                Source("input_layernorm", "norm", offset=offset),
                attention,
                residual=True,
            ),
            Site((f"{attention}.o_proj",), value, f"{attention}.o_proj"),
            Site(
                (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                Source("post_attention_layernorm", "norm", offset=offset),
                mlp,
                residual=True,
            ),
            Site((f"{mlp}.down_proj",), Source(f"{mlp}.up_proj", "linear"), f"{mlp}.down_proj"),
        ),
        unclipped=((f"{attention}.q_proj", queries), (f"{attention}.k_proj", keys)),
        writers=(f"{attention}.o_proj", f"{mlp}.down_proj"),
        heads=_attention(config, Source(f"{attention}.v_proj", "linear"), f"{attention}.o_proj"),
        attention=attention,
        inner=(f"{mlp}.down_proj",),
    )
    return replace(_MODEL, final_offset=offset), graph


def _gemma(config: Any) -> tuple[Frame, Graph]:
    return _llama(config, offset=1.0)


def _bitnet(config: Any) -> tuple[Frame, Graph]:
    queries, keys, _ = _heads(config)
    graph = Graph(
        sites=(
            Site(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                Source("input_layernorm", "norm"),
                "self_attn",
                residual=True,
            ),
            Site(
                ("self_attn.o_proj",), Source("self_attn.attn_sub_norm", "norm"), "self_attn.o_proj"
            ),
            Site(
                ("mlp.gate_proj", "mlp.up_proj"),
                Source("post_attention_layernorm", "norm"),
                "mlp",
                residual=True,
            ),
            Site(("mlp.down_proj",), Source("mlp.ffn_sub_norm", "norm"), "mlp.down_proj"),
        ),
        unclipped=(("self_attn.q_proj", queries), ("self_attn.k_proj", keys)),
        writers=("self_attn.o_proj", "mlp.down_proj"),
        heads=_attention(
            config,
            Source("self_attn.v_proj", "linear"),
            "self_attn.o_proj",
            "self_attn.attn_sub_norm",
        ),
        attention="self_attn",
        inner=("mlp.down_proj",),
    )
    return _MODEL, graph


def _phi3(config: Any) -> tuple[Frame, Graph]:
    queries, keys, _ = _heads(config)
    inner = config.intermediate_size
    values = Source("self_attn.qkv_proj", "linear", (queries + keys, queries + 2 * keys))
    value = values if queries == keys else None
    graph = Graph(
        sites=(
            Site(
                ("self_attn.qkv_proj",),
                Source("input_layernorm", "norm"),
                "self_attn",
                residual=True,
            ),
            Site(("self_attn.o_proj",), value, "self_attn.o_proj"),
            Site(
                ("mlp.gate_up_proj",),
                Source("post_attention_layernorm", "norm"),
                "mlp",
                residual=True,
            ),
            Site(
                ("mlp.down_proj",),
                Source("mlp.gate_up_proj", "linear", (inner, 2 * inner)),
                "mlp.down_proj",
            ),
        ),
        unclipped=(("self_attn.qkv_proj", queries + keys),),
        writers=("self_attn.o_proj", "mlp.down_proj"),
        heads=_attention(config, values, "self_attn.o_proj"),
        attention="self_attn",
        inner=("mlp.down_proj",),
    )
    return _MODEL, graph


def _opt(config: Any) -> tuple[Frame, Graph]:
    # Post-norm variants (opt-350m) have the residual itself as input: there is no norm whose gain
    # could take a factor. fc1's factor passes ReLU unchanged because it is positive; other
    # activations would not allow it.
    before = config.do_layer_norm_before and config.layer_norm_elementwise_affine
    fold_fc1 = Source("fc1", "linear") if config.activation_function == "relu" else None
    final: tuple[str, ...] = ()
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        final = ("final_layer_norm",)
    projected = config.word_embed_proj_dim != config.hidden_size
    if projected:
        final += ("project_out",)
    frame = Frame(
        trunk="model.decoder",
        layers="model.decoder.layers",
        final=final,
        embeddings=("embed_tokens", "embed_positions"),
        open=projected,
    )
    graph = Graph(
        sites=(
            Site(
                tuple(f"self_attn.{n}_proj" for n in "qkv"),
                Source("self_attn_layer_norm", "norm") if before else None,
                "self_attn",
                residual=before,
            ),
            Site(
                ("self_attn.out_proj",), Source("self_attn.v_proj", "linear"), "self_attn.out_proj"
            ),
            Site(
                ("fc1",),
                Source("final_layer_norm", "norm") if before else None,
                "fc1",
                residual=before,
            ),
            Site(("fc2",), fold_fc1, "fc2"),
        ),
        unclipped=(
            ("self_attn.q_proj", config.hidden_size),
            ("self_attn.k_proj", config.hidden_size),
        ),
        writers=("self_attn.out_proj", "fc2"),
        heads=_attention(config, Source("self_attn.v_proj", "linear"), "self_attn.out_proj"),
        attention="self_attn",
        inner=("fc2",),
        flat=("fc1", "fc2"),
    )
    return frame, graph


FAMILIES: dict[str, Callable[[Any], tuple[Frame, Graph]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _gemma,
    "bitnet": _bitnet,
    "phi3": _phi3,
    "opt": _opt,
}


def described(config: Any) -> Described:
    """The graphs of a transformers config, one for all blocks.

    Raises:
        LowbitError: the family is not in the table, or its experts are fused 3-D parameters.
    """
    family = config.model_type
    if any(
        getattr(config, key, None)
        for key in ("num_local_experts", "n_routed_experts", "num_experts")
    ):
        raise LowbitError(
            f"'{family}' is a mixture of experts: transformers keeps its experts as fused 3-D "
            "parameters, which are not "
            "supported yet. Nothing was written."
        )
    if family not in FAMILIES:  # no guess at what was meant: the name is read from config.json
        raise LowbitError(
            f"model family '{family}' is not supported; these are: {', '.join(sorted(FAMILIES))}."
        )
    try:
        frame, graph = FAMILIES[family](config)
        return Described(frame, (graph,), (0,) * config.num_hidden_layers)
    except (AttributeError, TypeError, ZeroDivisionError) as e:
        raise LowbitError(
            f"config.json does not describe a '{family}' model: {type(e).__name__} {e}."
        ) from e
