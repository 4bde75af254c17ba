"""The model that a file holds, where its numbers are not quite those that were tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...formats.packing import packed_linears
from ...machine import give_back_memory
from ...model.checkpoint import Checkpoint, Stored
from ...model.computed import At, Computed
from ...model.config import load_config
from ...model.opened import Opened
from ...model.passing import hidden_of
from ...model.stream import ModelStream
from ...model.wrapper import text_config
from ..source import Source


@dataclass(frozen=True)
class Inside:
    """A parameter as the file holds it; see `lowbit.model.computed.View`.

    Attributes:
        shape: of the parameter. decoded: gives it, of any floating-point dtype.
    """

    shape: tuple[int, ...]
    decoded: Callable[[], Tensor]

    @property
    def stored(self) -> Stored:
        """In float32, whatever the artifact has."""
        return Stored(self.shape, "F32")

    def read(self, at: At) -> Tensor:
        """Decode the parameter, and take a part."""
        return self.decoded().float().view(self.shape)[at]


class _Held(Computed):
    """An artifact that shows other numbers for its parameters."""

    def __init__(self, source: Source, views: Mapping[str, Inside]) -> None:
        super().__init__(source.folder)
        self._views = views

    @property
    def views(self) -> Mapping[str, Inside]:
        """See `Computed`."""
        return self._views

    @cached_property
    def left_out(self) -> Mapping[str, str]:
        """See `Checkpoint`: codes and scales."""
        held = Checkpoint.stored(self)
        packed = set(packed_linears(held))
        return {
            n: "of a packed linear"
            for n in held
            if n not in self._views and n.rpartition(".")[0] in packed
        }


class RoundedModel:
    """The model, one block in memory at a time, computed in float32.

    Args:
        source: the artifact that was exported. views: every parameter that the file holds, by its
            name in the artifact.
    """

    def __init__(self, source: Source, views: Mapping[str, Inside]) -> None:
        held = _Held(source, views)
        whole = load_config(held)
        opened = Opened(held, held.stored(), whole, text_config(whole, held.name))
        self._stream = ModelStream(opened, "cpu", torch.float32)
        self._grid = next(iter(source.grids.values()))

    def logits(self, ids: Tensor, last: int) -> Tensor:
        """(n, length) int64 -> (n, last, vocab) float32, of the last positions."""
        found = hidden_of(self._stream, ids, self._grid, progress=give_back_memory)
        return self._stream.head(found[:, -last:])
