"""The narrow copy of a model: random, in float64, with one live block of each kind."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LowbitError
from ..beside import Item
from ..experts import replace_fused
from ..recorder import Called, Recorder
from ..skeleton import build_skeleton, compute_buffers, reason_of
from ..turning import turn
from .chain import Chain
from .passing import Calls, Passes, alone, items_of
from .shrink import divisor, shrunken
from .where import named

_ROWS, _LENGTH = 2, 12
_SEED = 0
_WIDEST = 2048  # hidden channels of a copy


@dataclass
class Tiny:
    """A narrow model.

    Attributes:
        model: of transformers, its blocks replaced by recorders. by: what widths were divided by.
        trunk, layers: attribute paths of what holds the blocks, and of their list.
        blocks: the real ones; the first of each kind has data, and others may have the same.
        of_layers: the kind of each. firsts: the first block of each kind.
        called: what the first block of each kind is called with. items: what goes through the model
            beside the residual stream.
        turned: the model has several streams in front of its rows, see `lowbit.model.turning`.
        returns: how many things a block returns in a tuple; 0 where it returns no tuple.
        left, logits: what leaves the last block where none computes anything, and its logits.
        before, after: modules with parameters that are called before the first block, and after the
            last one.
    """

    model: Any
    by: int
    trunk: str
    layers: str
    blocks: list[nn.Module]
    of_layers: tuple[int, ...]
    firsts: tuple[int, ...]
    called: list[Called] = field(default_factory=list)
    items: tuple[Item, ...] = ()
    returns: int = 0
    turned: bool = False
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def inside(self, i: int) -> dict[str, nn.Module]:
        """Keys -> module, of the modules of block i."""
        return {f"{self.layers}.{i}.{n}": m for n, m in self.blocks[i].named_modules() if n}

    def described(self, name: str) -> str:
        """What it is a copy of, in words."""
        return f"'{name}' is a '{self.model.config.model_type}' model"


def build_tiny(config: Any, name: str, layers: str, of_layers: tuple[int, ...]) -> Tiny:
    """The narrow copy of a config's model, after one pass.

    Args:
        layers: attribute path of the list of blocks. of_layers: the kind of each block.

    Raises:
        LowbitError: it cannot be built or does not run (named by the module in which it stopped),
            or its blocks need more than what they can be given one by one.
    """
    model, by = _narrow(config, name)
    replace_fused(model)
    compute_buffers(model)
    trunk, _, own = layers.rpartition(".")
    blocks = list(model.get_submodule(layers).children())
    firsts = tuple(of_layers.index(k) for k in sorted(set(of_layers)))
    form: list[Any] = []
    recorders = [Recorder(b, form) for b in blocks]
    setattr(model.get_submodule(trunk), own, nn.ModuleList(recorders))
    generator = torch.Generator().manual_seed(_SEED)
    _randomize(model, generator)
    for i in firsts:
        _randomize(blocks[i], generator)
    tiny = Tiny(model, by, trunk, layers, blocks, of_layers, firsts)
    run = partial(_Pass, tiny, recorders, name)
    live = run(firsts)
    if _streams_first(live.calls.called[0].x):
        tiny.turned = True
        for block, recorder in zip(blocks, recorders, strict=True):
            turn(block)
            recorder.turned = True
        live = run(firsts)
    tiny.returns = len(form[0]) if isinstance(form[0], tuple) else 0
    form[:] = [(None,) * tiny.returns] if tiny.returns else []
    passive, tokens = run(()), run((), other=True)
    _check_rows(name, live.calls.called[0].x)
    tiny.before, tiny.after = live.around()
    # Passive blocks hand on what they are given.
    tiny.left, tiny.logits = passive.calls.called[-1].x, passive.logits
    if not alone(live.calls, passive.calls, tokens.calls):
        every = range(len(blocks))
        for i in sorted(set(every) - set(firsts)):
            _fill_like(blocks[i], blocks[of_layers.index(of_layers[i])])
        live = run(every)
        changed = run(every, other=True)
        passes = Passes(live.calls, changed.calls, passive.calls, tokens.calls)
        inside = {f"{layers}.{i}": block for i, block in enumerate(blocks)}
        for i in every:
            inside |= tiny.inside(i)
        with named(inside, tiny.described(name), "a block"):
            tiny.items = items_of(name, by, blocks, passes)
    tiny.called += [live.calls.called[i] for i in firsts]
    return tiny


def _streams_first(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[:2] != (_ROWS, _LENGTH) and x.shape[1:3] == (_ROWS, _LENGTH)


def _check_rows(name: str, x: Tensor) -> None:
    """Refuse a residual stream that is not (rows, length, ..., hidden)."""
    if x.dim() < 3 or x.shape[:2] != (_ROWS, _LENGTH):
        raise LowbitError(
            f"'{name}' hands {tuple(x.shape)} from block to block for {_ROWS} rows of {_LENGTH} "
            "tokens: models that keep rows and tokens first are supported so far. Nothing was "
            "written."
        )


def _narrow(config: Any, name: str) -> tuple[Any, int]:
    """The narrowest copy that its class takes, on the meta device; and what widths were divided by.

    Some classes check what their widths have to do with each other.
    """
    by = widest = divisor(config)
    while True:
        try:
            small = shrunken(config, by)
            return build_skeleton(small, name, attn_implementation="eager"), by
        except Exception as e:  # each config class fails in ways of its own
            if by == 1 or config.hidden_size * 2 // by > _WIDEST:
                if isinstance(e, LowbitError):
                    raise
                raise LowbitError(
                    f"'{name}' is a '{config.model_type}' model of which no narrow copy can be "
                    f"made to find its wiring: divided by {widest}, its widths are refused: "
                    f"{reason_of(e)}"
                ) from e
            by //= 2


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Give every tensor without data numbers, in float64: gains and biases around one, so that
    none is a special case. What is one tensor stays one.
    """
    made: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for key, p in part._parameters.items():
            if p is None:
                continue
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            about = 0.0 if "bias" in key else 1.0
            value = about + drawn / 5 if p.dim() < 2 else drawn / max(1, p.shape[-1]) ** 0.5
            own = made.setdefault(p, nn.Parameter(value, requires_grad=False))
            part._parameters[key] = own
    _widen_buffers(module)


def _widen_buffers(module: nn.Module) -> None:
    for part in module.modules():
        for key, b in part.named_buffers(recurse=False):
            if b.is_floating_point():
                setattr(part, key, b.double())


def _fill_like(block: nn.Module, first: nn.Module) -> None:
    """Give a block the parameters of another of its kind: what goes from block to block is seen as
    well, and a model of many blocks takes no more memory.
    """
    for part, other in zip(block.modules(), first.modules(), strict=True):
        part._parameters.update(other._parameters)
    _widen_buffers(block)


class _Pass:
    """One pass of a narrow model: what blocks are called with, and what runs around them.

    Args:
        live: numbers of the blocks that compute. other: whether the first row has other tokens.
    """

    def __init__(
        self,
        tiny: Tiny,
        recorders: list[Recorder],
        name: str,
        live: Collection[int],
        other: bool = False,
    ) -> None:
        self._tiny = tiny
        for i, recorder in enumerate(recorders):
            recorder.live = i in live
        modules = dict(tiny.model.named_modules())
        for i in sorted({*tiny.firsts, *live}):  # which a recorder holds, and the model no longer
            modules |= tiny.inside(i)
        what, chain = tiny.described(name), Chain(recorders)
        with torch.no_grad(), chain, named(modules, what, "the model") as where:
            said = tiny.model(input_ids=self._ids(other), use_cache=False)
            chain.check_once(what)
            called = [r.called() for r in recorders]
            chain.check_order(what, [c.x for c in called])
        self.logits: Tensor = getattr(said, "logits", said)
        self._order = where.order
        self.calls = Calls(called, [r.left for r in recorders])

    def _ids(self, other: bool) -> Tensor:
        def drawn(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            size = self._tiny.model.config.vocab_size
            return torch.randint(3, size, (_ROWS, _LENGTH), generator=generator)

        ids = drawn(_SEED)
        if other:
            ids[0] = drawn(_SEED + 1)[0]
        return ids

    def around(self) -> tuple[list[str], list[str]]:
        """Modules with parameters that ran before the first block, and after the last."""
        parts = dict(self._tiny.model.named_modules())
        first = self._order.index(f"{self._tiny.layers}.0")
        inside = [i for i, p in enumerate(self._order) if p.startswith(f"{self._tiny.layers}.")]
        before, after = self._order[:first], self._order[inside[-1] :]
        with_own = [n for n, m in parts.items() if m._parameters]
        return [p for p in before if p in with_own], [p for p in after if p in with_own]
