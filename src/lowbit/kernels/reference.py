"""What a weight on codebooks of its columns means, in plain torch on any device. The other backends
are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..grid.bits import unpack
from ..grid.packed import PackedColumns, Segment

TILE = 1 << 21  # weights decoded at a time


def decode(packed: PackedColumns, rows: slice = slice(None)) -> Tensor:
    """The weights of some outputs: levels looked up, outliers in their place, all rounded to
    ``packed.dtype``.

    Args:
        packed: as `check` accepts it.
        rows: of consecutive outputs.

    Returns:
        (rows, in) float32.
    """
    first, last, _ = rows.indices(packed.shape[0])
    w = torch.empty(max(0, last - first), packed.shape[1], device=packed.segments[0].codes.device)
    if not len(w):
        return w
    for segment in packed.segments:
        w.index_copy_(
            1, segment.columns.long(), _looked_up(segment, slice(first, last), packed.dtype)
        )
    if packed.sparse is not None:
        starts = packed.sparse.starts[first : last + 1].long()
        entries = slice(int(starts[0]), int(starts[-1]))
        of_entry = torch.repeat_interleave(torch.arange(len(w), device=w.device), starts.diff())
        w[of_entry, packed.sparse.columns[entries].long()] = (
            packed.sparse.values[entries].to(packed.dtype).float()
        )
    return w


def _looked_up(segment: Segment, rows: slice, dtype: torch.dtype) -> Tensor:
    """(rows, n) float32 for the n columns of one width."""
    n, entries = segment.levels.shape
    codes = unpack(segment.codes[:, rows].T, segment.bits, n)  # (rows, n) uint8
    at = codes.int() + torch.arange(0, n * entries, entries, dtype=torch.int32, device=codes.device)
    return segment.levels.to(dtype).float().flatten().index_select(0, at.flatten()).view(at.shape)


def tiles(packed: PackedColumns, weights: int = TILE) -> Iterator[slice]:
    """Consecutive outputs that have about so many weights together."""
    step = max(1, weights // packed.shape[1])
    return (slice(at, min(at + step, packed.shape[0])) for at in range(0, packed.shape[0], step))


def product(x: Tensor, packed: PackedColumns) -> Tensor:
    """x W^T, some outputs at a time.

    In float32; on an accelerator in the dtype that x and the weight share, if they do: that loses
    nothing of the weight.

    Args:
        x: (tokens, in) float32, bfloat16 or float16.
        packed: on the same device.

    Returns:
        (tokens, out) in x's dtype.
    """
    work = x.dtype if x.device.type != "cpu" and x.dtype == packed.dtype else torch.float32
    y = x.new_empty(x.shape[0], packed.shape[0])
    for rows in tiles(packed):
        y[:, rows] = (x.to(work) @ decode(packed, rows).to(work).T).to(x.dtype)
    return y


def transposed_product(y: Tensor, packed: PackedColumns) -> Tensor:
    """y W, some outputs at a time: what a gradient needs. (tokens, out) -> (tokens, in) in y's
    dtype.
    """
    x = torch.zeros(y.shape[0], packed.shape[1], device=y.device)
    for rows in tiles(packed):
        x += y[:, rows].float() @ decode(packed, rows)
    return x.to(y.dtype)
