"""A recipe on the blocks of an open model, without an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lowbit.model.block import Block
from lowbit.model.model import Model, Streams
from lowbit.model.stream import ModelStream
from lowbit.plan import plan_for
from lowbit.recipe import Recipe
from lowbit.stages import Blocks, Entered


def staged(source: ModelStream, recipe: Recipe, rows: torch.Tensor) -> Model:
    """The model as the stages before the blocks leave it.

    Args:
        rows: (n, length) int64, the calibration.
    """
    plan = plan_for(source, recipe, *rows.shape)
    model = plan.model(source, rows)
    for stage in plan.stages:
        model = stage(model)
    return model


def first_block(source: ModelStream, recipe: Recipe, streams: Streams, length: int) -> Block:
    """The first block, with these activations entering it."""
    rows = torch.zeros(len(streams.x), length, dtype=torch.int64)
    model = plan_for(source, recipe, *rows.shape).model(source, rows)
    return model.begin(0, streams, source.block_kwargs(length)[0])


class _Shown:
    def __init__(self, show: Callable[[int, Block], None]) -> None:
        self._show = show

    def finished(self, i: int) -> None:
        return None

    def keep(self, i: int, block: Block, seconds: float) -> Callable[[], Mapping[str, Any]]:
        self._show(i, block)
        return dict

    def loaded(self, i: int, block: Block) -> Block:
        raise NotImplementedError("nothing is kept, so no block is ever finished")


def tuned(model: Model, streams: Streams, show: Callable[[int, Block], None]) -> Iterator[Streams]:
    """Quantize the blocks, ``show`` each; yields what leaves them."""
    for _, after in Blocks(Entered(model.rows), _Shown(show)).walk(model, streams):
        yield after
