"""Where a pass of a model is: the modules that are being called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import LowbitError
from ..skeleton import reason_of


class Where:
    """Follows the calls of modules while it is entered.

    Attributes:
        order: paths of the modules that returned, in that order.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """
        Args:
            modules: path -> module.
        """
        self._modules, self._stack = modules, list[str]()
        self._handles: list[RemovableHandle] = []
        self.order: list[str] = []

    def __enter__(self) -> Where:
        for path, module in self._modules.items():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, p=path: self._entered(p)),
                module.register_forward_hook(lambda *_, p=path: self._left(p)),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entered(self, path: str) -> None:
        if path in self._stack[:1]:  # a pass before this one was given up half-way
            self._stack.clear()
        self._stack.append(path)

    def _left(self, path: str) -> None:
        self.order.append(path)
        if path in self._stack:  # one module may have several paths
            while self._stack.pop() != path:
                pass

    @property
    def path(self) -> str:
        """The innermost module that is being called; "" outside of all."""
        return next((p for p in reversed(self._stack) if p), "")


@contextmanager
def named(modules: Mapping[str, nn.Module], model: str, otherwise: str) -> Iterator[Where]:
    """Give what goes wrong inside a model's own code the name of the module in which it did.

    Args:
        modules: path -> module. model: whose they are, in words. otherwise: the name of what is
            outside of all of them.

    Raises:
        LowbitError: for whatever else is raised inside.
    """
    with Where(modules) as where:
        try:
            yield where
        except LowbitError:
            raise
        except Exception as e:  # each model class fails in ways of its own
            raise LowbitError(
                f"{model} whose narrow copy does not run, so its wiring cannot be found: "
                f"'{where.path or otherwise}' says {reason_of(e)}"
            ) from e
