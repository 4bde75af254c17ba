"""What the class of transformers that loads a model calls the tensors of files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .fused import DOWN, GATE, UP, is_fused_experts
from .lookup import split


class ModuleNames:
    """The names of modules in memory, by those of tensors in files.

    Args:
        model: of transformers, on the meta device, its experts fused or not.
        experts: tail of the name of an expert's linear after transformers' own renaming -> its tail
            in the model, "*" for the expert's number; see `expert_names`.
    """

    def __init__(self, model: Any, experts: Mapping[str, str] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._prefix = model.base_model_prefix
        self._renamings = [
            t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)
        ] + renamings(experts or {})
        self._known = dict.fromkeys((*model.state_dict(), *_expert_weights(model)), True)

    def of(self, linear: str) -> str:
        """The module whose tensors are those of a linear in a file."""
        from transformers.core_model_loading import rename_source_key

        weight = f"{linear}.weight"
        name: str
        name, _ = rename_source_key(weight, self._renamings, [], self._prefix, self._known)
        if name not in self._known and weight in self._known:  # transformers' own rule
            name = weight
        return name.removesuffix(".weight")


def renamings(experts: Mapping[str, str]) -> list[Any]:
    """What transformers is told of the names of experts, see `ModuleNames`."""
    from transformers.core_model_loading import WeightRenaming

    return [
        WeightRenaming(
            rf"\.{re.escape(theirs)}\.".replace(r"\*", r"(\d+)"),
            rf".{mine}.".replace("*", r"\1"),
        )
        for theirs, mine in experts.items()
    ]


def expert_names(linears: Mapping[str, str], modules: ModuleNames) -> dict[str, str]:
    """How the names of experts' linears in files differ from those in memory.

    Args:
        linears: full name in a text model's skeleton, where each expert is a module -> in files.
    """
    found = {}
    for mine, theirs in linears.items():
        tail, now = (split(n)[1].partition(".")[2] for n in (mine, modules.of(theirs)))
        if tail != now and any(part.isdigit() for part in tail.split(".")):
            found[_template(now)] = _template(tail)
    return found


def _template(tail: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in tail.split("."))


def _expert_weights(model: nn.Module) -> Iterator[str]:
    """The weights that experts will have when they are modules of their own."""
    for name, module in model.named_modules():
        if is_fused_experts(module):
            for number in range(module.get_parameter(DOWN).shape[0]):
                for linear in (GATE, UP, DOWN):
                    yield f"{name}.{number}.{linear}.weight"
