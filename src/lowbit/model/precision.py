"""What stays in float32 where a model computes in 16 bits.

transformers loads most of a model in the dtype it is asked for. Some tensors it holds in float32
all the same: those that a class names, and those that a class makes in a dtype of their own. Biases
of routers are among them: rounded to bfloat16 they choose other experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)

Wide = Callable[[torch.dtype], frozenset[str]]
"""The dtype of a forward pass -> names of the tensors that stay in float32 then."""


def nothing_wide(compute: torch.dtype) -> frozenset[str]:
    """Everything is in the dtype of the forward pass."""
    return frozenset()


def as_computed(name: str, t: Tensor, compute: torch.dtype, wide: Collection[str]) -> torch.dtype:
    """The dtype of a tensor in a forward pass.

    Args:
        name: as it is in ``wide``, the names of what stays in float32.
    """
    if not t.is_floating_point():
        return t.dtype
    return torch.float32 if name in wide else compute


@dataclass(frozen=True)
class Precision:
    """Which tensors of a model stay in float32.

    Attributes:
        build: dtype -> the model's class on the meta device, as transformers makes it before it
            loads a checkpoint in that dtype.
        always: expressions that are looked for in names, for float16 and bfloat16. in_float16:
            those for float16 alone.
    """

    build: Callable[[torch.dtype], nn.Module]
    always: frozenset[str] = frozenset()
    in_float16: frozenset[str] = frozenset()
    _found: dict[torch.dtype, frozenset[str]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls, models: Iterable[nn.Module], build: Callable[[torch.dtype], nn.Module]
    ) -> Precision:
        """
        Args:
            models: of transformers, all that a checkpoint may be loaded as. build: see the class.
        """
        from transformers import PreTrainedModel

        parts: list[Any] = [
            part
            for model in models
            for part in model.modules()
            if isinstance(part, PreTrainedModel)
        ]
        always = {e for part in parts for e in part._keep_in_fp32_modules_strict or ()}
        in_float16 = {e for part in parts for e in part._keep_in_fp32_modules or ()}
        return cls(build, frozenset(always), frozenset(in_float16))

    def wide(self, compute: torch.dtype) -> frozenset[str]:
        """Full names of the parameters and stored buffers that stay in float32.

        Args:
            compute: dtype of the forward pass; nothing is wider than float32 and float64.
        """
        if compute not in HALVES:
            return frozenset()
        if compute not in self._found:
            named = self.always | (self.in_float16 if compute == torch.float16 else frozenset())
            # As transformers reads them.
            looked = re.compile("|".join(f"(?:{e.replace('*', '.*')})" for e in sorted(named)))
            self._found[compute] = frozenset(
                name
                for name, t in self.build(compute).state_dict().items()
                if t.dtype == torch.float32
                or (named and t.is_floating_point() and looked.search(name))
            )
        return self._found[compute]

    def inside(self, prefix: str) -> Wide:
        """The same of a block, by names inside it.

        Args:
            prefix: of the block in full names.
        """
        start = f"{prefix}."
        return lambda compute: frozenset(
            name.removeprefix(start) for name in self.wide(compute) if name.startswith(start)
        )
