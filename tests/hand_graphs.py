"""Graphs of families, written down by hand from transformers' source: what tracing must find.

Each function takes a config and returns (frame, graphs of its kinds of block, the kind of each
block).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowbit.model.graph import Described, Frame, Graph, Heads, Site, Source

MODEL = Frame(trunk="model", layers="model.layers")
QKV = tuple(f"self_attn.{n}_proj" for n in "qkv")
OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
GATED = ("mlp.gate_proj", "mlp.up_proj")
BESIDES = "others use what it makes besides the linears that read it"
Found = tuple[Frame, tuple[Graph, ...], tuple[int, ...]]


def widths(config: Any) -> tuple[int, int, int]:
    """(all queries, all keys, a head)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head, head


def norm(name: str, offset: float = 0.0) -> Source:
    return Source(name, "norm", offset=offset)


def linear(name: str, rows: tuple[int, int] | None = None) -> Source:
    return Source(name, "linear", rows)


def entering(reads: tuple[str, ...], source: Source | None, probe: str) -> Site:
    """A site at the residual stream: with a norm in front, or without one that takes a factor."""
    return Site(reads, source, probe, residual=source is not None)


def alone(name: str, source: Source | None = None) -> Site:
    """One linear inside a part of the block."""
    return Site((name,), source, name)


def one(config: Any, frame: Frame, graph: Graph) -> Found:
    """The same graph for every block."""
    return frame, (graph,), (0,) * config.num_hidden_layers


def attention(config: Any, at: Site, out: str = OUT, scaled: bool = True) -> dict[str, Any]:
    """What a graph says of attention with queries, keys and values of their own, and its sites.

    Args:
        at: the site of queries, keys and values. scaled: nothing but the output reads the values.
    """
    queries, keys, head = widths(config)
    q, k, v = at.reads[:3]
    # With grouped queries a value channel feeds several inputs of the output: no factor fits.
    value = linear(v) if queries == keys and scaled else None
    return dict(
        sites=(at, alone(out, value)),
        unclipped=((q, queries), (k, keys)),
        heads=Heads(linear(v), out, config.num_attention_heads, head),
        attention=q.rpartition(".")[0],
        output=out,
    )


def gated_mlp(source: Source | None) -> tuple[Site, Site]:
    return entering(GATED, source, "mlp"), alone(DOWN, linear("mlp.up_proj"))


def _llama(config: Any, offset: float = 0.0) -> Found:
    found = attention(config, entering(QKV, norm("input_layernorm", offset), "self_attn"))
    found["sites"] += gated_mlp(norm("post_attention_layernorm", offset))
    graph = Graph(**found, writers=(OUT, DOWN), inner=(DOWN,))
    return one(config, replace(MODEL, final_offset=offset), graph)


def _gemma(config: Any) -> Found:
    return _llama(config, offset=1.0)


def _sandwich(config: Any) -> Found:
    """Gemma 2 and 3: what attention and MLP give is normalised before it is added."""
    found = attention(config, entering(QKV, norm("input_layernorm", 1.0), "self_attn"))
    found["sites"] += gated_mlp(norm("pre_feedforward_layernorm", 1.0))
    return one(config, replace(MODEL, final_offset=1.0), Graph(**found, inner=(DOWN,)))


def _olmo2(config: Any) -> Found:
    """No norm before attention and MLP, one behind each."""
    found = attention(config, entering(QKV, None, "self_attn"))
    found["sites"] += gated_mlp(None)
    return one(config, MODEL, Graph(**found, inner=(DOWN,)))


def _bitnet(config: Any) -> Found:
    inner = "self_attn.attn_sub_norm"
    found = attention(config, entering(QKV, norm("input_layernorm"), "self_attn"))
    found["heads"] = replace(found["heads"], norm=inner)
    found["sites"] = (
        found["sites"][0],
        alone(OUT, norm(inner)),
        entering(GATED, norm("post_attention_layernorm"), "mlp"),
        alone(DOWN, norm("mlp.ffn_sub_norm")),
    )
    return one(config, MODEL, Graph(**found, writers=(OUT, DOWN), inner=(DOWN,)))


def _fused_mlp(config: Any, name: str) -> tuple[Site, Site]:
    inner = config.intermediate_size
    fused = "mlp.gate_up_proj"
    return (
        entering((fused,), norm(name), "mlp"),
        alone(DOWN, linear(fused, (inner, 2 * inner))),
    )


def _phi3(config: Any) -> Found:
    queries, keys, head = widths(config)
    fused = "self_attn.qkv_proj"
    values = linear(fused, (queries + keys, queries + 2 * keys))
    graph = Graph(
        sites=(
            entering((fused,), norm("input_layernorm"), "self_attn"),
            alone(OUT, values if queries == keys else None),
            *_fused_mlp(config, "post_attention_layernorm"),
        ),
        unclipped=((fused, queries + keys),),
        writers=(OUT, DOWN),
        heads=Heads(values, OUT, config.num_attention_heads, head),
        attention="self_attn",
        output=OUT,
        inner=(DOWN,),
    )
    return one(config, MODEL, graph)


def _glm(config: Any, writers: tuple[str, ...] = (OUT, DOWN)) -> Found:
    found = attention(config, entering(QKV, norm("input_layernorm"), "self_attn"))
    found["sites"] += _fused_mlp(config, "post_attention_layernorm")
    return one(config, MODEL, Graph(**found, writers=writers, inner=(DOWN,)))


def _glm4(config: Any) -> Found:
    """As glm, with norms behind attention and MLP."""
    return _glm(config, writers=())


def _opt(config: Any) -> Found:
    # Post-norm variants (opt-350m) have the residual itself as input: there is no norm whose gain
    # could take a factor, and what is normalised after each addition has no other basis. fc1's
    # factor passes ReLU unchanged because it is positive; other activations do not allow it.
    before = config.do_layer_norm_before and config.layer_norm_elementwise_affine
    final: tuple[str, ...] = ()
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        final = ("final_layer_norm",)
    projected = config.word_embed_proj_dim != config.hidden_size
    outside = ("project_out",) if projected else ()
    frame = Frame(
        trunk="model.decoder",
        layers="model.decoder.layers",
        final=final + outside,
        embeddings=("embed_tokens", "embed_positions"),
        open=projected or not final,
        centred=True,
    )
    out, hidden = "self_attn.out_proj", config.hidden_size
    graph = Graph(
        sites=(
            entering(QKV, norm("self_attn_layer_norm") if before else None, "self_attn"),
            alone(out, linear("self_attn.v_proj")),
            entering(("fc1",), norm("final_layer_norm") if before else None, "fc1"),
            alone("fc2", linear("fc1") if config.activation_function == "relu" else None),
        ),
        unclipped=((QKV[0], hidden), (QKV[1], hidden)),
        writers=(out, "fc2") if before else (),
        heads=Heads(
            linear("self_attn.v_proj"),
            out,
            config.num_attention_heads,
            hidden // config.num_attention_heads,
        ),
        attention="self_attn",
        output=out,
        inner=("fc2",),
        flat=("fc1", "fc2"),
        dropped=() if before else (("self_attn_layer_norm", BESIDES),),
    )
    return one(config, frame, graph)


def _lfm2(config: Any) -> Found:
    """Short convolutions between attention: C * conv(B * x), three thirds of one linear. Any third
    takes a factor; behind a convolution with a bias only C, the second, does.
    """
    hidden, down = config.hidden_size, "feed_forward.w2"
    third = (hidden, 2 * hidden) if config.conv_bias else (0, hidden)
    mlp = (
        entering(("feed_forward.w1", "feed_forward.w3"), norm("ffn_norm"), "feed_forward"),
        alone(down, linear("feed_forward.w3")),
    )
    conv = Graph(
        sites=(
            entering(("conv.in_proj",), norm("operator_norm"), "conv"),
            alone("conv.out_proj", linear("conv.in_proj", third)),
            *mlp,
        ),
        writers=("conv.out_proj", down),
        inner=("conv.out_proj", down),
        fixed=("conv.out_proj",),
        mixing=("conv.in_proj",),
    )
    out = "self_attn.out_proj"
    found = attention(config, entering(QKV, norm("operator_norm"), "self_attn"), out)
    found["sites"] += mlp
    kinds = (conv, Graph(**found, writers=(out, down), inner=(down,)))
    of_layers = tuple(int(t == "full_attention") for t in config.layer_types)
    return replace(MODEL, final=("embedding_norm",)), kinds, of_layers


def _qwen3_next(config: Any) -> Found:
    """Blocks without experts: queries carry a gate that multiplies what attention gives."""
    before, mlp = (
        norm("input_layernorm", 1.0),
        gated_mlp(norm("post_attention_layernorm", 1.0)),
    )
    out = "linear_attn.out_proj"
    delta = Graph(
        sites=(
            replace(
                entering(("linear_attn.in_proj_qkvz",), before, "linear_attn"),
                beside=("linear_attn.in_proj_ba.weight",),
            ),
            alone(out),  # a norm of each head, whose gain the heads share
            *mlp,
        ),
        writers=(out, DOWN),
        inner=(out, DOWN),
        kept=(
            (
                "linear_attn.in_proj_ba",
                "one output per head, expert or group: it chooses or weighs",
            ),
        ),
        mixing=("linear_attn.in_proj_qkvz",),
    )
    queries, keys, _ = widths(config)
    gated = Graph(
        sites=(entering(QKV, before, "self_attn"), alone(OUT), *mlp),
        unclipped=((QKV[0], 2 * queries), (QKV[1], keys)),
        writers=(OUT, DOWN),
        attention="self_attn",
        output=OUT,
        inner=(DOWN,),
    )
    of_layers = tuple(int(t == "full_attention") for t in config.layer_types)
    return replace(MODEL, final_offset=1.0), (delta, gated), of_layers


def _deepseek_v3(config: Any) -> Found:
    """Blocks without experts: latent attention."""
    count, made, keys, values = (
        config.num_attention_heads,
        config.qk_nope_head_dim + config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.v_head_dim,
    )
    names = ("q_a_proj", "kv_a_proj_with_mqa")
    graph = Graph(
        sites=(
            entering(tuple(f"self_attn.{n}" for n in names), norm("input_layernorm"), "self_attn"),
            alone("self_attn.q_b_proj", norm("self_attn.q_a_layernorm")),
            alone("self_attn.kv_b_proj", norm("self_attn.kv_a_layernorm")),
            alone(OUT),  # values lie between keys, head by head
            *gated_mlp(norm("post_attention_layernorm")),
        ),
        unclipped=(
            ("self_attn.q_b_proj", count * made),
            ("self_attn.kv_b_proj", count * (keys + values)),
        ),
        writers=(OUT, DOWN),
        attention="self_attn",
        output=OUT,
        inner=(DOWN,),
    )
    return one(config, MODEL, graph)


def _falcon(config: Any) -> Found:
    """Attention and MLP side by side behind one LayerNorm, whose bias no reader can take over."""
    head = config.hidden_size // config.num_attention_heads
    queries = config.hidden_size
    fused, out, down = "self_attention.query_key_value", "self_attention.dense", "mlp.dense_4h_to_h"
    heads, first = None, 3 * queries  # queries, keys and values lie head by head
    if config.multi_query:
        first = queries + head
        heads = Heads(linear(fused, (first, first + head)), out, config.num_attention_heads, head)
    graph = Graph(
        sites=(
            entering((fused, "mlp.dense_h_to_4h"), norm("input_layernorm"), ""),
            alone(out),
            alone(down),  # GELU: no factor passes it
        ),
        unclipped=((fused, first),),
        heads=heads,
        attention="self_attention",
        output=out,
        inner=(down,),
        dropped=(
            (
                "the residual stream",
                "in another basis the block computes something else, or a norm's bias has no "
                "reader that could take it over",
            ),
        ),
    )
    frame = Frame(
        "transformer",
        "transformer.h",
        ("ln_f",),
        0.0,
        ("word_embeddings",),
        centred=True,
        returns=2,
    )
    return one(config, frame, graph)


def _phi(config: Any) -> Found:
    """Attention and MLP side by side."""
    at = entering((*QKV, "mlp.fc1"), norm("input_layernorm"), "")
    found = attention(config, at, "self_attn.dense")
    found["sites"] += (alone("mlp.fc2"),)
    graph = Graph(**found, writers=("self_attn.dense", "mlp.fc2"), inner=("mlp.fc2",))
    return one(config, replace(MODEL, final=("final_layernorm",), centred=True), graph)


def _nemotron_h(config: Any) -> Found:
    """Blocks are a mixer each: Mamba's, attention's or an MLP."""
    reads = tuple(f"mixer.{n}_proj" for n in "qkv")
    mixers = {
        "linear_attention": Graph(
            sites=(
                entering(("mixer.in_proj",), norm("norm"), "mixer"),
                alone("mixer.out_proj", norm("mixer.norm")),
            ),
            writers=("mixer.out_proj",),
            inner=("mixer.out_proj",),
            fixed=("mixer.out_proj",),
            mixing=("mixer.in_proj",),
        ),
        "full_attention": Graph(
            **attention(config, entering(reads, norm("norm"), "mixer"), "mixer.o_proj"),
            writers=("mixer.o_proj",),
        ),
        "mlp": Graph(
            sites=(
                entering(("mixer.up_proj",), norm("norm"), "mixer"),
                alone("mixer.down_proj"),  # ReLU squared: no factor passes it
            ),
            writers=("mixer.down_proj",),
            inner=("mixer.down_proj",),
        ),
    }
    types = list(dict.fromkeys(config.layers_block_type))
    of_layers = tuple(types.index(t) for t in config.layers_block_type)
    frame = replace(MODEL, final=("norm_f",), embeddings=("embeddings",))
    return frame, tuple(mixers[t] for t in types), of_layers


FAMILIES: dict[str, Callable[[Any], Found]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "granite": _llama,
    "gemma": _gemma,
    "gemma2": _sandwich,
    "gemma3_text": _sandwich,
    "olmo2": _olmo2,
    "bitnet": _bitnet,
    "phi3": _phi3,
    "glm": _glm,
    "glm4": _glm4,
    "opt": _opt,
    "lfm2": _lfm2,
    "qwen3_next": _qwen3_next,
    "deepseek_v3": _deepseek_v3,
    "falcon": _falcon,
    "phi": _phi,
    "nemotron_h": _nemotron_h,
}


def described(config: Any) -> Described:
    """The graphs of a transformers config of one of ``FAMILIES``."""
    frame, kinds, of_layers = FAMILIES[config.model_type](config)
    # Else logits are capped or divided after the head.
    capped = getattr(config, "final_logit_softcapping", None)
    plain = capped is None and getattr(config, "logits_scaling", 1) == 1
    # A kind is numbered when its first block comes.
    order = list(dict.fromkeys(of_layers))
    return Described(
        replace(frame, plain=plain),
        tuple(kinds[k] for k in order),
        tuple(map(order.index, of_layers)),
    )
