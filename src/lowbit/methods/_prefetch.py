"""Rows of a learner's next step, fetched while it works on this one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.block import Block
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
        self._ahead: tuple[Tensor, list[Tensor], torch.Event] | None = None

    def prepare(self, rows: Tensor) -> None:
        """Have these rows fetched: they come next."""
        b = self._block
        own = (
            rows if b.ranks.size == 1 else rows[rows % b.ranks.size == b.ranks.rank] // b.ranks.size
        )
        b.context.prefetch(own, *self._streams)
        if self._side is not None:
            # Which may still be writing the streams.
            self._side.wait_stream(torch.accelerator.current_stream(b.device))
            with self._side:
                self._ahead = (
                    rows,
                    [copied(s, rows, b.device) for s in self._streams],
                    self._side.record_event(),
                )

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
