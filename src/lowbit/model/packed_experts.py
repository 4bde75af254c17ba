"""Experts in MXFP4 as gpt-oss stores them: two 4-bit floats a byte, a power of two for each 32
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LowbitError
from .checkpoint import FLOATS, Stored
from .computed import At, spans_of

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
_BIAS = 127
GROUP = 32  # inputs that share a scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))  # by code: the sign is the highest bit


@dataclass(frozen=True)
class Packed:
    """A weight of all experts, shown dequantized as (experts, in, out); see
    `lowbit.model.computed.View`.

    Attributes:
        name: of the weight; the tensors are named so with "_blocks" (experts, out, groups, 16)
            uint8 and "_scales" (experts, out, groups) uint8.
        shape: (experts, in, out). kind: of `FLOATS`.
        part: reads a part of a stored tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    part: Callable[[str, At], Tensor]

    @property
    def stored(self) -> Stored:
        return Stored(self.shape, self.kind)

    def read(self, at: At) -> Tensor:
        spans, pick = spans_of(at, self.shape)
        experts, inputs, outputs = spans
        codes = self.part(self.name + BLOCKS, (experts, outputs))
        exponents = self.part(self.name + SCALES, (experts, outputs))
        weight = dequantize(codes, exponents, FLOATS[self.kind]).mT
        return weight[:, inputs][pick].contiguous()


def dequantize(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., groups, 16) uint8 and (..., groups) uint8 -> (..., in), of every byte the low half
    first.
    """
    levels = torch.tensor(_LEVELS, dtype=torch.float32)
    values = torch.stack((levels[(codes & 15).int()], levels[(codes >> 4).int()]), dim=-1)
    scale = torch.exp2(exponents.float() - _BIAS)
    return (values.flatten(-2) * scale[..., None]).to(dtype).flatten(-2)


def packed(
    held: Mapping[str, Stored], kind: str, source: str, part: Callable[[str, At], Tensor]
) -> dict[str, Packed]:
    """The weights in MXFP4 of a checkpoint, by the names that they have unpacked.

    Args:
        held: what the files hold. kind: what weights are rounded to. source: the checkpoint's name.
        part: see `Packed`.

    Raises:
        LowbitError: a tensor has no scales, or they do not fit together.
    """
    out = {}
    for blocks, tensor in held.items():
        if not blocks.endswith(BLOCKS) or tensor.kind != "U8":
            continue
        name = blocks.removesuffix(BLOCKS)
        scales = held.get(name + SCALES)
        if scales is None:
            raise LowbitError(
                f"tensor '{blocks}' of '{source}' is MXFP4 without its scales: "
                f"'{name}{SCALES}' is missing. Download the checkpoint again."
            )
        shape = tensor.shape
        fits = len(shape) == 4 and shape[-1] == GROUP // 2 and shape[:-1] == scales.shape
        if not fits or scales.kind != "U8":
            raise LowbitError(
                f"tensor '{name}{SCALES}' of '{source}' ({scales.kind} of shape {scales.shape}) "
                f"does not fit '{blocks}' of shape {shape}: MXFP4 has (experts, out, groups, "
                f"{GROUP // 2}) bytes and a scale a group. Download the checkpoint again."
            )
        experts, rows, groups = scales.shape
        out[name] = Packed(name, (experts, groups * GROUP, rows), kind, part)
    return out
