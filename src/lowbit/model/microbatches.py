"""Work on rows that halves what it takes at a time when the device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..errors import LowbitError

T = TypeVar("T")

# The CPU's allocator, and the workspaces of CUDA's libraries.
_RAN_OUT = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")


def ran_out(e: BaseException) -> bool:
    """Whether an exception says that memory ran out. Allocators beside torch's own on a device have
    none of their own type.
    """
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(e, RuntimeError) and any(words in str(e) for words in _RAN_OUT)
    )


class MicroBatches:
    """Rows in parts as large as fit, found out once and kept.

    Args:
        what: is done with the rows, for messages.
        most: rows to begin with.
        remark: told once for every time the parts were made smaller.
    """

    def __init__(self, what: str, most: int, remark: Callable[[str], None]) -> None:
        self._what, self._size, self._remark = what, max(1, most), remark

    def over(self, rows: int, start: Callable[[], T], add: Callable[[T, slice], T]) -> T:
        """``add(total, part)`` for each part of ``rows`` rows in turn, beginning with ``start()``;
        all again in smaller parts if memory runs out, so ``add`` must change nothing but its total,
        or nothing that doing it again does not mend.

        Raises:
            LowbitError: a single row does not fit.
        """
        while True:
            for total in self._tried(rows, start, add):
                return total
            self._size = min(self._size, rows)
            self._halve()

    def _tried(
        self, rows: int, start: Callable[[], T], add: Callable[[T, slice], T]
    ) -> Iterator[T]:
        """The result, or nothing: outside the handler, as the exception holds on to what the failed
        attempt had allocated.
        """
        try:
            total = start()
            for part in self.of(rows):
                total = add(total, part)
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            return
        yield total

    def of(self, rows: int) -> Iterator[slice]:
        """The parts as they are now."""
        for at in range(0, rows, self._size):
            yield slice(at, min(at + self._size, rows))

    def _halve(self) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        if self._size == 1:
            raise LowbitError(
                f"the device ran out of memory while {self._what}, with a single row at a time: "
                "use a shorter --length, another --device, "
                "or --offload host to keep activations off it."
            )
        before, self._size = self._size, (self._size + 1) // 2
        self._remark(
            f"the device ran out of memory while {self._what} {before} rows at a time; "
            f"{self._size} now, to the same result"
        )
