"""What a GGUF file says of a model besides its weights: architecture, names, and how rows and
norms are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import LowbitError
from ...formats.ggml import BlockType
from ...formats.gguf import ROUTER, Entry
from .families import FAMILIES, Family, head_width

_SHOWN = {"silu": "SiLU", "gelu_pytorch_tanh": "GELU by tanh"}
_INSIDE = "language_model."  # before a text model's own names, in a wrapper
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Spot:
    """Where a parameter lies in a file.

    Attributes:
        tensor: llama.cpp's name of the tensor. part: of a tensor that holds all experts, which one
            this is; None if the tensor is the parameter.
    """

    tensor: str
    part: int | None = None

    @property
    def is_router(self) -> bool:
        """Whether it chooses experts: llama.cpp wants it in float32."""
        return self.tensor.endswith(ROUTER)


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a model.

    Attributes:
        family: what it wants of the family. config: of transformers. metadata: key -> value, the
            architecture's part.
        context: tokens for which both compute the same.
        factors: (head_dim / 2,) float32 by which rotary frequencies are divided, or None. remarks:
            where the two runtimes part ways.
    """

    family: Family
    config: Any
    metadata: dict[str, Any]
    context: int
    factors: Tensor | None
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        """`general.architecture`."""
        return self.family.name

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """The architecture of a transformers config.

        Raises:
            LowbitError: llama.cpp computes something else for it.
        """
        if config.model_type not in FAMILIES:
            raise LowbitError(
                f"GGUF export knows {', '.join(FAMILIES)}, not the model family "
                f"'{config.model_type}'."
            )
        family = FAMILIES[config.model_type]
        name, heads, width = family.name, config.num_attention_heads, head_width(config)
        own = getattr(config, "hidden_act", None) or config.hidden_activation
        if own != family.activation:
            raise LowbitError(
                f"llama.cpp gates with {_SHOWN[family.activation]} in '{name}', and this model "
                f"with {own}."
            )
        if (fault := family.fault(config)) is not None:
            raise LowbitError(f"llama.cpp {fault}.")
        context, remarks = config.max_position_embeddings, []
        window = None if family.windows else getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True) and window < context:
            remarks.append(
                f"attention reaches {window} tokens back, which '{name}' of llama.cpp cannot say: "
                "the context ends there"
            )
            context = window
        rope = _rope_parameters(config)
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
            f"{name}.rope.dimension_count": _rotated(family, rope, width),
        }
        said, factors = _rope(family, config, rope)
        more = {f"{name}.{key}": value for key, value in family.keys(config).items()}
        return cls(family, config, {**metadata, **said, **more}, context, factors, tuple(remarks))

    @cached_property
    def _names(self) -> Any:
        """The gguf package's map from names of transformers."""
        import gguf

        (known,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(known, self.config.num_hidden_layers)

    def spot(self, full: str) -> Spot:
        """Where a parameter lies.

        Raises:
            LowbitError: llama.cpp has no place for it.
        """
        module, _, kind = full.replace(_INSIDE, "", 1).rpartition(".")
        found = _EXPERT.fullmatch(module)
        stem = self._names.get_name(f"{found[1]}.{found[3]}" if found else module)
        fits = kind == "weight" or (
            kind == "bias"
            and stem is not None
            and stem.rpartition(".")[2] in self.family.biases
            and not found
        )
        if stem is None or not fits:
            raise LowbitError(f"'{full}' has no place in '{self.name}' of llama.cpp.")
        return Spot(f"{stem}.{kind}", int(found[2]) if found else None)

    def rows(self, full: str, count: int) -> Tensor | None:
        """(count,) int64, which row of a parameter goes where; None if all stay."""
        module = full.rpartition(".")[0].rpartition(".")[2]
        if not self.family.pairs or module not in ("q_proj", "k_proj"):
            return None
        of_keys = module == "k_proj"
        heads = self.config.num_key_value_heads if of_keys else self.config.num_attention_heads
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).reshape(-1)

    def stored(self, full: str, value: Tensor) -> Tensor:
        """A vector in float32 as a file holds it: rows in its order, norms with their gain."""
        order, gain = self.rows(full, len(value)), self._gain(full)
        vector = (value if order is None else value[order]).float()
        return vector + gain if gain else vector

    def given(self, full: str, value: Tensor) -> Tensor:
        """The inverse of `stored`, of matrices as well."""
        order, gain = self.rows(full, len(value)), self._gain(full)
        own = value if order is None else value[order.argsort()]
        return own - gain if gain else own

    def _gain(self, full: str) -> float:
        return self.family.gain if full.endswith("norm.weight") else 0.0


def joined(parts: Iterable[tuple[Spot, tuple[int, ...], BlockType]]) -> list[Entry]:
    """The tensors of a file, in the order of their first parts.

    Args:
        parts: where each parameter lies, its shape and its type.

    Raises:
        LowbitError: the experts of one tensor would be of several types.
    """
    found: dict[str, list[tuple[tuple[int, ...], BlockType]]] = {}
    stacked: set[str] = set()
    for spot, shape, kind in parts:
        found.setdefault(spot.tensor, []).append((shape, kind))
        if spot.part is not None:
            stacked.add(spot.tensor)
    for name, held in found.items():
        kinds = sorted({kind.name for _, kind in held})
        if len(kinds) > 1:
            raise LowbitError(
                f"experts of '{name}' would be in {' and '.join(kinds)}, and llama.cpp holds all "
                "of a block in one tensor of one type: give them the same scheme in the overrides."
            )
    return [
        Entry(name, (len(held), *held[0][0]) if name in stacked else held[0][0], held[0][1])
        for name, held in found.items()
    ]


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Of the blocks that attend to all tokens."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope.get("full_attention", rope))


def _rotated(family: Family, rope: dict[str, Any], width: int) -> int:
    """How many channels of a head are rotated."""
    part = rope.get("partial_rotary_factor") or 1.0
    if part != 1.0 and not family.partial:
        raise LowbitError(
            f"this model rotates a part of each head only, which '{family.name}' of llama.cpp "
            "cannot say."
        )
    return int(width * part)


def _rope(
    family: Family, config: Any, rope: dict[str, Any]
) -> tuple[dict[str, Any], Tensor | None]:
    name = family.name
    kind, base = rope.get("rope_type", "default"), rope.get("rope_theta", 10000.0)
    said: dict[str, Any] = {f"{name}.rope.freq_base": float(base)}
    if kind == "default":
        return said, None
    if kind == "linear":
        return {
            **said,
            f"{name}.rope.scaling.type": "linear",
            f"{name}.rope.scaling.factor": float(rope["factor"]),
        }, None
    if kind == "llama3" and family.factors:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        width = 2 * len(scaled)
        plain = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        return said, (plain / scaled.double()).float()
    known = ["default", "linear", *(["llama3"] if family.factors else ())]
    raise LowbitError(
        f"rotary embeddings of type '{kind}' are not among those that GGUF export knows"
        f"{'' if family.factors else f' of {name!r}'}: {', '.join(known)}."
    )
