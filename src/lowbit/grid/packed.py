"""A weight on codebooks of its columns as it lies on disk and in a loaded model: packed, columns
sorted by width, outliers apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LowbitError
from .bits import packed_words

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segment:
    """The columns of one width.

    Attributes:
        bits: of their codes, 1 to 8.
        columns: (n,) int32, the input channel of each.
        codes: (ceil(n * bits / 32), out) int32: per output a dense little-endian bit stream over
            the n columns, code i in bits [i * bits, i * bits + bits). Outputs are contiguous:
            neighbouring lanes take neighbouring outputs.
        levels: (n, 2**bits) float16, ascending.
    """

    bits: int
    columns: Tensor
    codes: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Sparse:
    """Weights kept apart, by output row (CSR). They replace what the codes say, they are not added
    to it.

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
        dtype: to which levels and outliers are rounded when they are decoded, that of the
            checkpoint.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    sparse: Sparse | None
    dtype: torch.dtype

    @functools.cached_property
    def rounded(self) -> tuple[Tensor, ...]:
        """The levels of each segment in ``dtype``; made once, as most weights are multiplied again
        and again.
        """
        return tuple(s.levels.to(self.dtype) for s in self.segments)

    @functools.cached_property
    def kept(self) -> Tensor | None:
        """The values of outliers in ``dtype``."""
        return None if self.sparse is None else self.sparse.values.to(self.dtype)


def check(packed: PackedColumns, name: str = "a packed weight", books: int | None = None) -> None:
    """Refuse a weight that the kernels could not read: they follow its indices without looking.
    Once, when it is loaded.

    Args:
        name: what to call it in the error.
        books: how many codebooks it has, if not one for every column.

    Raises:
        LowbitError: what is wrong: a shape, dtype, device or layout, columns that are not a
            permutation, an index that is out of range, rows of outliers that do not follow one
            another, levels that do not ascend.
    """
    try:
        _check(packed, books)
    except _DamageError as e:
        raise LowbitError(
            f"{name} is damaged: {e}. Make its artifact again, or download it again."
        ) from e


def check_sparse(sparse: Sparse, shape: tuple[int, int], name: str) -> None:
    """Refuse outliers that do not fit an (out, in) weight. Raises LowbitError as `check`."""
    try:
        _check_sparse(sparse, *shape)
    except _DamageError as e:
        raise LowbitError(
            f"{name} is damaged: {e}. Make its artifact again, or download it again."
        ) from e


class _DamageError(Exception):
    pass


def _check(packed: PackedColumns, books: int | None) -> None:
    out, inputs = packed.shape
    _demand(out > 0 and inputs > 0, f"its shape is {out} x {inputs}")
    _demand(packed.dtype in DTYPES, f"its dtype is {packed.dtype}")
    widths = [s.bits for s in packed.segments]
    _demand(
        widths == sorted(set(widths)) and bool(widths),
        f"its segments have the widths {widths}, which must be some and rise",
    )
    for segment in packed.segments:
        _check_segment(segment, out, books)
    device = packed.segments[0].codes.device
    _demand(
        all(t.device == device and t.is_contiguous() for t in _tensors(packed)),
        "its tensors are not contiguous on one device",
    )
    columns = torch.cat([s.columns for s in packed.segments]).sort().values
    everyone = torch.arange(inputs, dtype=torch.int32, device=device)
    _demand(
        torch.equal(columns, everyone),
        f"the columns of its segments are not a permutation of the {inputs} inputs",
    )
    if packed.sparse is not None:
        _check_sparse(packed.sparse, out, inputs)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _DamageError(otherwise)


def _tensors(packed: PackedColumns) -> list[Tensor]:
    parts = [t for s in packed.segments for t in (s.columns, s.codes, s.levels)]
    if packed.sparse is not None:
        parts += [packed.sparse.starts, packed.sparse.columns, packed.sparse.values]
    return parts


def _has(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    _demand(
        tuple(t.shape) == shape and t.dtype == dtype,
        f"{what} are {tuple(t.shape)} {t.dtype}, not {shape} {dtype}",
    )


def _check_segment(segment: Segment, out: int, books: int | None) -> None:
    bits, n = segment.bits, segment.columns.numel()
    _demand(1 <= bits <= 8 and n > 0, f"a segment has {n} columns of {bits} bits")
    _has(segment.columns, (n,), torch.int32, f"the {bits}-bit columns")
    _has(segment.codes, (packed_words(n, bits), out), torch.int32, f"the {bits}-bit codes")
    _has(segment.levels, (books or n, 2**bits), torch.float16, f"the {bits}-bit levels")
    levels = segment.levels.float()
    fine = bool(levels.isfinite().all()) and bool((levels.diff(dim=1) >= 0).all())
    _demand(fine, f"the {bits}-bit levels are not finite and ascending")


def _check_sparse(sparse: Sparse, out: int, inputs: int) -> None:
    n = sparse.columns.numel()
    _has(sparse.starts, (out + 1,), torch.int32, "the row starts of its outliers")
    _has(sparse.columns, (n,), torch.int32, "the columns of its outliers")
    _has(sparse.values, (n,), torch.float16, "the values of its outliers")
    counts = sparse.starts.long().diff()
    whole = int(sparse.starts[0]) == 0 and int(sparse.starts[-1]) == n and bool((counts >= 0).all())
    _demand(whole, f"the row starts of its outliers do not rise from 0 to {n}")
    inside = not n or (int(sparse.columns.min()) >= 0 and int(sparse.columns.max()) < inputs)
    _demand(inside, f"a column of its outliers is not one of the {inputs} inputs")
    rows = torch.repeat_interleave(torch.arange(out, device=counts.device), counts)
    _demand(
        bool(((rows * inputs + sparse.columns).diff() > 0).all()),
        "the columns of its outliers do not ascend within a row",
    )
    _demand(bool(sparse.values.isfinite().all()), "its outliers are not finite")
