"""What a block is worked on with: its module, its inputs, the device's limits, the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import AnyGrid
from .beside import Place, Values, picked
from .graph import Graph
from .precision import Wide, as_computed, nothing_wide
from .ranks import ALONE, Ranks
from .storage import Storage

TOKENS_PER_PASS = 8192
LOGITS = 1 << 25  # at a time
SUMMED = 1 << 24  # probabilities of which sums are made at a time

NOWHERE = Place()

Announce = Callable[[str], None]


def silent(what: str) -> None:
    """Nobody watches."""


def tokens_at_a_time(vocab: int) -> int:
    """How many tokens' logits are made together."""
    return max(1, LOGITS // vocab)


def token_parts(count: int, vocab: int) -> Iterator[slice]:
    """So many tokens in parts whose logits are made together."""
    most = tokens_at_a_time(vocab)
    for first in range(0, count, most):
        yield slice(first, min(first + most, count))


@dataclass(frozen=True)
class Context:
    """Everything about one decoder layer that no method decides.

    Attributes:
        name: prefix in the checkpoint, e.g. "model.layers.3".
        module: the transformers layer on the meta device: forward only, no data. graph: what reads
            what in it.
        kwargs: what the layer is called with besides its input.
        compute: dtype of the forward pass.
        stored: the dtype of most of the checkpoint's linears, in which scales and activation
            streams are kept.
        grids: linear -> grid.
        x, xq: (rows, length, hidden) inputs as the float model and as the quantized model see them;
            this rank's rows of them.
        target: the float block's output on ``x``, before anything was changed.
        place: what the block is given and leaves beside its input and output. given, given_q: that
            is given, of the rows of ``x`` and of ``xq``. left: what the float block left of ``x``.
        tuned_rows: how many leading rows of all ranks methods may learn from; later rows only pass
            through (held-out evaluation).
        seed: for everything random in this block.
        dtypes: parameter -> dtype in the checkpoint, where it is not ``stored``.
        wide: what stays in float32 whatever the forward pass computes in, see `Precision`.
        readout: the last block's output -> logits, None for every other block.
        announce: told what a method is about to do, for whoever watches.
        storage: where streams made by `Block.run` live; None puts them beside their input.
        ranks: the processes that share the rows.
    """

    name: str
    module: nn.Module
    graph: Graph
    kwargs: Mapping[str, Any]
    compute: torch.dtype
    stored: torch.dtype
    grids: Mapping[str, AnyGrid]
    x: Tensor
    xq: Tensor
    target: Tensor
    tuned_rows: int
    seed: int
    place: Place = NOWHERE
    given: Values = field(default_factory=dict)
    given_q: Values = field(default_factory=dict)
    left: Values = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    wide: Wide = nothing_wide
    readout: Callable[[Tensor], Tensor] | None = None
    announce: Announce = silent
    storage: Storage | None = None
    ranks: Ranks = ALONE

    def keeps(self, name: str) -> torch.dtype:
        """The dtype in which an artifact stores a parameter that is not coded and that a method has
        changed: that of the checkpoint if it is wider than ``stored``.
        """
        return torch.promote_types(self.dtypes.get(name, self.stored), self.stored)

    def cast(self, weights: Mapping[str, Tensor], part: str = "") -> dict[str, Tensor]:
        """Weights as the forward pass takes them: in the compute dtype, or in float32 where
        transformers keeps them so.

        Args:
            part: the submodule in which their names are; "" is the block.
        """
        wide, prefix = self.wide(self.compute), f"{part}." if part else ""
        return {
            name: w.to(as_computed(prefix + name, w, self.compute, wide))
            for name, w in weights.items()
        }

    def computing(self, dtype: torch.dtype) -> Context:
        """The same with the forward pass in another dtype."""
        return replace(self, compute=dtype, kwargs=in_dtype(self.kwargs, dtype))

    def prefetch(self, rows: Tensor | slice, *streams: Tensor) -> None:
        """Hint that these rows of streams will be read next, see `Storage.prefetch`."""
        if self.storage is not None:
            for x in streams:
                self.storage.prefetch(x, rows)

    def arriving(self, rows: Tensor, device: torch.device) -> Tensor:
        """Rows of a stream as the layer takes them: moved, then cast, for streams are often half as
        wide. From page-locked memory nothing waits for the copy.
        """
        return rows.to(device, non_blocking=True).to(self.compute)

    def passes(
        self, x: Tensor, given: Values, device: torch.device, most: int | None = None
    ) -> Iterator[tuple[Tensor, Values]]:
        """Rows in the compute dtype on the device, a few thousand tokens at a time; and those of
        what the block is given beside them.

        Args:
            most: rows at a time, at most.
        """
        step = max(1, TOKENS_PER_PASS // x.shape[1])
        step = step if most is None else min(step, most)
        for at in range(0, len(x), step):
            part = slice(at, min(at + step, len(x)))  # there may be more rows beside
            self.prefetch(slice(at + step, at + 2 * step), x, *given.values())
            yield self.arriving(x[part], device), picked(given, part)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A value with the floating-point tensors in it, also in tuples and mappings, in a dtype."""
    if isinstance(value, tuple):
        return tuple(in_dtype(v, dtype) for v in value)
    if isinstance(value, Mapping):
        return {k: in_dtype(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
