"""One kind of block under study: its readers, and replays with something changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ..beside import Keys
from ..experts import Experts
from ..recorder import Called
from ..skeleton import CONVOLUTIONS
from .chunks import in_short_chunks
from .replay import Change, Key, Replay, key_of
from .routing import Routing
from .spread import Seat

FAR = 1e6  # beyond any limit that a block sets to its activations
_SMALL = 1e-3
_SEED = 0
_SEVERAL = (2, 3, 4)  # numbers per head that one linear may make


class Kind:
    """A narrow block with data.

    Args:
        real: the same block of the real model, for its sizes; may be on the meta device. by: what
            widths were divided by. counts: numbers of heads, experts and groups of the real model.
            hidden: its hidden size.
        leaves: where what it leaves for later blocks is. borrowed: where floats are that an
            earlier block left.
    """

    def __init__(
        self,
        block: nn.Module,
        called: Called,
        real: nn.Module,
        by: int,
        counts: frozenset[int],
        hidden: int,
        leaves: frozenset[Keys] = frozenset(),
        borrowed: frozenset[Keys] = frozenset(),
    ) -> None:
        self.block, self.real, self.by, self.hidden = block, real, by, hidden
        self.called = in_short_chunks(block, called)
        self._counts, self.leaves, self.borrowed = counts, leaves, borrowed
        self._scalings: dict[tuple[str, tuple[float, ...]], Mapping[str, Tensor]] = {}
        self.modules = dict(block.named_modules())
        self.base = self.replay({})

    def replay(self, changes: Mapping[str, Change], x: Tensor | None = None) -> Replay:
        """A pass with the outputs of some modules changed."""
        return Replay(self.block, self.called, changes, x, self.leaves)

    @property
    def causal(self) -> bool:
        """Whether no token depends on those after it."""
        x = self.called.x.clone()
        # A change of its own for each channel: norms take off what is common to all of them.
        generator = torch.Generator().manual_seed(_SEED)
        x[:, -1] += torch.randn(x[:, -1].shape, generator=generator, dtype=x.dtype)
        out = self.replay({}, x).out
        return torch.allclose(out[:, :-1], self.base.out[:, :-1], rtol=_SMALL, atol=_SMALL)

    def scaled(self, reader: str) -> Callable[[str, Tensor], Tensor | None]:
        """What a module reads when a linear's outputs are scaled; None if it has another shape."""

        def activation(linear: str, factors: Tensor) -> Tensor | None:
            now = self._scaled(linear, factors)[reader]
            return now if now.shape == self.base.inputs[reader].shape else None

        return activation

    def _scaled(self, linear: str, factors: Tensor) -> Mapping[str, Tensor]:
        """What every module reads then. Several readers ask for the same factors."""
        asked = linear, tuple(factors.tolist())
        if asked not in self._scalings:
            self._scalings[asked] = self.replay({linear: lambda y: y * factors}).inputs
        return self._scalings[asked]

    def sizes(self, linear: str) -> tuple[int, int]:
        """(out, in) of the real linear."""
        module = self.real.get_submodule(linear)
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    @cached_property
    def seats(self) -> tuple[Seat, ...]:
        """The first expert of each mixture that some token was sent to."""
        found = []
        for name, module in self.modules.items():
            if isinstance(module, Experts):
                called = (i for i in range(module.form.count) if f"{name}.{i}" in self._used)
                found.append(Seat(name, next(called, 0)))
        return tuple(found)

    @cached_property
    def _used(self) -> set[str]:
        """Modules that were called, or that hold one that was."""
        used = set()
        for name in self.base.inputs:
            parts = name.split(".")
            used |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        return used

    def counts(self, block: nn.Module) -> dict[Seat, int]:
        """How many experts each mixture of the narrow or of the real block has."""
        found = {}
        for seat in self.seats:
            mixture = block.get_submodule(seat.mixture)
            assert isinstance(mixture, Experts)
            found[seat] = mixture.form.count
        return found

    def stands(self, name: str) -> bool:
        """Whether a module is outside every mixture, or in the expert that stands for its own."""
        return all(
            name.startswith(s.prefix) for s in self.seats if name.startswith(f"{s.mixture}.")
        )

    def seen_at(self, reader: str) -> str:
        """The module whose first argument is what a reader reads: the mixture, where an expert
        reads some of the mixture's tokens.
        """
        for seat in self.seats:
            if reader.startswith(f"{seat.mixture}."):
                rows = self.base.inputs[reader].flatten(0, -2)
                given = self.base.inputs[seat.mixture].flatten(0, -2)
                if rows.shape[1:] == given.shape[1:] and _among(rows, given):
                    return seat.mixture
        return reader

    def key(self, reader: str) -> Key:
        """The activation that a module reads."""
        return key_of(self.base.inputs[self.seen_at(reader)])

    @cached_property
    def linears(self) -> list[str]:
        """Linears that are to be quantized, in the order of the pass."""
        names = (n for n in self.base.inputs if isinstance(self.modules[n], nn.Linear))
        return [n for n in names if n not in self.kept]

    @cached_property
    def readers(self) -> dict[Key, list[str]]:
        """Modules that own matrices, by the activation they read, in the order of the pass."""
        out: dict[Key, list[str]] = {}
        for name in self.base.inputs:
            module = self.modules[name]
            owns = any(p is not None and p.dim() > 1 for p in module._parameters.values())
            if owns and not isinstance(module, CONVOLUTIONS) and self.stands(name):
                out.setdefault(self.key(name), []).append(name)
        return out

    @cached_property
    def kept(self) -> dict[str, str]:
        """Linears that stay in floating point -> why."""
        found = {}
        for name, module in self.modules.items():
            if not isinstance(module, nn.Linear) or not self.stands(name):
                continue
            if why := self._reason(name, module):
                found[name] = why
        return found

    def _reason(self, name: str, narrow: nn.Linear) -> str | None:
        if name not in self.base.inputs:
            return "the model does not call it"
        outputs, inputs = self.sizes(name)
        grown = self.by > 1 and narrow.out_features * self.by == outputs
        unchanged = self.by > 1 and narrow.out_features == outputs
        several = unchanged and any(outputs == m * c for c in self._counts for m in _SEVERAL)
        if (outputs in self._counts and not grown) or several:
            return "one output per head, expert or group: it chooses or weighs"
        if self.by > 1 and narrow.in_features == inputs and inputs in self._counts - {1}:
            return "one input per head, expert or group: it weighs"
        if not _multiplies(narrow, self.base.inputs[name]):
            return "it does something else than multiply its input by its weight"
        moved = self.replay({name: lambda y: y * (1 + _SMALL)}).out
        if torch.equal(moved, self.base.out):
            return "it only chooses"
        return "it only sends tokens to experts" if self._routes(name) else None

    def _routes(self, name: str) -> bool:
        """Whether a linear outside the experts changes nothing while tokens go where they went."""
        if not self._routing or any(name.startswith(f"{s.mixture}.") for s in self.seats):
            return False
        with self._routing.held():
            return torch.equal(self.replay({name: lambda y: y * (1 + _SMALL)}).out, self.base.out)

    @cached_property
    def _routing(self) -> Routing:
        """Where the routers send the tokens of `called`."""
        routing = Routing(self.modules)
        with routing.noted():
            self.replay({})
        return routing


@torch.no_grad()
def _multiplies(linear: nn.Linear, x: Tensor) -> bool:
    """Whether a linear, which may be of a class of its own, computes what torch's does."""
    if type(linear) is nn.Linear:
        return True
    expected, found = nn.functional.linear(x, linear.weight, linear.bias), linear(x)
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected)
    )


def _among(rows: Tensor, given: Tensor) -> bool:
    """Whether each of (n, channels) rows is one of (tokens, channels) ``given``."""
    return all(bool((row == given).all(1).any()) for row in rows)
