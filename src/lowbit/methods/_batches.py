"""Mini-batches over ranks: the rows that one rank would draw, fetched from whoever holds them,
worked on in equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.ranks import Ranks


def copied(stream: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Rows of a stream on a device, each copied by itself: an index would have to be sent there
    first, and the host wait for it.

    Args:
        stream: (rows, ...). rows: (n,) int64 on the CPU.
    """
    out = torch.empty(len(rows), *stream.shape[1:], dtype=stream.dtype, device=device)
    for to, i in zip(out, rows.tolist(), strict=True):
        to.copy_(stream[i], non_blocking=True)
    return out


def gathered(
    ranks: Ranks, rows: Tensor, streams: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """Rows of some streams by their numbers over all ranks.

    Args:
        rows: (n,) int64, the same on all ranks. streams: this rank's rows of each, (local rows,
            ...).

    Returns:
        (n, ...) for each stream; on ``device`` if there are several ranks.
    """
    if ranks.size == 1:
        return [s[rows] if device.type == "cpu" else copied(s, rows, device) for s in streams]
    own = (rows % ranks.size == ranks.rank).nonzero()[:, 0]
    out = [torch.zeros(len(rows), *s.shape[1:], dtype=s.dtype, device=device) for s in streams]
    for filled, stream in zip(out, streams, strict=True):
        filled[own.to(device)] = stream[rows[own] // ranks.size].to(device)
    # One rank has the row and the others zeros: summed as bytes, nothing is rounded.
    ranks.sum_(*(t.view(torch.uint8) for t in out))
    return out


def shared(
    ranks: Ranks, rows: Tensor, streams: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """This rank's contiguous part of `gathered` rows: the work is balanced whoever holds them.
    Empty if there are more ranks than rows.
    """
    found = gathered(ranks, rows, streams, device)
    return found if ranks.size == 1 else [f[ranks.share(len(rows))] for f in found]
