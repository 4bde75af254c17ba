"""A config of the same kind of model with narrow blocks: every count of heads, groups and layers
kept, every width divided by one number.

Widths of a model are bound to each other (heads times their width are the hidden size, an expanded
hidden size is so many heads of a mixer): divided by the same number they still are. And a channel
of the narrow model stands for that many neighbouring ones of the real model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = re.compile(
    r"(size|dim|dims|rank|width|d_model|d_ff|n_embd|n_inner|d_head|d_ssm|d_inner|d_state|"
    r"per_layer_input)$"
)
_NO_WIDTH = re.compile(
    r"vocab|window|kernel|chunk|patch|image|group_size|batch|^max_|_max_|block_size|page|pool|beam"
)
_HEAD = re.compile(r"head_dim|d_head|rotary_dim|head_width")
_OF_MIXERS = re.compile(r"mamba|ssm")  # their heads may be a channel wide
_EXPERTS = re.compile(r"num_(local_|routed_)?experts$|n_routed_experts$|moe_num_experts$")
_CHOSEN = re.compile(r"(num_experts_per_tok(en)?|experts_per_token|moe_topk|top_k_experts|moe_k)$")
_GROUPS = re.compile(r"^(n_group|topk_group|num_expert_groups?)$")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_POSITIONS = ("max_position_embeddings", "n_positions")
_CHUNK = re.compile(r"chunk_size$")
_ROPE = ("rope_scaling", "rope_parameters")
# RWKV halves its stream between blocks and their outputs with it, for the range of float16.
_RANGE = "rescale_every"

_NARROWEST = 8  # of a head: partial rotary embeddings take a quarter of it, in pairs
_LEAST = 32  # of the hidden size
_EXPERTS_KEPT, _CHOSEN_KEPT = 4, 2
_VOCABULARY, _LENGTH, _SCANNED = 256, 128, 8


def divisor(config: Any) -> int:
    """By how much widths can be divided: a power of two that divides the hidden size and the width
    of every kind of head.
    """
    said, hidden = config.to_dict(), int(config.hidden_size)
    heads = [(n, v) for n, v in _numbers(said) if _HEAD.search(n) and v > 1]
    counts = [v for n, v in _named(said) if n in ("num_attention_heads", "n_head") and v]
    if not any(n == "head_dim" for n, _ in heads):
        heads += [("head_dim", hidden // count) for count in counts if hidden % count == 0]
    least = [v if _OF_MIXERS.search(n) else v // _NARROWEST for n, v in heads]
    most = min([hidden // _LEAST, *least])
    # Rotary embeddings turn pairs of a head's channels.
    shared = math.gcd(hidden, *(v if _OF_MIXERS.search(n) or v % 2 else v // 2 for n, v in heads))
    found = 1
    while found * 2 <= most and shared % (found * 2) == 0:
        found *= 2
    return found


def shrunken(config: Any, by: int) -> Any:
    """The narrow config, to be computed in the plainest way.

    Args:
        config: of transformers, of a text model. by: see `divisor`.
    """
    small = type(config)(**_shrunken(config.to_dict(), by))
    small._attn_implementation = "eager"
    small._experts_implementation = "eager"
    return small


def _shrunken(said: Mapping[str, Any], by: int) -> dict[str, Any]:
    return {name: _value(str(name), value, by) for name, value in said.items()}


def _value(name: str, value: Any, by: int) -> Any:
    if isinstance(value, dict):
        return _plain_rope(value) if name in _ROPE else _shrunken(value, by)
    if _is_width(name):
        return _divided(value, by)
    if isinstance(value, bool) or not isinstance(value, int):
        return 0 if name in _TOKENS and value is not None else value
    if name in _TOKENS or name == _RANGE:
        return 0
    if _GROUPS.search(name):
        return 1
    limits = (
        (_EXPERTS.search(name), _EXPERTS_KEPT),
        (_CHOSEN.search(name) or name == "top_k", _CHOSEN_KEPT),
        ("vocab_size" in name, _VOCABULARY),
        (name in _POSITIONS, _LENGTH),
        (_CHUNK.search(name), _SCANNED),
    )
    return min([value, *(most for applies, most in limits if applies)])


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NO_WIDTH.search(name)


def _divided(value: Any, by: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_divided(v, by) for v in value)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
        return value
    return max(1, round(value / by))


def _numbers(said: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every width of a config, those of single layers and parts included."""
    return ((n, v) for n, v in _named(said) if _is_width(n))


def _named(said: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a config."""
    for name, value in said.items():
        if isinstance(value, dict):
            yield from _named(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(name), value


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters without lists, which have a number for each pair of a head's channels."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if not any(isinstance(v, (list, tuple)) for v in rope.values()):
        return dict(rope)
    kept = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
    return {**kept, "rope_type": "default"}
