"""Rows of text through all blocks of a model, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..grid import AnyGrid
from .beside import Beside, Kept
from .block import Block
from .model import Model, Streams
from .stream import ModelStream


def _as_read(block: Block, i: int) -> Block:
    return block


@torch.no_grad()
def hidden_of(
    source: ModelStream,
    windows: Tensor,
    grid: AnyGrid,
    reading: Callable[[Block, int], Block] = _as_read,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """What leaves the last block, (n, length, width) float32.

    Args:
        windows: (n, length) int64. grid: that blocks are told; any, for nothing is coded.
        reading: what becomes of a block, and its index, before it computes. progress: called after
            each block.
    """
    x, own = source.entering(windows, torch.float32)
    kwargs = source.block_kwargs(windows.shape[1])
    source.release()
    model = Model(source, lambda _: grid, (), windows)
    streams = Streams(x, x, 0, beside=Beside(own, own))
    for i in range(len(source)):
        block = reading(model.read(i, streams, kwargs[i]), i)
        context, left = block.context, Kept(len(x), None, x)
        x = block.run(x, given=context.given, keep=left)
        beside = streams.beside.after(context.place, left.values, left.values)
        streams = replace(streams, x=x, xq=x, beside=beside)
        progress()
    return x
