"""Statistics of what reaches linears: the one way for a method to see inputs.

Two streams pass through a block. On the "float" stream everything is as in the float model, but for
what methods have folded into this block's weights. On the "quantized" stream the blocks before are
quantized, coded linears of this block have their decoded weights, and inputs pass their
quantizers. Rows are shared among ranks; a statistic is of all of them.
"""

from __future__ import annotations

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
        value: as `of` gave it, reduced over batches and ranks. tokens: how many were seen.
    """

    value: Tensor
    tokens: int


def statistics(
    block: Block,
    linears: Sequence[str],
    stream: Stream,
    of: Callable[[Seen], Tensor],
    reduce: Reduce = "sum",
    rows: int | None = None,
    tokens: Tensor | None = None,
    inside: tuple[str, list[Call]] | None = None,
    keep: tuple[str, list[Call]] | None = None,
) -> dict[str, Statistic]:
    """See `Block.statistics`."""
    viewed = block.as_seen(stream)
    picked = None if tokens is None else block.ranks.tokens(tokens, block.x.shape[1])
    found: dict[str, Statistic] = {}
    passed = dict.fromkeys(linears, 0)

    def visit(name: str, call: Call) -> None:
        if keep is not None and name == keep[0]:
            keep[1].append(call)
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
        value = of(Seen(viewed, name, x, at))
        if name in found:
            _merge(found[name], value, reduce)
            found[name].tokens += count
        else:
            found[name] = Statistic(value, count)

    if inside is not None:
        viewed.observe_inside(inside[0], inside[1], linears, visit)
    elif linears:
        modules = [*linears, *([keep[0]] if keep else [])]
        block.observe(modules, stream, block.tuned_rows if rows is None else rows, visit)
    nothing = torch.empty(0, dtype=torch.int64, device=block.device)
    for name in linears:
        if name not in found:
            x = torch.zeros(1, block.weight(name).shape[1], device=block.device)
            found[name] = _of_nothing(of, viewed, name, x.to(block.compute), nothing, reduce)
        if block.ranks.size > 1:
            _over_ranks(block, found[name], reduce)
    return {name: found[name] for name in linears}


def _merge(total: Statistic, value: Tensor, reduce: Reduce) -> None:
    if reduce == "sum":
        total.value += value
    elif reduce == "max":
        total.value = torch.maximum(total.value, value)
    else:
        total.value = reduce(total.value, value)


def _of_nothing(
    of: Callable[[Seen], Tensor],
    block: Block,
    name: str,
    x: Tensor,
    nothing: Tensor,
    reduce: Reduce,
) -> Statistic:
    """What a rank finds, or adds to others', that has seen no token of a linear."""
    if reduce == "sum":
        return Statistic(torch.zeros_like(of(Seen(block, name, x, None))), 0)
    if reduce == "max":
        return Statistic(torch.full_like(of(Seen(block, name, x, None)), float("-inf")), 0)
    return Statistic(of(Seen(block, name, x, nothing)), 0)


def _over_ranks(block: Block, found: Statistic, reduce: Reduce) -> None:
    ranks = block.ranks
    found.tokens = int(ranks.total(found.tokens)[0])
    if reduce == "sum":
        ranks.sum_(found.value)
    elif reduce == "max":
        wide = found.value.double()  # as every backend can compare
        ranks.max_(wide)
        found.value = wide.to(found.value.dtype)
    else:
        first, *others = ranks.stacked(found.value).unbind(0)
        for value in others:
            first = reduce(first, value)
        found.value = first
