"""A stand-in for a block, which tells what the model would call the block with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .beside import Keys, leaves
from .turning import on_first, rows_first, streams_first


@dataclass(frozen=True)
class Called:
    """What a block is called with.

    Attributes:
        x: its input, (rows, length, hidden). kwargs: everything besides, by name.
    """

    x: Tensor
    kwargs: Mapping[str, Any]


class Recorder(nn.Module):
    """Stands in the list of blocks where a block was.

    It keeps what it is called with and returns its input, or what `returned` says, in the form in
    which blocks return it. Whatever else a model asks of its blocks (what kind of layer one is) is
    answered by the block.

    Attributes:
        live: run the block. returned: what to return instead of the input, None for the input.
        left: what a live block returned besides its output, or wrote into what it was called with.
        turned: the model has its streams in front of its rows, and the block does not, see
            `lowbit.model.turning`.
    """

    def __init__(self, block: nn.Module, form: list[Any]) -> None:
        """
        Args:
            form: shared by the recorders of a model; what a live block returned last.
        """
        super().__init__()
        self.__dict__["block"] = block  # no submodule: it is no part of what runs
        self.live, self._form = False, form
        self.returned: Tensor | None = None
        self.turned = False
        self.left: dict[Keys, Tensor] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # As it is now: blocks write into containers that they share.
        self._call = tuple(map(fresh, args)), fresh(kwargs)
        if self.live:
            own = (rows_first(args[0]), *args[1:]) if self.turned else args
            out = self.__dict__["block"](*own, **kwargs)
            out = on_first(streams_first, out) if self.turned else out
            self._form[:] = [out]
            self.left = self._written(args, kwargs, out)
            return out
        x = self.called(forget=False).x if self.returned is None else self.returned
        x = streams_first(x) if self.turned else x
        form = self._form[0] if self._form else x
        return (x, *form[1:]) if isinstance(form, tuple) else x

    def called(self, forget: bool = True) -> Called:
        """What the last call was; the first argument is the block's input."""
        assert self._call is not None
        called = self._bound(*self._call)
        if forget:
            self._call = None
        return called

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Called:
        named = inspect.signature(self.__dict__["block"].forward).bind(*args, **kwargs)
        parameters = named.signature.parameters.values()
        spread = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        (_, x), *rest = named.arguments.items()
        given = {k: v for k, v in rest if k != spread}
        if spread is not None:
            given.update(named.arguments.get(spread, {}))
        return Called(rows_first(x) if self.turned else x, given)

    def _written(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> dict[Keys, Tensor]:
        before = dict(leaves(self.called(forget=False).kwargs))
        now = leaves(self._bound(args, kwargs).kwargs)
        written = {path: t for path, t in now if before.get(path) is not t}
        several = leaves(out) if isinstance(out, tuple) else ()
        return written | {path: t for path, t in several if path[0] != 0}


def fresh(value: Any) -> Any:
    """Arguments in containers of their own: a block may write into those it is given."""
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    if isinstance(value, MutableMapping):
        own = copy.copy(value)
        own.update({k: fresh(v) for k, v in value.items()})
        return own
    return [fresh(v) for v in value] if isinstance(value, list) else value
