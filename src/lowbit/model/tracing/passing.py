"""What blocks are given beside their input, found by what changes: tensors that depend on the
tokens, and tensors that an earlier block left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import LowbitError
from ..beside import Item, Keys, leaves, placed
from ..recorder import Called, fresh
from .replay import Key, key_of

_SAME = 1e-5  # some norms compute in float32 whatever they are given


@dataclass(frozen=True)
class Calls:
    """One pass of a narrow model.

    Attributes:
        called: what each block was called with. left: what each block left, see `Recorder.left`.
    """

    called: Sequence[Called]
    left: Sequence[Mapping[Keys, Tensor]]


@dataclass(frozen=True)
class Passes:
    """What one narrow model does in four ways.

    Attributes:
        live: all blocks compute. other: they do, the first row has other tokens.
        passive: no block computes. tokens: none does, the first row has other tokens.
    """

    live: Calls
    other: Calls
    passive: Calls
    tokens: Calls


@dataclass
class _Found:
    maker: int | None
    path: Keys
    like: Tensor
    readers: list[tuple[int, Keys]] = field(default_factory=list)


def alone(live: Calls, passive: Calls, tokens: Calls) -> bool:
    """Whether all that blocks are given besides their input is the same whatever the row.

    Args:
        live: some blocks compute. passive: none does. tokens: none does, on other tokens.
    """
    return all(
        _same(one.kwargs, two.kwargs)
        for other in (passive, tokens)
        for one, two in zip(live.called, other.called, strict=True)
    )


def items_of(name: str, by: int, blocks: Sequence[nn.Module], passes: Passes) -> tuple[Item, ...]:
    """What goes through a narrow model beside the residual stream.

    Args:
        name: of the model, for errors. by: what widths were divided by. blocks: all with data.

    Raises:
        LowbitError: a block is given something that cannot be carried to it row by row.
    """
    found: dict[Any, _Found] = {}
    for i, called in enumerate(passes.live.called):
        for path, t in leaves(called.kwargs):
            seen = _Leaf.of(passes, i, path, t)
            if seen.constant:
                continue
            why = seen.refused()
            if why is not None:
                raise LowbitError(
                    f"block {i} of '{name}' is given '{_said(path)}', {why}: such models are not "
                    "supported yet. Nothing was written."
                )
            if _reads(blocks[i], called, path):
                key, new = seen.origin(path)
                found.setdefault(key, new).readers.append((i, path))
    _check_rest(name, passes)
    return tuple(_item(one, by, passes.live.called[0].x) for one in found.values())


@dataclass(frozen=True)
class _Leaf:
    """A tensor that block i is called with.

    Attributes:
        live, other, passive, tokens: as it is in each pass; None where nothing is there.
        maker: the block that left it, and where; None if none did.
        rows: of the narrow model's input.
    """

    live: Tensor
    other: Tensor | None
    passive: Tensor | None
    tokens: Tensor | None
    maker: tuple[int, Keys] | None
    rows: int

    @classmethod
    def of(cls, passes: Passes, i: int, path: Keys, live: Tensor) -> _Leaf:
        other, passive, tokens = (
            dict(leaves(p.called[i].kwargs)).get(path)
            for p in (passes.other, passes.passive, passes.tokens)
        )
        maker = _maker(passes.live.left[:i], live)
        return cls(live, other, passive, tokens, maker, len(passes.live.called[i].x))

    @property
    def _of_blocks(self) -> bool:
        return not _equal(self.live, self.passive)

    @property
    def constant(self) -> bool:
        """Whether it is the same whatever the blocks and the tokens are."""
        return not self._of_blocks and _equal(self.live, self.tokens)

    def refused(self) -> str | None:
        """Why it cannot be carried row by row; None if it can."""
        if self._of_blocks and self.maker is None:
            return "which is made of what earlier blocks compute, but is no tensor that one left"
        if self.live.dim() == 0 or len(self.live) != self.rows:
            return "which depends on all rows together"
        changed = self.other if self._of_blocks else self.tokens
        if changed is None or changed.shape != self.live.shape:
            return "whose shape depends on the tokens"
        if not _close(self.live[1:], changed[1:]):
            return "which depends on the tokens of other rows"
        return None

    def origin(self, path: Keys) -> tuple[Any, _Found]:
        """What it is known by, and it as an item without readers."""
        if self._of_blocks:
            assert self.maker is not None
            return self.maker, _Found(*self.maker, self.live)
        assert self.passive is not None
        return _key(self.passive), _Found(None, path, self.live)


def _maker(left: Sequence[Mapping[Keys, Tensor]], t: Tensor) -> tuple[int, Keys] | None:
    """The last block that left a tensor, and where."""
    for j in range(len(left) - 1, -1, -1):
        for path, made in left[j].items():
            if made is t or (_key(made) == _key(t) and torch.equal(made, t)):
                return j, path
    return None


def _key(t: Tensor) -> tuple[Key, tuple[int, ...], tuple[int, ...], torch.dtype]:
    return key_of(t), tuple(t.shape), t.stride(), t.dtype


def _reads(block: nn.Module, called: Called, path: Keys) -> bool:
    """Whether a block computes anything with a tensor that it is given. What it computes may be the
    same whatever the tensor is, as long as a table has no numbers.
    """
    value = dict(leaves(called.kwargs))[path].clone()
    kwargs = placed(fresh(dict(called.kwargs)), {path: value})
    with torch.no_grad(), _Touched(value) as touched:
        block(called.x.clone(), **kwargs)
    found: bool = touched.seen
    return found


class _Touched(TorchFunctionMode):
    """Tells whether anything is computed with a tensor while it is entered."""

    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self._tensor, self.seen = t, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = leaves([args, kwargs or {}])
        self.seen = self.seen or any(t is self._tensor for _, t in given)
        return func(*args, **(kwargs or {}))


def _item(found: _Found, by: int, x: Tensor) -> Item:
    """What is known of it, its sizes those of the real model."""
    t, tokens = found.like, x.shape[0] * x.shape[1]
    floating = t.is_floating_point()
    square = not floating and list(t.shape[1:]).count(x.shape[1]) > 1
    numbers = -(-t.numel() // tokens) // (x.shape[1] if square else 1)
    return Item(
        found.maker,
        found.path,
        tuple(found.readers),
        max(1, numbers * by if floating else numbers),
        square,
        None if floating else t.element_size(),
    )


def _check_rest(name: str, passes: Passes) -> None:
    """Refuse blocks that are given something else than tensors which depends on blocks or
    tokens.
    """
    for i, called in enumerate(passes.live.called):
        for other in (passes.passive, passes.tokens):
            key = next(
                (
                    key
                    for key, value in called.kwargs.items()
                    if not _alike(value, other.called[i].kwargs.get(key))
                ),
                None,
            )
            if key is not None:
                raise LowbitError(
                    f"block {i} of '{name}' is given '{key}', which depends on more than its "
                    "input and is no tensor: such models are not supported yet. Nothing was "
                    "written."
                )


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments differ in tensors at most."""
    if isinstance(one, (Tensor, Mapping, tuple, list)) or one is None:
        return isinstance(other, (Tensor, Mapping, tuple, list)) or other is None
    return _same(one, other)


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
    if isinstance(one, (int, float, str)):
        return type(one) is type(other) and bool(one == other)
    return one is other or type(one) is type(other)


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=_SAME, atol=_SAME)


def _said(path: Keys) -> str:
    return ".".join(map(str, path))
