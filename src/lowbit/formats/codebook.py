"""Weights on codebooks as tensors: the layout of `lowbit.grid.packed` under these local names.

weight_shape            int64 [out, in]
weight_columns          uint16 (int32 beyond 65536 inputs) (in,): the input channel of each stored
column, columns of one width
                        together, by rising width; missing if all columns have the same width
weight_codes_B          int32 (ceil(n * B / 32), out), the codes of the n columns of B bits
weight_levels_B         float16 (books, 2**B), ascending
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Codebook, CodebookParams, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import packed_words
from ..grid.bits import unpack as unpack_bits
from ..grid.packed import PackedColumns, Segment, Sparse, check
from . import outliers
from .layout import Buffers, Layout


def pack(q: QTensor[Codebook, CodebookParams], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one weight by their local names.

    Args:
        dtype: has no effect: levels are float16.

    Raises:
        LowbitError: a level would change when stored.
    """
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
        out["weight_columns"] = outliers.index(order, columns)
    for bits in kinds:
        out[f"weight_codes_{bits}"] = pack_bits(
            q.codes[:, of_columns == bits].contiguous(), bits
        ).T.contiguous()
        out[f"weight_levels_{bits}"] = levels[widths == bits, : 1 << bits].contiguous()
    return out


def column_widths(q: QTensor[Codebook, CodebookParams]) -> Tensor:
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


def unpack(
    tensors: Mapping[str, Tensor], grid: Codebook, name: str = "weight"
) -> QTensor[Codebook, CodebookParams]:
    """The inverse of `pack`.

    Args:
        tensors: local names -> tensors of one linear. name: its full name, for errors.

    Raises:
        LowbitError: a tensor is missing, has the wrong shape, or points outside the weight.
    """
    packed = _read(tensors, grid, torch.float32, name, None)
    rows, columns = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    of_columns = torch.empty(columns, dtype=torch.int64)
    for s in packed.segments:
        codes[:, s.columns.long()] = unpack_bits(s.codes.T.contiguous(), s.bits, len(s.columns))
        of_columns[s.columns.long()] = s.bits
    widths = of_columns[:: grid.group_size or 1].clone()
    if grid.per != "column":
        widths = of_columns[:1].expand(grid.books(rows, columns)).clone()
    levels = torch.empty(len(widths), 1 << int(widths.max()))
    for s in packed.segments:
        books = s.columns.long() if grid.scales_with_inputs else widths == s.bits
        levels[books] = torch.cat(
            [s.levels, s.levels[:, -1:].expand(-1, levels.shape[1] - s.levels.shape[1])], 1
        ).float()
    return QTensor(grid, codes, CodebookParams(levels, widths))


def read(
    tensors: Mapping[str, Tensor], grid: Codebook, dtype: torch.dtype, name: str
) -> PackedColumns:
    """One weight as kernels take it, outliers included, every index checked: what comes from a file
    is not trusted.

    Args:
        dtype: of the model, to which decoded weights are rounded.

    Raises:
        LowbitError: as `unpack`.
    """
    rows, columns = _shape(tensors, name)
    sparse = outliers.read(tensors, (rows, columns), name)
    return _read(tensors, grid, dtype, name, sparse)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    rows, columns = (int(n) for n in outliers.held(tensors, "weight_shape", name))
    return rows, columns


def _read(
    tensors: Mapping[str, Tensor],
    grid: Codebook,
    dtype: torch.dtype,
    name: str,
    sparse: Sparse | None,
) -> PackedColumns:
    rows, columns = _shape(tensors, name)
    device = tensors["weight_shape"].device
    kinds = sorted(int(k.rsplit("_", 1)[1]) for k in tensors if k.startswith("weight_codes_"))
    if not kinds or (len(kinds) > 1) != ("weight_columns" in tensors):
        raise LowbitError(
            f"'{name}' has codes of {len(kinds)} widths, and weight_columns is "
            f"{'there' if len(kinds) < 2 else 'missing'}."
        )
    order = torch.arange(columns, dtype=torch.int32, device=device)
    if len(kinds) > 1:
        order = tensors["weight_columns"].to(torch.int32)
    segments, at = [], 0
    for bits in kinds:
        levels = outliers.held(tensors, f"weight_levels_{bits}", name)
        count = len(levels) if len(kinds) > 1 else columns
        segments.append(
            Segment(bits, order[at : at + count], tensors[f"weight_codes_{bits}"], levels)
        )
        at += count
    packed = PackedColumns((rows, columns), tuple(segments), sparse, dtype)
    check(packed, f"'{name}'", None if grid.scales_with_inputs else grid.books(rows, columns))
    return packed


def tensor_bytes(grid: Codebook, rows: int, columns: int, scale_bytes: int = 2) -> int:
    """Bytes of one weight whose books all have the grid's width, headers apart."""
    return (
        4 * rows * packed_words(columns, grid.bits)
        + 2 * grid.books(rows, columns) * (1 << grid.bits)
        + 16
    )


def _buffers(
    grid: Codebook, rows: int, width: int, stored: torch.dtype, columns: Mapping[int, int]
) -> Buffers:
    held: Buffers = {"weight_shape": ((2,), torch.int64)}
    mixed = len(columns) > 1
    if mixed:
        held["weight_columns"] = ((width,), outliers.index_dtype(width))
    for bits, count in columns.items():
        books = count if mixed else grid.books(rows, width)
        held[f"weight_codes_{bits}"] = ((packed_words(count, bits), rows), torch.int32)
        held[f"weight_levels_{bits}"] = ((books, 1 << bits), torch.float16)
    return held


def _counts(q: QTensor[Codebook, CodebookParams]) -> dict[str, Any]:
    widths = column_widths(q)
    return {"columns": {str(b): int((widths == b).sum()) for b in sorted(set(widths.tolist()))}}


def _entry(grid: Codebook, columns: Mapping[Any, int]) -> dict[str, Any]:
    return {"codebook": asdict(grid), "columns": {str(b): n for b, n in columns.items()}}


def _read_entry(entry: Mapping[str, Any]) -> Codebook | None:
    return Codebook(**entry["codebook"]) if "codebook" in entry else None


LAYOUT = Layout(
    kind="codebooks",
    pack=pack,
    unpack=unpack,
    tensor_bytes=tensor_bytes,
    buffers=_buffers,
    entry=_entry,
    read_entry=_read_entry,
    counts=_counts,
    stays_packed=lambda grid: grid.scales_with_inputs,
)
