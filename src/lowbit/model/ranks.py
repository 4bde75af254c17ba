"""Ranks: the processes that share one run, each with its own part of the calibration rows.

Row i of a stream belongs to rank i % size, so the first n rows, of which methods take statistics,
are spread evenly whatever n is. What is summed over rows is summed over ranks; what follows from
the sums is computed by all alike. Communication is torch.distributed's default group; nothing here
starts it (`lowbit.run.launch` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # what they are called before torch 2.13
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

from ..errors import LowbitError
from .microbatches import ran_out

_SHOWN = 4  # differences named in an error
_TOGETHER = 1 << 24  # bytes of tensors that are sent in one message


class RankGone(LowbitError):
    """Communication with the other ranks has ended. `lowbit.run.launch` finds out why and says
    so.
    """


@contextmanager
def _answered() -> Iterator[None]:
    """The one place where torch.distributed's errors (connection closed, timeout) become ours.
    Nothing else belongs inside.
    """
    try:
        yield
    except RuntimeError as e:
        if ran_out(e) or isinstance(e, torch.AcceleratorError):  # ours to report
            raise
        raise RankGone(str(e).splitlines()[0]) from e


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. With one process everything is a no-op.

    All methods that communicate must be called by all ranks in the same order.

    Attributes:
        rank: of this process. size: how many there are.
        local: number of this process on its machine, and of its accelerator. here: how many of the
            run's are on that machine.
        patient: a CPU group for values and for waiting until rank 0 has written or verified, which
            may take hours.
        group: through which tensors go; None is torch.distributed's default, all processes.
        machine: those of this machine alone, numbered from 0; None where they are all.

    Raises:
        RankGone: from every method that communicates, if another rank has ended.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    here: int = 1
    patient: Any = None
    group: Any = None
    machine: Ranks | None = None

    @property
    def near(self) -> Ranks:
        """The ranks of this machine. Those of another do the same work among themselves, where what
        is exchanged is much and goes faster within a machine.
        """
        return self if self.machine is None else self.machine

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    # --- whose rows -------------------------------------------------------------------------------

    def mine(self, rows: int) -> range:
        """Numbers of this rank's rows among the first ``rows``."""
        return range(self.rank, rows, self.size)

    def count(self, rows: int) -> int:
        """How many of the first ``rows`` rows are this rank's: the leading ones of what it
        holds.
        """
        return len(self.mine(rows))

    def tokens(self, numbers: Tensor, length: int) -> Tensor:
        """Those of the given tokens that are this rank's, by their numbers in what it holds; order
        kept.

        Args:
            numbers: (n,) int64, row * length + position over all ranks' rows. length: tokens a row.
        """
        if self.size == 1:
            return numbers
        row = numbers // length
        own = row % self.size == self.rank
        return (row[own] // self.size) * length + numbers[own] % length

    def share(self, count: int) -> slice:
        """This rank's contiguous part of ``count`` things; sizes differ by one at most, some are
        empty if there are more ranks.
        """
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    # --- sums and maxima --------------------------------------------------------------------------

    def sum_(self, *tensors: Tensor) -> None:
        """Sum tensors over ranks in place; the result has the same bits everywhere. Shapes and
        dtypes as on the other ranks.
        """
        self._reduce(tensors, dist.ReduceOp.SUM)

    def max_(self, *tensors: Tensor) -> None:
        """Elementwise maxima over ranks in place."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Sequence[Tensor], operation: Any) -> None:
        if self.size == 1:
            return
        alike = (
            len({(t.dtype, t.device) for t in tensors}) == 1
            and sum(t.nbytes for t in tensors) <= _TOGETHER
        )
        for batch in [tensors] if alike else [[t] for t in tensors]:
            alone = len(batch) == 1 and batch[0].is_contiguous()
            # One message: small ones cost their latency.
            flat = batch[0] if alone else torch.cat([t.reshape(-1) for t in batch])
            with _answered():
                dist.all_reduce(flat, operation, group=self.group)
            if not alone:
                for t, part in zip(
                    batch, torch.split(flat, [t.numel() for t in batch]), strict=True
                ):
                    t.copy_(part.view(t.shape))

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over ranks, added in float64."""
        if self.size == 1:
            return list(numbers)
        t = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(t)
        out: list[float] = t.tolist()
        return out

    def stacked(self, t: Tensor) -> Tensor:
        """(size, ...): a tensor of every rank, of one shape and dtype."""
        if self.size == 1:
            return t[None]
        parts = [
            torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        own = t.contiguous()
        with _answered():
            dist.all_gather(parts, own, group=self.group)
        return torch.stack(parts)

    def joined_(self, out: Tensor, own: Tensor) -> None:
        """Write every rank's tensor above each other's into ``out``, (size * n, ...).

        Args:
            own: (n, ...) contiguous, n alike on all ranks.
        """
        with _answered():
            all_gather_single(out, own, group=self.group)

    def summed_part(self, whole: Tensor) -> Tensor:
        """(n, ...): this rank's part, the rank-th, of the sum of a (size * n, ...) tensor over
        ranks.
        """
        out = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        with _answered():
            reduce_scatter_single(out, whole, group=self.group)
        return out

    def hand_round(self, tensors: Sequence[Tensor], source: int) -> None:
        """Write one rank's tensors over the others', bit for bit. Shapes and dtypes are the same
        everywhere; those of the other ranks are contiguous.
        """
        if self.size == 1:
            return
        for batch in _messages(tensors):
            alone = len(batch) == 1 and batch[0].is_contiguous()
            parts = [t.contiguous().view(-1).view(torch.uint8) for t in batch]
            flat = parts[0] if alone else torch.cat(parts)
            with _answered():
                dist.broadcast(flat, group_src=source, group=self.group)
            if not alone and self.rank != source:
                for t, part in zip(
                    parts, torch.split(flat, [p.numel() for p in parts]), strict=True
                ):
                    t.copy_(part)

    # --- values -----------------------------------------------------------------------------------

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, which is pickled: for what is small. Waits for the slowest as long as
        it takes.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _answered():
            dist.all_gather_object(found, value, group=self.patient)
        return found

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value; the others' do not count, and they wait for it as long as it takes."""
        if self.size == 1:
            return value
        box = [value if self.first else None]
        with _answered():
            dist.broadcast_object_list(box, group_src=0, group=self.patient)
        return box[0]

    def agree(self, what: str, value: Mapping[str, Any], remedy: str) -> None:
        """Compare something with the other ranks.

        Args:
            what: that differs, for an error. value: strings, numbers, lists and mappings of them.
                remedy: a sentence, what to do then.

        Raises:
            LowbitError: on every rank, naming what differs and between which ranks.
        """
        if self.size == 1:
            return
        flat = [dict(_leaves(v)) for v in self.everyone(dict(value))]
        keys = list(dict.fromkeys(k for f in flat for k in f))
        told = [
            f"{key} is {_said(flat[0].get(key))} on rank 0, {_said(flat[r].get(key))} on rank {r}"
            for key in keys
            for r in range(1, self.size)
            if flat[r].get(key) != flat[0].get(key)
        ]
        if told:
            more = f"; and {len(told) - _SHOWN} more differences" if len(told) > _SHOWN else ""
            raise LowbitError(
                f"{what} differs between ranks: {'; '.join(told[:_SHOWN])}{more}. {remedy}"
            )


ALONE = Ranks()


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that are sent together: neighbours on one device, as long as they are small."""
    batch: list[Tensor] = []
    for t in tensors:
        held = sum(b.nbytes for b in batch)
        if batch and (held + t.nbytes > _TOGETHER or batch[0].device != t.device):
            yield batch
            batch = []
        batch.append(t)
    if batch:
        yield batch


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, what is there) of everything in nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        named = [v.get("name", v.get("method")) if isinstance(v, Mapping) else None for v in value]
        for i, (name, inner) in enumerate(zip(named, value, strict=True)):
            yield from _leaves(inner, f"{path}.{i if name is None else name}")
    else:
        yield path, value


def _said(value: Any) -> str:
    text = "not there" if value is None else str(value)
    is_hash = len(text) in (32, 64) and all(c in "0123456789abcdef" for c in text)
    return text[:12] + "..." if is_hash else text
