"""Weights on codebooks, and weights kept apart, as tensors: the layout of `lowbit.grid.packed`
under these local names.

weight_shape            int64 [out, in]
weight_columns          uint16 (int32 beyond 65536 inputs) (in,): the input channel of each stored
column, columns of one width
                        together, by rising width; missing if all columns have the same width
weight_codes_B          int32 (ceil(n * B / 32), out), the codes of the n columns of B bits
weight_levels_B         float16 (books, 2**B), ascending
weight_outlier_starts   int32 (out + 1,), weight_outlier_columns uint16 or int32 (n,),
weight_outlier_values float16 (n,): entries
                        that replace what the codes say, by row, columns ascending; also beside a
                        uniform grid's tensors
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Codebook, CodebookParams, Outliers, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import packed_words
from ..grid.bits import unpack as unpack_bits
from ..grid.packed import PackedColumns, Segment, Sparse, check, check_sparse

_SHORT = 1 << 16


def index_dtype(columns: int) -> torch.dtype:
    """Of stored column numbers."""
    return torch.uint16 if columns <= _SHORT else torch.int32


def _index(values: Tensor, count: int) -> Tensor:
    return values.to(index_dtype(count))


def pack(q: QTensor) -> dict[str, Tensor]:
    """The tensors of one weight on codebooks by their local names, outliers included.

    Raises:
        LowbitError: a level would change when stored.
    """
    assert isinstance(q.grid, Codebook) and isinstance(q.params, CodebookParams)
    rows, columns = q.codes.shape
    out = {"weight_shape": torch.tensor([rows, columns], dtype=torch.int64)}
    levels = q.params.levels.to(torch.float16)
    if not torch.equal(levels.to(q.params.levels.dtype), q.params.levels):
        raise LowbitError(
            "levels are not representable in float16: fix their dtype before tuning, not at export."
        )
    widths = q.params.widths
    kinds = sorted(set(widths.tolist()))
    of_columns = column_widths(q)
    if len(kinds) > 1:
        order = of_columns.argsort(stable=True)
        out["weight_columns"] = _index(order, columns)
    for bits in kinds:
        out[f"weight_codes_{bits}"] = pack_bits(
            q.codes[:, of_columns == bits].contiguous(), bits
        ).T.contiguous()
        out[f"weight_levels_{bits}"] = levels[widths == bits, : 1 << bits].contiguous()
    return {k: v.cpu() for k, v in {**out, **pack_outliers(q)}.items()}


def column_widths(q: QTensor) -> Tensor:
    """(in,) int64, the bits of each column's codes.

    Raises:
        LowbitError: books that are not per column differ in width.
    """
    widths: Tensor = q.params.widths
    if isinstance(q.grid, Codebook) and q.grid.per == "column":
        return widths.repeat_interleave(q.grid.group_size or 1)
    if len(set(widths.tolist())) > 1:
        raise LowbitError("only codebooks per column may differ in width.")
    return widths[:1].expand(q.codes.shape[1])


def pack_outliers(q: QTensor) -> dict[str, Tensor]:
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
        "weight_outlier_starts": starts.to(torch.int32).cpu(),
        "weight_outlier_columns": _index(q.outliers.index % columns, columns).cpu(),
        "weight_outlier_values": values.cpu(),
    }


def unpack(tensors: Mapping[str, Tensor], grid: Codebook, name: str = "weight") -> QTensor:
    """The inverse of `pack`.

    Args:
        tensors: local names -> tensors of one linear. name: its full name, for errors.

    Raises:
        LowbitError: a tensor is missing, has the wrong shape, or points outside the weight.
    """
    packed = read(tensors, grid, torch.float32, name)
    rows, columns = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    of_columns = torch.empty(columns, dtype=torch.int64)
    for s in packed.segments:
        codes[:, s.columns.long()] = unpack_bits(s.codes.T.contiguous(), s.bits, len(s.columns))
        of_columns[s.columns.long()] = s.bits
    widths = (
        of_columns[:: grid.group_size or 1].clone()
        if grid.per == "column"
        else of_columns[:1].expand(grid.books(rows, columns)).clone()
    )
    levels = torch.empty(len(widths), 1 << int(widths.max()))
    for s in packed.segments:
        books = s.columns.long() if grid.scales_with_inputs else widths == s.bits
        levels[books] = torch.cat(
            [s.levels, s.levels[:, -1:].expand(-1, levels.shape[1] - s.levels.shape[1])], 1
        ).float()
    return QTensor(
        grid, codes, CodebookParams(levels, widths), unpack_outliers(tensors, (rows, columns), name)
    )


def unpack_outliers(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str
) -> Outliers | None:
    """The inverse of `pack_outliers`. Raises LowbitError as `unpack`."""
    sparse = read_sparse(tensors, shape, name)
    if sparse is None:
        return None
    rows = torch.arange(shape[0]).repeat_interleave(sparse.starts.long().diff())
    return Outliers(rows * shape[1] + sparse.columns.long(), sparse.values.float())


def read(
    tensors: Mapping[str, Tensor], grid: Codebook, dtype: torch.dtype, name: str
) -> PackedColumns:
    """One weight as kernels take it, every index checked: what comes from a file is not trusted.

    Args:
        dtype: of the model, to which decoded weights are rounded.

    Raises:
        LowbitError: as `unpack`.
    """
    shape = _held(tensors, "weight_shape", name)
    rows, columns = (int(n) for n in shape)
    kinds = sorted(int(k.rsplit("_", 1)[1]) for k in tensors if k.startswith("weight_codes_"))
    if not kinds or (len(kinds) > 1) != ("weight_columns" in tensors):
        raise LowbitError(
            f"'{name}' has codes of {len(kinds)} widths, and weight_columns is "
            f"{'there' if len(kinds) < 2 else 'missing'}."
        )
    order = (
        tensors["weight_columns"].to(torch.int32)
        if len(kinds) > 1
        else torch.arange(columns, dtype=torch.int32, device=shape.device)
    )
    segments, at = [], 0
    for bits in kinds:
        levels = _held(tensors, f"weight_levels_{bits}", name)
        count = len(levels) if len(kinds) > 1 else columns
        segments.append(
            Segment(bits, order[at : at + count], tensors[f"weight_codes_{bits}"], levels)
        )
        at += count
    packed = PackedColumns(
        (rows, columns), tuple(segments), read_sparse(tensors, (rows, columns), name), dtype
    )
    check(packed, f"'{name}'", None if grid.scales_with_inputs else grid.books(rows, columns))
    return packed


def read_sparse(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> Sparse | None:
    """The outliers of one weight, checked; None without any. Raises LowbitError as `unpack`."""
    if "weight_outlier_starts" not in tensors:
        return None
    starts, columns, values = (
        _held(tensors, f"weight_outlier_{k}", name) for k in ("starts", "columns", "values")
    )
    sparse = Sparse(starts, columns.to(torch.int32), values)
    check_sparse(sparse, shape, f"'{name}'")
    return sparse


def _held(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise LowbitError(f"'{name}' has no tensor '{key}' in this artifact.")
    return tensors[key]


def tensor_bytes(grid: Codebook, rows: int, columns: int) -> int:
    """Bytes of one weight whose books all have the grid's width, headers apart."""
    return (
        4 * rows * packed_words(columns, grid.bits)
        + 2 * grid.books(rows, columns) * (1 << grid.bits)
        + 16
    )
