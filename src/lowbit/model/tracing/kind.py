"""One kind of block under study: its readers, and replays with something changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..recorder import Called
from ..skeleton import CONVOLUTIONS
from .replay import Change, Key, Replay, key_of

_SMALL = 1e-3


class Kind:
    """A narrow block with data.

    Args:
        real: the same block of the real model, for its sizes; may be on the meta device. by: what
            widths were divided by. counts: numbers of heads, experts and groups of the real model.
            hidden: its hidden size.
    """

    def __init__(
        self,
        block: nn.Module,
        called: Called,
        real: nn.Module,
        by: int,
        counts: frozenset[int],
        hidden: int,
    ) -> None:
        self.block, self.called, self.real, self.by, self.hidden = block, called, real, by, hidden
        self._counts = counts
        self.modules = dict(block.named_modules())
        self.base = self.replay({})

    def replay(self, changes: Mapping[str, Change], x: Tensor | None = None) -> Replay:
        """A pass with the outputs of some modules changed."""
        return Replay(self.block, self.called, changes, x)

    def scaled(self, reader: str) -> Callable[[str, Tensor], Tensor | None]:
        """What a module reads when a linear's outputs are scaled; None if it has another shape."""

        def activation(linear: str, factors: Tensor) -> Tensor | None:
            now = self.replay({linear: lambda y: y * factors}).inputs[reader]
            return now if now.shape == self.base.inputs[reader].shape else None

        return activation

    def sizes(self, linear: str) -> tuple[int, int]:
        """(out, in) of the real linear."""
        module = self.real.get_submodule(linear)
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    @cached_property
    def linears(self) -> list[str]:
        """Linears that are to be quantized, in the order of the pass."""
        names = (n for n in self.base.inputs if isinstance(self.modules[n], nn.Linear))
        return [n for n in names if n not in self.kept]

    @cached_property
    def readers(self) -> dict[Key, list[str]]:
        """Modules that own matrices, by the activation they read, in the order of the pass."""
        out: dict[Key, list[str]] = {}
        for name, x in self.base.inputs.items():
            module = self.modules[name]
            owns = any(p is not None and p.dim() > 1 for p in module._parameters.values())
            if owns and not isinstance(module, CONVOLUTIONS):
                out.setdefault(key_of(x), []).append(name)
        return out

    @cached_property
    def kept(self) -> dict[str, str]:
        """Linears that stay in floating point -> why."""
        found = {}
        for name, module in self.modules.items():
            if isinstance(module, nn.Linear) and (why := self._reason(name, module)):
                found[name] = why
        return found

    def _reason(self, name: str, narrow: nn.Linear) -> str | None:
        if name not in self.base.inputs:
            return "the model does not call it"
        outputs = self.sizes(name)[0]
        grown = self.by > 1 and narrow.out_features * self.by == outputs
        if outputs in self._counts and not grown:
            return "one output per head, expert or group: it chooses or weighs"
        moved = self.replay({name: lambda y: y * (1 + _SMALL)}).out
        return "it only chooses" if torch.equal(moved, self.base.out) else None
