"""Sums by index in Triton: one pass over the numbers, whatever the number of sums; each is added up
in one order.
"""

# Triton's language is not Python's, and what a kernel takes has no type in either.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, operator, arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HELD = 2048  # partial sums of a program


@triton.jit
def _sums(
    index,
    values,
    out,
    length,
    count,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[row, i] of this program's row: every place of a tile has partial sums of its own."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, SUMS)
    total = tl.zeros((SUMS, COLUMNS), dtype=values.dtype.element_ty)
    for start in range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < length
        of = tl.load(index + row * length + column, mask=there, other=SUMS).to(tl.int32)
        value = tl.load(values + row * length + column, mask=there, other=0.0)
        total += tl.where(each[:, None] == of[None, :], value[None, :], 0.0)
    tl.store(out + row * count + each, tl.sum(total, axis=1), mask=each < count)


def sums_by(index: Tensor, values: Tensor, count: int) -> Tensor:
    """See `sums.sums_by`."""
    out = values.new_empty(len(values), count)
    width = triton.next_power_of_2(count)
    # Triton launches where the current device is, whatever the tensors' is.
    with torch.cuda.device_of(values):
        _sums[(len(values),)](
            index.contiguous(),
            values.contiguous(),
            out,
            values.shape[1],
            count,
            SUMS=width,
            COLUMNS=max(8, _HELD // width),
        )
    return out


def try_out(device: torch.device) -> None:
    """Launch the kernel once."""
    sums_by(torch.zeros(1, 4, dtype=torch.int64, device=device), torch.ones(1, 4, device=device), 2)
