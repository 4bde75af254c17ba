"""What goes through a model beside the residual stream: tensors of rows that blocks are given,
because they depend on the tokens (per-layer inputs, the embeddings themselves) or because an
earlier block computed them (keys and values of another layer, the tokens that an indexer chose).

`lowbit.model.tracing.passing` finds them. A run holds each from the block that leaves it to the
last one that reads it, where the streams lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor

from .storage import Storage

# Keys and indices on the way to a tensor: a keyword first in what a block is called with, a number
# first in what it returns.
Keys = tuple[Union[str, int], ...]
Values = Mapping[Keys, Tensor]

NOTHING: Values = {}


@dataclass(frozen=True)
class Item:
    """One tensor, (rows, ...).

    Attributes:
        maker: the block that leaves it; None of one that depends on the tokens alone.
        path: where it is: after the call of ``maker``, in what that was called with or returned;
            else in what the first of the readers is called with.
        readers: (block, where it is in what that is called with), in order.
        numbers: it has for a token of the real model. square: that many for each token of the row.
        size: bytes of a number; None where it has the stream's dtype.
    """

    maker: int | None
    path: Keys
    readers: tuple[tuple[int, Keys], ...]
    numbers: int
    square: bool = False
    size: int | None = None

    @property
    def last(self) -> int:
        """The last block that reads it."""
        return self.readers[-1][0]

    def bytes(self, length: int, stored: int) -> int:
        """Bytes of a row of ``length`` tokens.

        Args:
            stored: bytes of a number in the streams.
        """
        return self.numbers * length * (length if self.square else 1) * (self.size or stored)


def held_at_most(items: Sequence[Item], blocks: int, length: int, stored: int) -> int:
    """Bytes of a row that lie beside the streams in the block where that is most: of what a block
    left, what the float and what the quantized model have of it.

    Args:
        blocks: how many there are. length, stored: as in `Item.bytes`.
    """
    sizes = [item.bytes(length, stored) * (1 if item.maker is None else 2) for item in items]
    return max(
        sum(
            size
            for size, item in zip(sizes, items, strict=True)
            if (item.maker or 0) <= i <= item.last
        )
        for i in range(blocks)
    )


@dataclass(frozen=True)
class Place:
    """What one block has to do with items, which go by their numbers.

    Attributes:
        given: where they are in what the block is called with. left: where those are that it
            leaves. done: those that no later block reads.
    """

    given: Mapping[Keys, int] = field(default_factory=dict)
    left: Mapping[Keys, int] = field(default_factory=dict)
    done: frozenset[int] = frozenset()

    @classmethod
    def of(cls, items: tuple[Item, ...], block: int) -> Place:
        """The place of a block, by its number."""
        numbered = list(enumerate(items))
        return cls(
            {path: n for n, item in numbered for i, path in item.readers if i == block},
            {item.path: n for n, item in numbered if item.maker == block},
            frozenset(n for n, item in numbered if item.last <= block),
        )


@dataclass(frozen=True)
class Beside:
    """What lies beside the streams between two blocks: number of an item -> (rows, ...).

    Attributes:
        x, xq: as the float model, and as the quantized model has it. proof: of the proof's rows.
    """

    x: Mapping[int, Tensor] = field(default_factory=dict)
    xq: Mapping[int, Tensor] = field(default_factory=dict)
    proof: Mapping[int, Tensor] = field(default_factory=dict)

    def after(self, place: Place, x: Values, xq: Values, proof: Values = NOTHING) -> Beside:
        """The same after a block.

        Args:
            x, xq, proof: what it left.
        """

        def kept(held: Mapping[int, Tensor], left: Values) -> dict[int, Tensor]:
            new = {place.left[path]: t for path, t in left.items()}
            return {n: t for n, t in {**held, **new}.items() if n not in place.done}

        return Beside(kept(self.x, x), kept(self.xq, xq), kept(self.proof, proof))


def given(place: Place, held: Mapping[int, Tensor]) -> dict[Keys, Tensor]:
    """What a block is given of what lies beside a stream."""
    return {path: held[n] for path, n in place.given.items()}


def picked(values: Values, rows: slice | Tensor) -> dict[Keys, Tensor]:
    """Some rows of each."""
    return {path: t[rows] for path, t in values.items()}


def arriving(values: Values, device: torch.device, dtype: torch.dtype) -> dict[Keys, Tensor]:
    """Values as a block takes them: moved, and floats cast."""
    moved = {path: t.to(device, non_blocking=True) for path, t in values.items()}
    return {p: t.to(dtype) if t.is_floating_point() else t for p, t in moved.items()}


def leaves(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Tensor]]:
    """Every tensor inside of containers, and where it is."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))


def at(value: Any, path: Keys) -> Tensor:
    """The tensor at a place inside of containers.

    Raises:
        KeyError, IndexError, TypeError: nothing is there.
    """
    for key in path:
        value = value[key]
    found: Tensor = value
    return found


def left_by(output: Any, kwargs: Mapping[str, Any], path: Keys) -> Tensor:
    """What a call left.

    Args:
        output: what was returned. kwargs: what it was called with; it may have written there.
    """
    return at(output if isinstance(path[0], int) else kwargs, path)


def placed(value: Any, values: Values) -> Any:
    """Containers with tensors put where they belong; those on the way are copied, or made where
    nothing is.
    """
    if () in values:
        return values[()]
    inside: dict[str | int, dict[Keys, Tensor]] = {}
    for (first, *rest), t in values.items():
        inside.setdefault(first, {})[tuple(rest)] = t
    if isinstance(value, MutableMapping) or any(isinstance(key, str) for key in inside):
        held = {} if value is None else dict(value)
        new = {key: placed(held.get(key), inner) for key, inner in inside.items()}
        return {**held, **new}
    row = list(value or ())
    row += [None] * (1 + max(int(key) for key in inside) - len(row))
    for key, inner in inside.items():
        row[int(key)] = placed(row[int(key)], inner)
    return row if isinstance(value, list) else tuple(row)


def widened(kwargs: Mapping[str, Any], paths: Sequence[Keys], rows: int) -> dict[Keys, Tensor]:
    """What has one row, and is the same for all, with so many."""
    found = {path: at(kwargs, path) for path in paths}
    return {path: t.expand(rows, *t.shape[1:]) for path, t in found.items() if len(t) == 1}


class Kept:
    """What a block leaves of a whole stream, put together part by part.

    Args:
        rows: of the stream. storage: where it is put; None puts it beside the stream. like: the
            stream, of whose dtype floats become.
    """

    def __init__(self, rows: int, storage: Storage | None, like: Tensor) -> None:
        self._rows, self._storage, self._like = rows, storage, like
        self.values: dict[Keys, Tensor] = {}

    def put(self, part: slice, left: Values) -> None:
        """Take in what was left of some rows."""
        for path, t in left.items():
            if path not in self.values:
                self.values[path] = self._empty(t)
            own = self.values[path]
            own[part] = t.to(own.device, own.dtype)

    def _empty(self, t: Tensor) -> Tensor:
        shape = (self._rows, *t.shape[1:])
        dtype = self._like.dtype if t.is_floating_point() else t.dtype
        if self._storage is None:
            return torch.empty(shape, dtype=dtype, device=self._like.device)
        return self._storage.empty(shape, dtype)
