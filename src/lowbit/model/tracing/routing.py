"""Linears that only route: what they make reaches a block's output through nothing but the choice
of a token's experts and their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..experts import Experts

# Mixture -> the router's arguments of its calls, behind the rows.
_Sent = dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]


class Routing:
    """The mixtures of a block and where the router sent each token in one pass.

    Args:
        modules: of the block. Mixtures that get rows sorted by expert are left out: what they get
            is scaled by the router already.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._mixtures = {
            n: m for n, m in modules.items() if isinstance(m, Experts) and not m.form.sorted
        }
        self._sent: _Sent = {n: [] for n in self._mixtures}

    def __bool__(self) -> bool:
        return bool(self._mixtures)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A pass in which the routers' choices are noted."""

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._sent[name].append((args[1:], kwargs))

            return hook

        with self._hooked(note):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """A pass in which tokens go where they went then, whatever the routers say."""

        def hold(name: str) -> Any:
            calls = iter(self._sent[name])

            def hook(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> Any:
                rest, kwargs = next(calls)
                return (args[0], *rest), kwargs

            return hook

        with self._hooked(hold):
            yield

    @contextmanager
    def _hooked(self, of: Any) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(of(name), with_kwargs=True)
            for name, module in self._mixtures.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
