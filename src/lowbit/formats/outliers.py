"""Weights kept apart, as tensors beside those of any layout:

weight_outlier_starts   int32 (out + 1,), weight_outlier_columns uint16 (int32 beyond 65536 inputs)
(n,), weight_outlier_values float16 (n,): entries that replace what the codes say, by row, columns
ascending.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Coded, Outliers
from ..grid.packed import Sparse, check_sparse
from .layout import Buffers

_SHORT = 1 << 16


def index_dtype(columns: int) -> torch.dtype:
    """Of stored column numbers."""
    return torch.uint16 if columns <= _SHORT else torch.int32


def index(values: Tensor, count: int) -> Tensor:
    """Column numbers as they are stored in a layer of ``count`` inputs."""
    return values.to(index_dtype(count))


def pack(q: Coded) -> dict[str, Tensor]:
    """The tensors of a weight's outliers; none without any."""
    if q.outliers is None:
        return {}
    rows, columns = q.codes.shape
    counts = torch.bincount(q.outliers.index // columns, minlength=rows)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    values = q.outliers.values.to(torch.float16)
    if not torch.equal(values.float(), q.outliers.values):
        raise LowbitError(
            "outliers are not representable in float16: round them when they are set aside, not at "
            "export."
        )
    return {
        "weight_outlier_starts": starts.to(torch.int32),
        "weight_outlier_columns": index(q.outliers.index % columns, columns),
        "weight_outlier_values": values,
    }


def unpack(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> Outliers | None:
    """The inverse of `pack`. Raises LowbitError as `unpack`."""
    sparse = read(tensors, shape, name)
    if sparse is None:
        return None
    rows = torch.arange(shape[0]).repeat_interleave(sparse.starts.long().diff())
    return Outliers(rows * shape[1] + sparse.columns.long(), sparse.values.float())


def read(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> Sparse | None:
    """The outliers of one weight, checked; None without any. Raises LowbitError as `unpack`."""
    if "weight_outlier_starts" not in tensors:
        return None
    starts, columns, values = (
        held(tensors, f"weight_outlier_{k}", name) for k in ("starts", "columns", "values")
    )
    sparse = Sparse(starts, columns.to(torch.int32), values)
    check_sparse(sparse, shape, f"'{name}'")
    return sparse


def held(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    """A tensor of the linear with this full name. Raises LowbitError if it is missing."""
    if key not in tensors:
        raise LowbitError(f"'{name}' has no tensor '{key}' in this artifact.")
    return tensors[key]


def buffers(rows: int, width: int, count: int | None) -> Buffers:
    """Shape and dtype of each tensor, by its local name; none without any outliers.

    Args:
        count: number of weights kept apart, None without any.
    """
    if count is None:
        return {}
    return {
        "weight_outlier_starts": ((rows + 1,), torch.int32),
        "weight_outlier_columns": ((count,), index_dtype(width)),
        "weight_outlier_values": ((count,), torch.float16),
    }
