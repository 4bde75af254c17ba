"""What the header of a GGUF file says of a model beside what transformers reads of it, which is at
the defaults of its config class without it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from .gguf_file import GGUFFile

# Entry -> attributes of configs that it is; of those that a class has, transformers' own stays.
_ENTRIES: dict[str, tuple[str, ...]] = {
    "attention.key_length_swa": ("head_dim",),  # of the blocks that head_dim is of, if it is there
    "attention.key_length": ("head_dim",),
    "attention.head_count_kv": ("num_kv_heads",),
    "attention.layer_norm_epsilon": ("norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("norm_eps",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "context_length": ("n_positions",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "feed_forward_length": ("n_inner", "ffn_hidden_size"),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_BASE, _BASE_OF_WINDOWS = "rope.freq_base", "rope.freq_base_swa"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROTARY = "rope.dimension_count"
# Blocks of the models of which llama.cpp scales scores by another width than the head's.
_OF_HIDDEN_WIDTH = {"gemma2": 46, "gemma3": 62}
# What has no effect, or is said by something else that is read.
_NO_NEWS = {"attention.value_length", "attention.value_length_swa", "tensor_data_layout"}
_NO_NEWS |= {"rope.dimension_count_swa", "expert_gating_func", "use_parallel_residual"}
_SCALING = "rope.scaling."


class Header:
    """The header of a file, for a config of transformers.

    Args:
        file: the file. known: attributes of the config class and their defaults.
    """

    def __init__(self, file: GGUFFile, known: Mapping[str, Any]) -> None:
        self._file, self._known = file, known
        self._used: set[str] = set()

    def _entry(self, key: str) -> Any:
        return self._file.field(f"{self._file.architecture}.{key}")

    def added(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the config class that transformers leaves at their defaults.

        Args:
            said: the arguments that transformers makes of the header.
        """
        found: dict[str, Any] = {}
        for key, names in _ENTRIES.items():
            value = self._entry(key)
            if key == "attention.key_length" and "global_head_dim" in said:
                continue  # Gemma 4: it is that of the blocks without a window
            for name in names:
                if name in self._known and isinstance(value, (int, float)):
                    self._used.add(key)
                    found.setdefault(name, value)
        for made in (self._attention(), self._rotary(said), self._inner()):
            found |= made
        return {name: value for name, value in found.items() if name not in said}

    def unread(self, read: Mapping[str, Any]) -> tuple[str, ...]:
        """Entries about the model that nothing is made of, after `added`.

        Args:
            read: entries that transformers reads -> what it makes of them, None of those it
                passes over.
        """
        known = {*_NO_NEWS, *self._used, *(key for key, name in read.items() if name is not None)}
        usual = {
            "attention.key_length": self._width,
            _ROTARY: self._width,
            "expert_feed_forward_length": self._entry("feed_forward_length"),
        }
        known |= {key for key, value in usual.items() if self._entry(key) == value}
        prefix = f"{self._file.architecture}."
        own = (n.removeprefix(prefix) for n in self._file.fields if n.startswith(prefix))
        left = (key for key in own if key not in known and not key.startswith(_SCALING))
        return tuple(key for key in left if self._entry(key))  # zero is none

    @property
    def _width(self) -> int | None:
        """Channels of a head."""
        hidden, heads = self._entry("embedding_length"), self._entry("attention.head_count")
        width = hidden // heads if isinstance(heads, int) and heads else None
        return self._entry("attention.key_length") or width

    def _attention(self) -> dict[str, Any]:
        """Windows, and by what scores are scaled."""
        found: dict[str, Any] = {}
        window, pattern = self._entry(_WINDOW), self._entry(_PATTERN)
        if window is not None and {"sliding_window", "use_sliding_window"} & {*self._known} == {
            "sliding_window"
        }:
            self._used.add(_WINDOW)
            found["sliding_window"] = window or None  # zero is none
        if pattern is not None and "layer_types" in self._known:
            self._used.add(_PATTERN)
            found["layer_types"] = list(_layer_types(pattern, self._entry("block_count")))
        if "query_pre_attn_scalar" in self._known and self._width:
            largest = _OF_HIDDEN_WIDTH.get(self._file.architecture)
            wide = largest == self._entry("block_count")
            hidden, heads = self._entry("embedding_length"), self._entry("attention.head_count")
            found["query_pre_attn_scalar"] = hidden // heads if wide else self._width
        return found

    def _rotary(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Bases of rotary frequencies, and which part of a head they turn."""
        found: dict[str, Any] = {}
        default = self._known.get("rope_parameters")
        if not isinstance(default, Mapping):
            return found
        base, of_windows = self._entry(_BASE), self._entry(_BASE_OF_WINDOWS)
        if _SLIDING in default and _FULL in default:
            rope = copy.deepcopy(dict(default))
            for kind, theta in ((_FULL, base), (_SLIDING, of_windows)):
                if theta is not None:
                    rope[kind]["rope_theta"] = theta
            self._used |= {_BASE, _BASE_OF_WINDOWS}
            return {"rope_parameters": rope}
        if base is not None:
            self._used.add(_BASE)
            found["rope_theta"] = base
        turned = self._entry(_ROTARY)
        if "partial_rotary_factor" in default and turned and self._width:
            self._used.add(_ROTARY)
            found["partial_rotary_factor"] = turned / self._width
        return found

    def _inner(self) -> dict[str, Any]:
        """By how much a state-space model's blocks are wider than its stream."""
        inner = self._entry("ssm.inner_size")
        if inner is None or "expand" not in self._known:
            return {}
        return {"expand": inner // self._entry("embedding_length")}


def _layer_types(pattern: Any, count: int) -> Iterator[str]:
    """Kinds of attention, of a list that says which blocks have windows, or of a period of which
    the last block has none.
    """
    for i in range(count):
        sliding = pattern[i] if isinstance(pattern, list) else (i + 1) % pattern != 0
        yield _SLIDING if sliding else _FULL
