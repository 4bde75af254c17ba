"""A weight on codebooks of its columns as it lies on disk and in a loaded model: packed, columns sorted by width, outliers apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The columns of one width.

    Attributes:
        bits: of their codes, 1 to 8.
        columns: (n,) int32, the input channel of each.
        codes: (ceil(n * bits / 32), out) int32: per output a dense little-endian bit stream over the n columns, code i in bits
            [i * bits, i * bits + bits). Outputs are contiguous: neighbouring lanes take neighbouring outputs.
        levels: (n, 2**bits) float16, ascending.
    """

    bits: int
    columns: Tensor
    codes: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Sparse:
    """Weights kept apart, by output row (CSR). They replace what the codes say, they are not added to it.

    Attributes:
        starts: (out + 1,) int32; row r has entries starts[r] ... starts[r + 1] - 1.
        columns: (n,) int32 input channels, ascending within a row.
        values: (n,) float16.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True)
class PackedColumns:
    """Everything that a product with the weight needs.

    Attributes:
        shape: (out, in).
        segments: by rising width; every input channel is in exactly one of them.
        sparse: None without outliers.
        dtype: to which levels and outliers are rounded when they are decoded, that of the checkpoint.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    sparse: Sparse | None
    dtype: torch.dtype
