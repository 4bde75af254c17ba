"""What reads what inside a decoder block, as data: one function of the config per model family,
shared by every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import LowbitError


@dataclass(frozen=True)
class Source:
    """What produces a site's activation, channel by channel, so that a per-channel factor can be
    folded into it.

    Attributes:
        module: name inside the block.
        kind: "norm" (gain, and bias if there is one) or "linear" (output rows, and bias if there is
            one).
        rows: the linear's output rows that make the activation, as (start, stop); None means all of
            them.
    """

    module: str
    kind: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Site:
    """One activation and the linears that read it.

    Attributes:
        reads: names of the linears inside the block; they see the same input.
        source: where a per-channel factor may be folded, or None if nowhere.
        probe: the module whose output tells how much an error in ``reads`` hurts (AWQ's inspected
            module).
        residual: the activation is the residual stream after the source norm.
    """

    reads: tuple[str, ...]
    source: Source | None
    probe: str
    residual: bool = False


@dataclass(frozen=True)
class Heads:
    """How values go through attention.

    Attributes:
        values: the linear's output rows that are the values, head by head.
        output: the linear that reads all heads side by side.
        count: query heads. width: channels of a head.
        norm: module between attention and ``output``, None if there is none.
    """

    values: Source
    output: str
    count: int
    width: int
    norm: str | None = None


@dataclass(frozen=True)
class Wiring:
    """One model family.

    Attributes:
        trunk: attribute path of the module that holds the layers (and embeds and normalises).
        sites: the block's reading sites in the order of the forward pass.
        norm_offset: what the family adds to a norm's stored gain before it multiplies (Gemma: 1).
        unclipped: linear -> number of its first output rows that produce queries and keys; clip
            searches leave them alone.
        final: trunk modules applied after the last block, in order.
        writers: linears whose output is added to the residual stream.
        heads: attention's values.
        embeddings: trunk modules whose rows are added up to the first block's input.
        flat: linears that are given the tokens of all rows in one matrix.
    """

    trunk: str
    sites: tuple[Site, ...]
    norm_offset: float = 0.0
    unclipped: tuple[tuple[str, int], ...] = ()
    final: tuple[str, ...] = ("norm",)
    writers: tuple[str, ...] = ()
    heads: Heads | None = None
    embeddings: tuple[str, ...] = ("embed_tokens",)
    flat: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantizable linear of a block, in the order of the forward pass."""
        return tuple(name for site in self.sites for name in site.reads)

    @property
    def attention(self) -> str:
        """Name of the attention module inside a block."""
        return self.sites[0].reads[0].rpartition(".")[0]

    @property
    def layers(self) -> str:
        """Attribute path of the list of blocks."""
        return f"{self.trunk}.layers"


def _heads(config: Any) -> tuple[int, int, int]:
    """(query width, key/value width, hidden size)."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head, config.hidden_size


def _attention(config: Any, values: Source, output: str, norm: str | None = None) -> Heads:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(values, output, config.num_attention_heads, width, norm)


def _llama(config: Any, *, norm_offset: float = 0.0) -> Wiring:
    queries, keys, _ = _heads(config)
    attention, mlp = "self_attn", "mlp"
    # With grouped queries a value channel feeds several o_proj inputs: no per-channel factor can be
    # folded there.
    value = Source(f"{attention}.v_proj", "linear") if queries == keys else None
    return Wiring(
        trunk="model",
        sites=(
            Site(
                tuple(f"{attention}.{n}_proj" for n in "qkv"),
                Source("input_layernorm", "norm"),
                attention,
                residual=True,
            ),
            Site((f"{attention}.o_proj",), value, f"{attention}.o_proj"),
            Site(
                (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                Source("post_attention_layernorm", "norm"),
                mlp,
                residual=True,
            ),
            Site((f"{mlp}.down_proj",), Source(f"{mlp}.up_proj", "linear"), f"{mlp}.down_proj"),
        ),
        norm_offset=norm_offset,
        unclipped=((f"{attention}.q_proj", queries), (f"{attention}.k_proj", keys)),
        writers=(f"{attention}.o_proj", f"{mlp}.down_proj"),
        heads=_attention(config, Source(f"{attention}.v_proj", "linear"), f"{attention}.o_proj"),
    )


def _gemma(config: Any) -> Wiring:
    return _llama(config, norm_offset=1.0)


def _bitnet(config: Any) -> Wiring:
    queries, keys, _ = _heads(config)
    return Wiring(
        trunk="model",
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
    )


def _phi3(config: Any) -> Wiring:
    queries, keys, _ = _heads(config)
    inner = config.intermediate_size
    values = Source("self_attn.qkv_proj", "linear", (queries + keys, queries + 2 * keys))
    value = values if queries == keys else None
    return Wiring(
        trunk="model",
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
    )


def _opt(config: Any) -> Wiring:
    # Post-norm variants (opt-350m) have the residual itself as input: there is no norm whose gain
    # could take a factor. fc1's factor passes ReLU unchanged because it is positive; other
    # activations would not allow it.
    before = config.do_layer_norm_before and config.layer_norm_elementwise_affine
    fold_fc1 = Source("fc1", "linear") if config.activation_function == "relu" else None
    final: tuple[str, ...] = ()
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        final = ("final_layer_norm",)
    if config.word_embed_proj_dim != config.hidden_size:
        final += ("project_out",)
    return Wiring(
        trunk="model.decoder",
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
        final=final,
        writers=("self_attn.out_proj", "fc2"),
        heads=_attention(config, Source("self_attn.v_proj", "linear"), "self_attn.out_proj"),
        embeddings=("embed_tokens", "embed_positions"),
        flat=("fc1", "fc2"),
    )


FAMILIES: dict[str, Callable[[Any], Wiring]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _gemma,
    "bitnet": _bitnet,
    "phi3": _phi3,
    "opt": _opt,
}


def wiring_of(config: Any) -> Wiring:
    """The wiring of a transformers config.

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
        return FAMILIES[family](config)
    except (AttributeError, TypeError, ZeroDivisionError) as e:
        raise LowbitError(
            f"config.json does not describe a '{family}' model: {type(e).__name__} {e}."
        ) from e
