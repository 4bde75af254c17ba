"""Rows of a learner's next step, fetched while it works on this one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.block import Block
from ..model.microbatches import ran_out
from ._batches import copied, gathered


class Prefetcher:
    """Rows of a block's quantized stream, of its target and of what the block is given beside the
    stream, step after step.

    Where an accelerator computes, the next ones are copied meanwhile, on a stream of their own.
    From the device or from page-locked memory nothing waits for the host; from a file the host
    copies, while the device works on what it was given before.
    """

    def __init__(self, block: Block) -> None:
        self._block = block
        self._streams = (block.xq, block.target, *block.context.given_q.values())
        beside = block.device.type != "cpu" and block.ranks.size == 1
        self._side = torch.Stream(device=block.device) if beside else None
        self._ahead: tuple[Tensor, list[Tensor], Any] | None = None

    def prepare(self, rows: Tensor) -> None:
        """Have these rows fetched: they come next. Where memory runs out for them, none are fetched
        from then on.
        """
        b = self._block
        own = (
            rows if b.ranks.size == 1 else rows[rows % b.ranks.size == b.ranks.rank] // b.ranks.size
        )
        b.context.prefetch(own, *self._streams)
        if self._side is None:
            return
        try:
            self._ahead = self._fetched(self._side, rows)
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            self._side = None

    def _fetched(self, side: torch.Stream, rows: Tensor) -> tuple[Tensor, list[Tensor], Any]:
        """The rows, copies of them from each stream, and the event of the last one's end."""
        # Which may still be writing the streams.
        side.wait_stream(torch.accelerator.current_stream(self._block.device))
        with side:
            found = [copied(s, rows, self._block.device) for s in self._streams]
            return rows, found, side.record_event()

    def take(self, rows: Tensor) -> list[Tensor]:
        """(n, ...) of each for all ranks' rows, see `gathered`."""
        b, ahead = self._block, self._ahead
        self._ahead = None
        if ahead is None or not torch.equal(ahead[0], rows):
            return gathered(b.ranks, rows, self._streams, b.device)
        now = torch.accelerator.current_stream(b.device)
        now.wait_event(ahead[2])
        for t in ahead[1]:
            t.record_stream(now)  # or its memory would be given away while this stream reads it
        return ahead[1]
