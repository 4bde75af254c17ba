"""The narrow copy of a model: random, in float64, with one live block of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LowbitError
from ..experts import replace_fused
from ..recorder import Called, Recorder
from ..skeleton import build_skeleton, compute_buffers, reason_of
from .shrink import divisor, shrunken
from .where import named

_ROWS, _LENGTH = 2, 12
_SEED = 0
_WIDEST = 2048  # hidden channels of a copy
_PASSES = ((True, 0), (False, 0), (True, 1))  # blocks compute; the tokens' seed


@dataclass
class Tiny:
    """A narrow model.

    Attributes:
        model: of transformers, its blocks replaced by recorders. by: what widths were divided by.
        trunk, layers: attribute paths of what holds the blocks, and of their list.
        blocks: the real ones; only the first of each kind has data.
        of_layers: the kind of each. firsts: the first block of each kind.
        called: what the first block of each kind is called with.
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
    returns: int = 0
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def inside(self, i: int) -> dict[str, nn.Module]:
        """Path -> module, of the modules of block i."""
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
    passes = [_Pass(tiny, recorders, name, live, seed) for live, seed in _PASSES]
    tiny.returns = len(form[0]) if isinstance(form[0], tuple) else 0
    _check_alone(name, *(p.calls for p in passes))
    tiny.called += [passes[0].calls[i] for i in firsts]
    tiny.before, tiny.after = passes[0].around()
    # Passive blocks hand on what they are given.
    tiny.left, tiny.logits = passes[1].calls[-1].x, passes[1].logits
    return tiny


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


def _check_alone(
    name: str, live: list[Called], passive: list[Called], others: list[Called]
) -> None:
    """Refuse blocks that cannot be run one by one on their inputs alone.

    Args:
        live: what each block is called with. passive: the same when none of them computes
            anything. others: the same for other tokens.
    """
    if live[0].x.dim() != 3:
        raise LowbitError(
            f"'{name}' carries {live[0].x.dim() - 2} residual streams from block to block: models "
            "with one are supported so far. Nothing was written."
        )
    for what, why in ((passive, "earlier blocks compute"), (others, "the tokens are")):
        for i, (one, other) in enumerate(zip(live, what, strict=True)):
            key = next((k for k in one.kwargs if not _same(one.kwargs[k], other.kwargs[k])), None)
            if key is not None:
                raise LowbitError(
                    f"block {i} of '{name}' is given '{key}', which depends on what {why}, not on "
                    "its input alone: such models are not supported yet. Nothing was written."
                )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and one.keys() == other.keys()
            and all(_same(v, other[k]) for k, v in one.items())
        )
    return one is other or type(one) is type(other)


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
    for part in module.modules():
        for key, b in part.named_buffers(recurse=False):
            if b.is_floating_point():
                setattr(part, key, b.double())


class _Pass:
    """One pass of a narrow model: what blocks are called with, and what runs around them.

    Args:
        live: whether the first block of each kind computes. seed: of the tokens.
    """

    def __init__(
        self, tiny: Tiny, recorders: list[Recorder], name: str, live: bool, seed: int
    ) -> None:
        self._tiny = tiny
        for i, recorder in enumerate(recorders):
            recorder.live = live and i in tiny.firsts
        modules = dict(tiny.model.named_modules())
        for i in tiny.firsts:  # which a recorder holds, and the model no longer
            modules |= tiny.inside(i)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, tiny.model.config.vocab_size, (_ROWS, _LENGTH), generator=generator)
        with torch.no_grad(), named(modules, tiny.described(name), "the model") as where:
            said = tiny.model(input_ids=ids, use_cache=False)
        self.logits: Tensor = getattr(said, "logits", said)
        self._order = where.order
        self.calls = [r.called() for r in recorders]

    def around(self) -> tuple[list[str], list[str]]:
        """Modules with parameters that ran before the first block, and after the last."""
        parts = dict(self._tiny.model.named_modules())
        first = self._order.index(f"{self._tiny.layers}.0")
        inside = [i for i, p in enumerate(self._order) if p.startswith(f"{self._tiny.layers}.")]
        before, after = self._order[:first], self._order[inside[-1] :]
        with_own = [n for n, m in parts.items() if m._parameters]
        return [p for p in before if p in with_own], [p for p in after if p in with_own]
