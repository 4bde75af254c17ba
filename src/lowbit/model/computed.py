"""A checkpoint some of whose tensors are computed when they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from .checkpoint import Checkpoint, Stored
from .raw import Raw

At = tuple[int | slice, ...]


class View(Protocol):
    """A tensor that is computed from what the files hold."""

    @property
    def stored(self) -> Stored:
        """Shape and dtype of what is read."""
        ...

    def read(self, at: At) -> Tensor:
        """Compute a part.

        Args:
            at: a number or a slice without a step, for each leading dimension.
        """
        ...


class Computed(Checkpoint):
    """A checkpoint that shows views beside, or in place of, the tensors of its files."""

    @property
    @abstractmethod
    def views(self) -> Mapping[str, View]:
        """Name -> the tensor that is shown under it."""

    @property
    def loadable(self) -> bool:
        """As of `Checkpoint`: what is computed is in no file."""
        return not self.views

    def copied(self, name: str) -> str:
        """As of `Checkpoint`."""
        return "copied dequantized" if name in self.views else super().copied(name)

    def stored(self) -> dict[str, Stored]:
        """As of `Checkpoint`, of what is shown."""
        held = {n: s for n, s in super().stored().items() if n not in self.left_out}
        return {**held, **{n: v.stored for n, v in self.views.items()}}

    def rows(self, names: Iterable[str], start: int, stop: int) -> list[Tensor]:
        """As of `Checkpoint`."""
        span = (slice(start, stop),)
        return [self.read_part(name, span, finite=False) for name in names]

    def read(self, names: Iterable[str], *, finite: bool = True) -> dict[str, Tensor]:
        """As of `Checkpoint`."""
        names = list(names)
        plain = super().read([n for n in names if n not in self.views], finite=finite)
        return {n: self._view(n, (), finite) if n in self.views else plain[n] for n in names}

    def read_part(self, name: str, at: At, *, finite: bool = True) -> Tensor:
        """As of `Checkpoint`."""
        if name not in self.views:
            return super().read_part(name, at, finite=finite)
        return self._view(name, at, finite)

    def as_stored(self, names: Iterable[str]) -> dict[str, Tensor | Raw]:
        """As of `Checkpoint`."""
        names = list(names)
        plain = super().as_stored([n for n in names if n not in self.views])
        return {n: self._view(n, (), False) if n in self.views else plain[n] for n in names}

    def _view(self, name: str, at: At, finite: bool) -> Tensor:
        tensor = self.views[name].read(at)
        if finite:
            self.refuse_nan(name, tensor)
        return tensor


def spans_of(at: At, shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[int | slice, ...]]:
    """A part as one slice a dimension, and what is then picked of it for the dimensions that a
    number takes away.
    """
    full = (*at, *(slice(None),) * (len(shape) - len(at)))
    spans = tuple(
        slice(*(k.indices(n)[:2] if isinstance(k, slice) else (k, k + 1)))
        for k, n in zip(full, shape, strict=True)
    )
    return spans, tuple(slice(None) if isinstance(k, slice) else 0 for k in full)
