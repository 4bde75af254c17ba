"""One call of a block, replayed: who reads which tensor, who made it, what is added to the residual
stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..beside import Keys, left_by
from ..recorder import Called

_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}

Key = tuple[int, int, int]
Change = Callable[[Tensor], Tensor]


def key_of(t: Tensor) -> Key:
    """Equal for views of the same numbers."""
    return t.untyped_storage().data_ptr(), int(t.storage_offset()), t.numel()


class Replay:
    """One pass of a block.

    Attributes:
        inputs: module -> its first tensor argument; of modules that own parameters or have no
            children, in the order of their first calls.
        made: key of a tensor -> the innermost module that returned it.
        added: what was added to the residual stream, in order. stream: keys of its states.
        entered, out: (rows, length, hidden) the block's input and output.
        left: what it left for later blocks.
    """

    def __init__(
        self,
        block: nn.Module,
        called: Called,
        changes: Mapping[str, Change] | None = None,
        x: Tensor | None = None,
        leaves: Collection[Keys] = (),
    ) -> None:
        """
        Args:
            changes: module -> what becomes of its output. x: the block's input, else as called.
            leaves: where what it leaves for later blocks is.
        """
        self.inputs: dict[str, Tensor] = {}
        self.made: dict[Key, str] = {}
        self._kept: list[Tensor] = []  # an address must not be used twice
        changes = changes or {}
        x = (called.x if x is None else x).clone()
        watch, self.entered = _Streams(x) if x.dim() > 3 else _Additions(x), x
        handles = []
        for name, module in block.named_modules():
            if name:
                if _owns_channels(module, called.x.shape[-1]):
                    handles += [
                        module.register_forward_pre_hook(lambda *_: watch.enter()),
                        module.register_forward_hook(lambda *_: watch.leave()),
                    ]
                handles += [
                    module.register_forward_pre_hook(self._seen(name), with_kwargs=True),
                    module.register_forward_hook(self._returned(name, changes.get(name))),
                ]
        kwargs = _copied(called.kwargs)
        try:
            with torch.no_grad(), watch:
                out = block(x, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.out: Tensor = out[0] if isinstance(out, tuple) else out
        self.left = {path: left_by(out, kwargs, path) for path in leaves}
        self.stream, self.added = watch.keys, watch.added
        self._kept += watch.kept

    def _seen(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is not None and given.is_floating_point():
                self._kept.append(given)
                self.inputs.setdefault(name, given)

        return hook

    def _returned(self, name: str, change: Change | None) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            several = isinstance(out, tuple)
            made = out[0] if several else out
            if not isinstance(made, Tensor):
                return None
            if change is not None:
                made = change(made)
            self._kept.append(made)
            self.made.setdefault(key_of(made), name)
            return (made, *out[1:]) if several else made

        return hook


class _Additions(TorchFunctionMode):
    """Follows the residual stream through views and additions, and keeps what is added to it."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.ids, self.keys = {id(x)}, {key_of(x)}
        self.kept, self.added = [x], list[Tensor]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not isinstance(out, Tensor) or not tensors:
            return out
        inside = [id(t) in self.ids or key_of(t) in self.keys for t in tensors]
        if func in _ADDS and len(tensors) == 2 and tensors[0].numel() == tensors[1].numel():
            if any(inside):
                self._follow(out)
                if not all(inside):
                    self.added.append(tensors[inside.index(False)])
        elif len(tensors) == 1 and inside[0] and key_of(out) == key_of(tensors[0]):
            self._follow(out)
        return out

    def enter(self) -> None:
        """A module begins that has a parameter for each channel, or a matrix that reads them."""

    def leave(self) -> None:
        """It has returned."""

    def _follow(self, t: Tensor) -> None:
        self.ids.add(id(t))
        self.keys.add(key_of(t))
        self.kept.append(t)


class _Streams(_Additions):
    """The same of several streams: what is made of them outside of norms and linears, channel by
    channel, is a state of theirs (a mixture of some, one in another dtype).
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._channels, self._depth = x.shape[-1], 0

    def enter(self) -> None:
        self._depth += 1

    def leave(self) -> None:
        self._depth -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if self._depth or not isinstance(out, Tensor) or out.dim() < 3:
            return out
        inside = (
            key_of(t) in self.keys
            for t in args
            if isinstance(t, Tensor) and t.shape[-1:] == out.shape[-1:]
        )
        if out.shape[-1] == self._channels and any(inside):
            self._follow(out)
        return out


def _owns_channels(module: nn.Module, channels: int) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    return isinstance(module, nn.Linear) or any(tuple(p.shape) == (channels,) for p in own)


def _copied(value: Any) -> Any:
    """Arguments as they were: blocks may write into dictionaries and tensors they are given."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copied(v) for v in value)
    if isinstance(value, (dict, Mapping)):
        return {k: _copied(v) for k, v in value.items()}
    return copy.copy(value)
