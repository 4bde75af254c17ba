"""Params: what a grid needs besides codes, as tensors that know nothing of the grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

P = TypeVar("P", bound="Params")


@dataclass(frozen=True)
class Params:
    """What a grid needs besides codes. Each grid has a subclass, whose fields are all tensors."""

    def map(self: P, change: Callable[[Tensor], Tensor]) -> P:
        """Apply a function to every tensor."""
        return type(self)(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def to(self: P, device: torch.device) -> P:
        """Move every tensor to a device."""
        return self.map(lambda t: t.to(device))

    def differing(self: P, other: P) -> str | None:
        """Name the first field whose numbers differ; None if all are equal."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return next((name for name, a, b in pairs if not torch.equal(a.float(), b.float())), None)

    def finite(self) -> bool:
        """Whether every number is finite. Waits for the device."""
        return all(bool(torch.isfinite(getattr(self, f.name)).all()) for f in fields(self))

    def where(self: P, chosen: Tensor, other: P) -> P:
        """Take this where ``chosen`` is true, else the other; all fields have its shape."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{n: torch.where(chosen, t, getattr(other, n)) for n, t in mine.items()})

    def rows(self: P, at: slice) -> P:
        """Copy the params of some rows."""
        return self.map(lambda t: t[at].clone())


def stacked(parts: Sequence[P], dim: int = 0) -> P:
    """Concatenate params field by field.

    Args:
        dim: 0 puts weights above each other, 1 beside each other.
    """
    first = parts[0]
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(first)}
    return type(first)(**{name: torch.cat(tensors, dim) for name, tensors in columns.items()})


def picked(tried: Sequence[P], best: Tensor) -> P:
    """Put params together whose entries come from several.

    Args:
        best: (n,) int64, for each entry the number of the params it is taken from; all fields have
            n entries.
    """
    first = tried[0]

    def chosen(name: str) -> Tensor:
        every = torch.stack([getattr(p, name).flatten() for p in tried])  # (tried, n)
        out: Tensor = every.gather(0, best[None])[0].reshape(getattr(first, name).shape)
        return out

    return type(first)(**{f.name: chosen(f.name) for f in fields(first)})
