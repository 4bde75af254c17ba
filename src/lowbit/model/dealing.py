"""Work by the weight, dealt out over ranks: every piece is done by one of them, and all get every
result.

What a rank finds from its own rows is summed (`Ranks.sum_`). What follows from the sums is the same
work for all, and where one piece of it does not depend on another it need not be done by all. A
result travels as what it is made of: its tensors are sent as tensors from the rank that made them,
and only what is around them is pickled.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LowbitError
from .ranks import Ranks

T = TypeVar("T")
_FINE = 4  # pieces a rank, where a large one is cut: no rank then has a quarter more than another
_ALIGNED = 64  # rows: parts of a product then round as the whole does on the processors looked at


def owners(costs: Sequence[float], size: int) -> list[int]:
    """The rank of each piece of work: the largest first, each to the rank with the least so far.
    The same on all ranks.

    Args:
        costs: of the pieces, in any unit. size: how many ranks there are.
    """
    load, out = [0.0] * size, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        out[piece] = min(range(size), key=lambda r: (load[r], r))
        load[out[piece]] += costs[piece]
    return out


def cut(rows: int, parts: int) -> list[slice]:
    """``rows`` in so many parts of about one size, or fewer: none is empty, and parts of large
    matrices begin at multiples of 64.
    """
    step = _ALIGNED if rows >= parts * _ALIGNED else 1
    ends = [min(rows, -(-rows * (i + 1) // (parts * step)) * step) for i in range(parts)]
    starts = [0, *ends[:-1]]
    return [slice(a, b) for a, b in zip(starts, ends, strict=True) if a < b]


def parts_of(costs: Sequence[float], size: int) -> list[int]:
    """Into how many parts each of some pieces is cut so that ranks can be given equal work: 1 for
    those that are small beside a rank's share.
    """
    most = sum(costs) / (_FINE * size) if size > 1 else 0.0
    return [max(1, min(size, round(c / most))) if most else 1 for c in costs]


def divided(ranks: Ranks, costs: Sequence[float], work: Callable[[int], T]) -> list[T]:
    """Results of some pieces of work, each done by its owner; called by all ranks alike.

    Args:
        costs: of the pieces, see `owners`.
        work: the number of a piece -> a value that can be pickled but for the tensors in it, on the
            rank's own device or the CPU. It must not communicate.

    Returns:
        by piece. A tensor that another rank made is contiguous.

    Raises:
        LowbitError: what the first piece that failed has raised, on all ranks.
    """
    if ranks.size == 1:
        return [work(i) for i in range(len(costs))]
    owner = owners(costs, ranks.size)
    made: dict[int, T] = {}
    failed: tuple[int, LowbitError] | None = None
    for i in (i for i, r in enumerate(owner) if r == ranks.rank):
        try:
            made[i] = work(i)
        except LowbitError as e:  # of one rank: the others would wait for it
            failed = i, e
            break
    packed = _Packed.of({} if failed else made)
    told = ranks.everyone((failed, packed.around, packed.like))
    errors = sorted((f for f, _, _ in told if f is not None), key=lambda f: f[0])
    if errors:
        raise errors[0][1]
    found: dict[int, T] = {}
    for rank, (_, around, like) in enumerate(told):
        own = rank == ranks.rank
        tensors = packed.tensors if own else [_empty(*one) for one in like]
        ranks.hand_round(tensors, rank)
        found |= made if own else _Packed(around, like, tensors).value()
    return [found[i] for i in range(len(costs))]


_Like = tuple[tuple[int, ...], torch.dtype, str]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=kind)


@dataclass(frozen=True)
class _Packed:
    """A value as what is around its tensors, and the tensors.

    Attributes:
        around: pickled. like: shape, dtype and kind of device of each tensor.
    """

    around: bytes
    like: list[_Like]
    tensors: list[Tensor]

    @classmethod
    def of(cls, value: Any) -> _Packed:
        tensors: list[Tensor] = []
        file = io.BytesIO()
        _Pickler(file, tensors).dump(value)
        like = [(tuple(t.shape), t.dtype, t.device.type) for t in tensors]
        return cls(file.getvalue(), like, tensors)

    def value(self) -> Any:
        return _Unpickler(io.BytesIO(self.around), self.tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self._tensors.append(obj.detach())
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]
