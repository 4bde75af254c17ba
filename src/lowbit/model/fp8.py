"""Weights in 8-bit floats with scales beside them: w = fp8 * scale, a scale for each block, each
channel, each group of a channel's inputs, each matrix or each expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .checkpoint import FLOATS, Stored
from .computed import At, spans_of

KINDS = ("F8_E4M3", "F8_E5M2")
METHODS = ("fp8", "compressed-tensors", "modelopt", "fbgemm_fp8")
_ENDS = ("_scale_inv", "_scale")  # after the weight's name
_PACKED = "_packed"  # after the name of a weight whose codes share bytes
_SCALES = (*FLOATS, "F8_E8M0", "U8")
_EXPONENT_BIAS = 127  # of scales stored as U8: 2 ** (byte - 127)
# Scales of inputs, and of keys and values, of which weights know nothing.
_OF_ACTIVATIONS = {
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "prob_scale",
}

Block = tuple[int, int]


@dataclass(frozen=True)
class Scaled:
    """A weight in FP8, shown dequantized; see `lowbit.model.computed.View`.

    Attributes:
        name: of the weight. shape: its sizes. kind: of `FLOATS`, what it is rounded to.
        scale: name of its scales. steps: how many elements of each dimension share a scale.
        blocked: the model's scales are of blocks or groups, of which a small weight has one.
        part: reads a part of a stored tensor. whole: reads a stored tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    scale: str
    steps: tuple[int, ...]
    blocked: bool
    part: Callable[[str, At], Tensor]
    whole: Callable[[str], Tensor]

    @property
    def stored(self) -> Stored:
        return Stored(self.shape, self.kind)

    def read(self, at: At) -> Tensor:
        spans, pick = spans_of(at, self.shape)
        scale = self.whole(self.scale)
        if scale.dtype == torch.uint8:
            scale = torch.exp2(scale.float() - _EXPONENT_BIAS)
        sizes = (-(-n // step) for n, step in zip(self.shape, self.steps, strict=True))
        scale = scale.float().reshape(*sizes)
        for d, (span, step) in enumerate(zip(spans, self.steps, strict=True)):
            if scale.shape[d] > 1:
                scale = scale.index_select(d, torch.arange(span.start, span.stop) // step)
            # A dimension with one scale is broadcast.
        weight = self.part(self.name, spans).float().mul_(scale)
        return weight.to(FLOATS[self.kind])[pick]

    @property
    def granularity(self) -> str:
        """What has a scale of its own, for a person."""
        both = list(zip(self.steps[-2:], self.shape[-2:], strict=True))
        if any(step == 1 < n for step, n in both):
            whole = all(step in (1, n) for step, n in both)
            return "a scale per channel" if whole else "a scale per group"
        return "block scales" if self.blocked else "a scale per tensor"


def scaled(
    held: Mapping[str, Stored],
    said: Mapping[str, Any],
    kind: str,
    source: str,
    part: Callable[[str, At], Tensor],
    whole: Callable[[str], Tensor],
) -> dict[str, Scaled]:
    """The weights in FP8 of a checkpoint, by name.

    Args:
        held: what the files hold. said: the quantization_config. kind: what weights are rounded
            to. source: the checkpoint's name. part, whole: see `Scaled`.

    Raises:
        LowbitError: a tensor has no scales, or scales of a shape or dtype that does not fit.
    """
    blocks = set(_blocks(said))
    out = {}
    for name, tensor in held.items():
        if tensor.kind not in KINDS or _is_scale(name, held):
            continue
        scale = next((name + e for e in _ENDS if name + e in held), None)
        if scale is None:
            raise LowbitError(
                f"tensor '{name}' of '{source}' is stored as {tensor.kind} without its scale: "
                f"neither '{name}{_ENDS[0]}' nor '{name}{_ENDS[1]}' is there. Download the "
                "checkpoint again, or start from the model in 16 or 32 bits."
            )
        steps = _steps(tensor.shape, held[scale].shape, blocks)
        if steps is None or held[scale].kind not in _SCALES:
            sizes = " or ".join(f"{a} x {b}" for a, b in sorted(blocks))
            known = f"blocks of {sizes}" if blocks else "config.json names no size of blocks"
            raise LowbitError(
                f"tensor '{scale}' of '{source}' ({held[scale].kind} of shape "
                f"{held[scale].shape}) does not fit '{name}' of shape {tensor.shape} ({known}). "
                "Download the checkpoint again, or start from the model in 16 or 32 bits."
            )
        out[name] = Scaled(name, tensor.shape, kind, scale, steps, bool(blocks), part, whole)
    return out


def _is_scale(name: str, held: Mapping[str, Stored]) -> bool:
    """Whether a tensor is itself the scales of another one (NVFP4)."""
    weights = (name.removesuffix(end) for end in _ENDS if name.endswith(end))
    return any(w in held or w + _PACKED in held for w in weights)


def left_out(
    held: Mapping[str, Stored], weights: Mapping[str, Scaled]
) -> Iterator[tuple[str, str]]:
    """Names of stored scales, and why each is not needed any more."""
    modules = {n.rpartition(".")[0] for n in weights}
    around = modules | {m.rpartition(".")[0] for m in modules}
    for w in weights.values():
        yield w.scale, f"the scale of '{w.name}', which is dequantized"
    for name in held:
        module, _, last = name.rpartition(".")
        if last in _OF_ACTIVATIONS and module in around:
            yield name, "a scale of activations in FP8, which the artifact does not have"


def _blocks(said: Mapping[str, Any]) -> Iterator[Block]:
    """Sizes of blocks that a quantization_config names."""
    groups = said.get("config_groups")
    weights = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
    named: list[Any] = [said.get("weight_block_size")]
    for group in weights:
        if isinstance(group, Mapping):
            named += [group.get("block_structure"), [1, group.get("group_size")]]
    for size in named:
        parts = size.split("x") if isinstance(size, str) else size
        if isinstance(parts, list) and len(parts) == 2 and all(str(p).isdigit() for p in parts):
            rows, columns = int(parts[0]), int(parts[1])
            if rows and columns:
                yield rows, columns


def _steps(
    shape: tuple[int, ...], scales: tuple[int, ...], blocks: set[Block]
) -> tuple[int, ...] | None:
    """How many elements of each dimension share a scale; None if the shapes do not fit, or fit
    in more ways than one.
    """
    # Missing dimensions are the last ones: a scale for each row, or for each expert.
    wide = (1,) * len(shape) if math.prod(scales) == 1 else scales
    wide = (*wide, *(1,) * (len(shape) - len(wide)))
    if len(wide) != len(shape):
        return None
    outer, inner = shape[:-2], shape[-2:]
    first = tuple(n if s == 1 else 1 for n, s in zip(outer, wide, strict=False))
    ways = {inner, (1, *inner[1:]), (*inner[:-1], 1)}
    if len(inner) == 2:
        ways |= {tuple(map(min, block, inner)) for block in blocks}
    found = {
        (*first, *way)
        for way in ways
        if wide == tuple(-(-n // step) for n, step in zip(shape, (*first, *way), strict=True))
    }
    return found.pop() if len(found) == 1 else None
