"""A stand-in for a block, which tells what the model would call the block with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


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
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._call = args, kwargs
        if self.live:
            out = self.__dict__["block"](*args, **kwargs)
            self._form[:] = [out]
            return out
        x = self.called(forget=False).x if self.returned is None else self.returned
        form = self._form[0] if self._form else x
        return (x, *form[1:]) if isinstance(form, tuple) else x

    def called(self, forget: bool = True) -> Called:
        """What the last call was; the first argument is the block's input."""
        assert self._call is not None
        args, kwargs = self._call
        named = inspect.signature(self.__dict__["block"].forward).bind(*args, **kwargs)
        parameters = named.signature.parameters.values()
        spread = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        (_, x), *rest = named.arguments.items()
        given = {k: v for k, v in rest if k != spread}
        if spread is not None:
            given.update(named.arguments.get(spread, {}))
        if forget:
            self._call = None
        return Called(x, given)


def fresh(value: Any) -> Any:
    """Arguments in containers of their own: a block may write into those it is given."""
    if isinstance(value, dict):
        return {k: fresh(v) for k, v in value.items()}
    return [fresh(v) for v in value] if isinstance(value, list) else value
