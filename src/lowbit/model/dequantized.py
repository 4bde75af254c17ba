"""Checkpoints that are quantized already, shown as floats: FP8 with scales, and MXFP4 experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from . import fp8, packed_experts
from .checkpoint import FLOATS, Checkpoint
from .computed import At, Computed, View
from .declared import method_of

_MODELOPT = "hf_quant_config.json"  # where ModelOpt also says it, and older versions alone


class Dequantized(Computed):
    """A safetensors checkpoint. What its config.json calls FP8 or MXFP4 is dequantized when it is
    read, in float32, and rounded to the dtype that config.json names; everything else is read as it
    lies.

    Args and Raises as of `Checkpoint`; scales that are missing or do not fit are refused by
    `stored`.
    """

    @cached_property
    def _said(self) -> Mapping[str, Any]:
        """What the model says of its quantization."""
        said = self.config_json.get("quantization_config")
        if isinstance(said, Mapping) and said:
            return said
        held = Checkpoint.stored(self)
        if not any(t.kind in fp8.KINDS for t in held.values()) or self.file(_MODELOPT) is None:
            return {}
        found = self.repository.read_json(_MODELOPT)
        algorithm = (found.get("quantization") or {}).get("quant_algo")
        return {
            "quant_method": (found.get("producer") or {}).get("name"),
            "quant_algo": algorithm,
        }

    @property
    def quantized_by(self) -> str | None:
        """See `Checkpoint`."""
        of_config = super().quantized_by
        method = method_of(self._said)
        return of_config or (f"{_MODELOPT} says {method}" if method else None)

    @cached_property
    def _scaled(self) -> dict[str, fp8.Scaled]:
        if self._said.get("quant_method") not in fp8.METHODS:
            return {}
        held = Checkpoint.stored(self)
        return fp8.scaled(held, self._said, self._kind, self.name, self._part, self._whole)

    @cached_property
    def _packed(self) -> dict[str, packed_experts.Packed]:
        if self._said.get("quant_method") != packed_experts.METHOD:
            return {}
        return packed_experts.packed(Checkpoint.stored(self), self._kind, self.name, self._part)

    @cached_property
    def views(self) -> Mapping[str, View]:
        """See `Computed`."""
        return {**self._scaled, **self._packed}

    @cached_property
    def left_out(self) -> Mapping[str, str]:
        """See `Checkpoint`: scales and codes."""
        out = dict(fp8.left_out(Checkpoint.stored(self), self._scaled))
        for name in self._packed:
            out[name + packed_experts.BLOCKS] = f"the codes of '{name}', which is dequantized"
            out[name + packed_experts.SCALES] = f"the scales of '{name}', which is dequantized"
        return out

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """See `Checkpoint`: what the weights were."""
        kinds = Counter(f"FP8 with {s.granularity}" for s in self._scaled.values())
        kinds.update("MXFP4" for _ in self._packed)
        if not kinds:
            return ()
        what = " and ".join(k for k, _ in kinds.most_common())
        return (f"weights were {what}: figures are against their dequantized values",)

    @property
    def _kind(self) -> str:
        """What config.json names as the dtype, of `FLOATS`; bfloat16 if it names none."""
        named = {str(d).removeprefix("torch."): kind for kind, d in FLOATS.items()}
        inner = self.config_json.get("text_config")
        for config in (self.config_json, inner if isinstance(inner, Mapping) else {}):
            for key in ("dtype", "torch_dtype"):
                if config.get(key) in named:
                    return named[config[key]]
        return "BF16"

    def _part(self, name: str, at: At) -> Tensor:
        return Checkpoint.read_part(self, name, at, finite=False)

    def _whole(self, name: str) -> Tensor:
        return Checkpoint.read(self, [name], finite=False)[name]
