"""Statistics of what reaches linears: the one way for a method to see inputs.

Two streams pass through a block. On the "float" stream everything is as in the float model, but for
what methods have folded into this block's weights. On the "quantized" stream the blocks before are
quantized, coded linears of this block have their decoded weights, and inputs pass their
quantizers. Rows are shared among ranks; a statistic is of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .block import Block

Stream = Literal["float", "quantized"]
Merge = Callable[[Tensor, Tensor], Tensor]
Reduce = Union[Literal["sum", "max"], Merge]
Value = Union[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Call:
    """What a submodule was called with, for one batch of rows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Seen:
    """What reached a linear with one batch of rows.

    Args:
        x: (..., channels) as it arrived. at: numbers of its tokens that count; None for all.
    """

    def __init__(self, block: Block, linear: str, x: Tensor, at: Tensor | None) -> None:
        self._block, self.linear, self._x, self._at = block, linear, x, at

    @cached_property
    def arrived(self) -> Tensor:
        """(tokens, channels) as it arrived: before a rotation and a quantizer of the input."""
        return self._flat(self._x)

    @cached_property
    def met(self) -> Tensor:
        """(tokens, channels) in the compute dtype: what meets the weight."""
        return self._flat(self._block.entering(self.linear, self._x))

    @cached_property
    def exact(self) -> Tensor:
        """(tokens, channels) in the compute dtype: the same without quantization of the input."""
        return self._flat(self._block.exact().entering(self.linear, self._x))

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return flat if self._at is None else flat[self._at]


@dataclass
class Statistic:
    """A statistic of one linear's inputs.

    Attributes:
        values: as `of` gave them, each reduced over batches and ranks. tokens: how many were seen.
    """

    values: tuple[Tensor, ...]
    tokens: int

    @property
    def value(self) -> Tensor:
        """The first of them: the only one, where ``of`` gave a tensor."""
        return self.values[0]


def statistics(
    block: Block,
    linears: Sequence[str],
    stream: Stream,
    of: Callable[[Seen], Value],
    reduce: Reduce = "sum",
    rows: int | None = None,
    tokens: Tensor | None = None,
    most: int | None = None,
    inside: tuple[str, list[Call]] | None = None,
    keep: Mapping[str, list[Call]] | None = None,
    pooled: bool = False,
) -> dict[str, Statistic]:
    """See `Block.statistics`."""
    viewed = block.as_seen(stream)
    picked = None if tokens is None else block.ranks.tokens(tokens, block.x.shape[1])
    found: dict[str, Statistic] = {}
    passed = dict.fromkeys(linears, 0)
    kept = keep or {}
    modules = [*linears, *(name for name in kept if name not in passed)]

    def visit(name: str, call: Call) -> None:
        if name in kept:
            kept[name].append(call)
        if name not in passed:
            return
        x = call.args[0]
        count = x[..., 0].numel()
        start, at = passed[name], None
        passed[name] += count
        if picked is not None:
            at = (picked[(picked >= start) & (picked < start + count)] - start).to(x.device)
            count = len(at)
            if not count:
                return
        values, key = _several(of(Seen(viewed, name, x, at))), linears[0] if pooled else name
        if key in found:
            _merge(found[key], values, reduce)
            found[key].tokens += count
        else:
            found[key] = Statistic(values, count)

    if inside is not None:
        viewed.observe_inside(inside[0], inside[1], modules, visit)
    elif linears:
        block.observe(modules, stream, block.tuned_rows if rows is None else rows, visit, most)
    nothing = torch.empty(0, dtype=torch.int64, device=block.device)
    asked = linears[:1] if pooled else linears
    for name in asked:
        if name not in found:
            x = torch.zeros(1, block.weight(name).shape[1], device=block.device)
            found[name] = _of_nothing(of, viewed, name, x.to(block.compute), nothing, reduce)
        if block.ranks.size > 1:
            _over_ranks(block, found[name], reduce)
    return {name: found[name] for name in asked}


def _several(value: Value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _merge(total: Statistic, values: tuple[Tensor, ...], reduce: Reduce) -> None:
    pairs = zip(total.values, values, strict=True)
    if reduce == "sum":
        for sum_, value in pairs:
            sum_ += value
    else:
        merge = torch.maximum if reduce == "max" else reduce
        total.values = tuple(merge(one, other) for one, other in pairs)


def _of_nothing(
    of: Callable[[Seen], Value],
    block: Block,
    name: str,
    x: Tensor,
    nothing: Tensor,
    reduce: Reduce,
) -> Statistic:
    """What a rank finds, or adds to others', that has seen no token of a linear."""
    if reduce not in ("sum", "max"):
        return Statistic(_several(of(Seen(block, name, x, nothing))), 0)
    least = 0.0 if reduce == "sum" else float("-inf")
    like = _several(of(Seen(block, name, x, None)))
    return Statistic(tuple(torch.full_like(value, least) for value in like), 0)


def _over_ranks(block: Block, found: Statistic, reduce: Reduce) -> None:
    ranks = block.ranks
    found.tokens = int(ranks.total(found.tokens)[0])
    if reduce == "sum":
        ranks.sum_(*found.values)
    elif reduce == "max":
        wide = [value.double() for value in found.values]  # as every backend can compare
        for value in wide:
            ranks.max_(value)
        found.values = tuple(w.to(v.dtype) for w, v in zip(wide, found.values, strict=True))
    else:
        found.values = tuple(
            functools.reduce(reduce, ranks.stacked(value).unbind(0)) for value in found.values
        )
