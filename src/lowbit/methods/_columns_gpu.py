"""The column loop on uniform levels in Triton: a program holds some rows of a stretch of columns in
registers, codes them one by one and makes up for their errors there.
"""

# Triton's language is not Python's, and what a kernel takes has no type in either.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, operator, arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._steps import Steps

MOST = 128  # columns of a stretch
_ROWS = 16  # of a program, which is a single warp: what a column needs of it crosses no barrier
_STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _held(v, STORED: tl.constexpr):
    """float32 v as a loader sees it that holds weights in ``STORED``, float32 again."""
    if tl.bfloat16 == STORED:  # in integers: Triton's interpreter would cut digits off
        bits = v.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
    return v.to(STORED).to(tl.float32)


@triton.jit(do_not_specialize=["start", "until", "stop"])
def _code(
    rest,
    factor,
    scale,
    zero,
    group,
    codes,
    errors,
    columns,
    rows,
    start,
    until,
    stop,
    top,
    STORED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes columns start ... until - 1 and makes up for their errors in those up to stop.

    rest, codes, errors: (columns, rows), errors from column ``start`` on; factor: (columns,
    columns); scale, zero: (groups, rows); group: of columns start, start + 1, ...
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    column = start + tl.arange(0, COLUMNS)
    at = rest + column.to(tl.int64)[:, None] * rows + row[None, :]
    inside = (column < stop)[:, None] & there[None, :]
    held = tl.load(at, mask=inside, other=0.0)
    for c in range(start, until):
        now = tl.sum(tl.where((column == c)[:, None], held, 0.0), axis=0)
        levels = tl.load(group + c - start) * rows + row
        s = tl.load(scale + levels, mask=there, other=1.0)
        z = tl.load(zero + levels, mask=there, other=0.0)
        # To nearest, ties to even: there are no fractions beyond 2^23.
        nearest = (tl.div_rn(now, s) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(nearest + z, 0.0), top)
        lost = now - _held((code - z) * s, STORED)
        error = tl.div_rn(lost, tl.load(factor + tl.cast(c, tl.int64) * columns + c))
        to = tl.cast(c, tl.int64) * rows + row
        tl.store(codes + to, code.to(tl.uint8), mask=there)
        tl.store(errors + to - tl.cast(start, tl.int64) * rows, error, mask=there)
        left = (column > c) & (column < stop)
        by = tl.load(factor + tl.cast(c, tl.int64) * columns + column, mask=left, other=0.0)
        held = tl.where(left[:, None], held - by[:, None] * error[None, :], held)
    tl.store(at, held, mask=inside)


def code_uniform(
    rest: Tensor,
    factor: Tensor,
    steps: Steps,
    codes: Tensor,
    errors: Tensor,
    stretch: tuple[int, int, int],
    stored: torch.dtype,
) -> None:
    """See `_columns.CodeUniform`; of at most `MOST` columns."""
    start, until, stop = stretch
    # Triton launches where the current device is, whatever the tensors' is.
    with torch.cuda.device_of(rest):
        _code[(triton.cdiv(rest.shape[1], _ROWS),)](
            rest,
            factor,
            steps.scale,
            steps.zero,
            steps.group,
            codes,
            errors,
            *rest.shape,
            start,
            until,
            stop,
            float(steps.top),
            STORED=_STORED[stored],
            COLUMNS=triton.next_power_of_2(stop - start),
            ROWS=_ROWS,
            num_warps=1,
        )


def try_out(device: torch.device) -> None:
    """Launch the kernel once."""
    rest, row = torch.zeros(2, 1, device=device), torch.ones(1, 1, device=device)
    group = torch.zeros(2, dtype=torch.int32, device=device)
    codes = torch.empty(2, 1, dtype=torch.uint8, device=device)
    steps = Steps(row, row, group, 3)
    factor = torch.eye(2, device=device)
    code_uniform(rest, factor, steps, codes, rest.clone(), (0, 2, 2), torch.float32)
