"""Models that hand several residual streams on as (streams, rows, length, hidden): seen from
outside, their blocks take and return (rows, length, streams, hidden), as all others do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def rows_first(x: Tensor) -> Tensor:
    """(streams, rows, length, hidden) -> (rows, length, streams, hidden)."""
    return x.permute(1, 2, 0, 3)


def streams_first(x: Tensor) -> Tensor:
    """(rows, length, streams, hidden) -> (streams, rows, length, hidden), as a block is used to."""
    return x.permute(2, 0, 1, 3).contiguous()


def turn(block: nn.Module) -> None:
    """Have a block take its first argument, and return it or the first of several, with rows
    first. It is changed.
    """
    block.register_forward_pre_hook(lambda _, args: (streams_first(args[0]), *args[1:]))
    block.register_forward_hook(lambda _, args, out: on_first(rows_first, out))


def on_first(change: Any, out: Any) -> Any:
    """What a block returns with its output changed."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
