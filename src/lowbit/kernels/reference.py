"""What a weight on codebooks of its columns means, in plain torch on any device. The other backends are tested against it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid.bits import packed_words, unpack
from ..grid.packed import PackedColumns, Segment, Sparse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 1 << 21  # weights decoded at a time


def decode(packed: PackedColumns, rows: slice = slice(None)) -> Tensor:
    """The weights of some outputs: levels looked up, outliers in their place, all rounded to ``packed.dtype``.

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
        w.index_copy_(1, segment.columns.long(), _looked_up(segment, slice(first, last), packed.dtype))
    if packed.sparse is not None:
        starts = packed.sparse.starts[first : last + 1].long()
        entries = slice(int(starts[0]), int(starts[-1]))
        of_entry = torch.repeat_interleave(torch.arange(len(w), device=w.device), starts.diff())
        w[of_entry, packed.sparse.columns[entries].long()] = packed.sparse.values[entries].to(packed.dtype).float()
    return w


def _looked_up(segment: Segment, rows: slice, dtype: torch.dtype) -> Tensor:
    """(rows, n) float32 for the n columns of one width."""
    n, entries = segment.levels.shape
    codes = unpack(segment.codes[:, rows].T, segment.bits, n)  # (rows, n) uint8
    at = codes.int() + torch.arange(0, n * entries, entries, dtype=torch.int32, device=codes.device)
    return segment.levels.to(dtype).float().flatten().index_select(0, at.flatten()).view(at.shape)


def tiles(packed: PackedColumns, weights: int = _TILE) -> Iterator[slice]:
    """Consecutive outputs that have about so many weights together."""
    step = max(1, weights // packed.shape[1])
    return (slice(at, min(at + step, packed.shape[0])) for at in range(0, packed.shape[0], step))


def product(x: Tensor, packed: PackedColumns) -> Tensor:
    """x W^T, some outputs at a time.

    In float32; on an accelerator in the dtype that x and the weight share, if they do: that loses nothing of the weight.

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
    """y W, some outputs at a time: what a gradient needs. (tokens, out) -> (tokens, in) in y's dtype."""
    x = torch.zeros(y.shape[0], packed.shape[1], device=y.device)
    for rows in tiles(packed):
        x += y[:, rows].float() @ decode(packed, rows)
    return x.to(y.dtype)


def check(packed: PackedColumns) -> None:
    """Refuse a weight that the kernels could not read: they follow its indices without looking. Once, when it is loaded.

    Raises:
        LowbitError: what is wrong: a shape, dtype, device or layout, columns that are not a permutation, an index that is out of
            range, rows of outliers that do not follow one another, levels that do not ascend.
    """
    out, inputs = packed.shape
    _demand(out > 0 and inputs > 0, f"its shape is {out} x {inputs}")
    _demand(packed.dtype in DTYPES, f"its dtype is {packed.dtype}")
    widths = [s.bits for s in packed.segments]
    _demand(widths == sorted(set(widths)) and bool(widths), f"its segments have the widths {widths}, which must be some and rise")
    for segment in packed.segments:
        _check_segment(segment, out)
    device = packed.segments[0].codes.device
    _demand(all(t.device == device and t.is_contiguous() for t in _tensors(packed)), "its tensors are not contiguous on one device")
    columns = torch.cat([s.columns for s in packed.segments]).sort().values
    everyone = torch.arange(inputs, dtype=torch.int32, device=device)
    _demand(torch.equal(columns, everyone), f"the columns of its segments are not a permutation of the {inputs} inputs")
    if packed.sparse is not None:
        _check_sparse(packed.sparse, out, inputs)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise LowbitError(f"a packed weight is damaged: {otherwise}. Make its artifact again, or download it again.")


def _tensors(packed: PackedColumns) -> list[Tensor]:
    parts = [t for s in packed.segments for t in (s.columns, s.codes, s.levels)]
    return parts if packed.sparse is None else [*parts, packed.sparse.starts, packed.sparse.columns, packed.sparse.values]


def _has(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    _demand(tuple(t.shape) == shape and t.dtype == dtype, f"{what} are {tuple(t.shape)} {t.dtype}, not {shape} {dtype}")


def _check_segment(segment: Segment, out: int) -> None:
    bits, n = segment.bits, segment.columns.numel()
    _demand(1 <= bits <= 8 and n > 0, f"a segment has {n} columns of {bits} bits")
    _has(segment.columns, (n,), torch.int32, f"the {bits}-bit columns")
    _has(segment.codes, (packed_words(n, bits), out), torch.int32, f"the {bits}-bit codes")
    _has(segment.levels, (n, 2**bits), torch.float16, f"the {bits}-bit levels")
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
    _demand(bool(((rows * inputs + sparse.columns).diff() > 0).all()), "the columns of its outliers do not ascend within a row")
    _demand(bool(sparse.values.isfinite().all()), "its outliers are not finite")
