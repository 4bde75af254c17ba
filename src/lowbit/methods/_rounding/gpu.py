"""Soft rounding in Triton: a program holds some rows, a stretch of their columns at a time; sums
have one order, so do results.
"""

# Triton's language is not Python's, and what a kernel takes has no type in either.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, operator, arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._adam import BETAS, EPSILON, Adam
from .reference import FROZEN, SoftRows

# Weights that a program of 128 threads holds at a time. Of four to a thread every load and store
# has one layout; of more those of bytes and of floats differ, and each crosses shared memory.
_TILE = 512


@triton.jit
def _sigmoid(nu):
    return 1.0 / (1.0 + tl.exp(-nu))


@triton.jit
def _rectified(sigma):
    return tl.minimum(tl.maximum(1.2 * sigma - 0.1, 0.0), 1.0)


@triton.jit
def _weights(
    nu,
    code,
    way,
    zero,
    scale,
    offset,
    out,
    rows,
    length,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    z = tl.load(zero + row, mask=there, other=0.0)[:, None]
    s = tl.load(scale + row, mask=there, other=0.0)[:, None]
    o = tl.zeros((ROWS, 1), dtype=tl.float32)
    if SHIFTED:
        o = tl.load(offset + row, mask=there, other=0.0)[:, None]
    for start in range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row.to(tl.int64)[:, None] * length + column[None, :]
        mask = there[:, None] & (column < length)[None, :]
        h = _rectified(_sigmoid(tl.load(nu + at, mask=mask, other=0.0)))
        c = tl.load(code + at, mask=mask, other=0).to(tl.float32)
        w = tl.load(way + at, mask=mask, other=0).to(tl.float32)
        tl.store(out + at, (((c - z) + w * h) * s - o).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _any_of_four(chosen, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where one of four neighbours is chosen that a thread reads and writes at once."""
    if COLUMNS < 4:
        return chosen
    fours = tl.reshape(chosen.to(tl.int32), (ROWS, COLUMNS // 4, 4))
    one = tl.broadcast_to(tl.max(fours, axis=2)[:, :, None], (ROWS, COLUMNS // 4, 4))
    return tl.max_constancy(tl.reshape(one, (ROWS, COLUMNS)) != 0, [1, 4])


@triton.jit
def _descend(
    gradient,
    nu,
    code,
    way,
    zero,
    scale,
    first,
    second,
    sums,
    rows,
    length,
    size,
    root,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    FAR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    z = tl.load(zero + row, mask=there, other=0.0)[:, None]
    s = tl.load(scale + row, mask=there, other=0.0)[:, None]
    by_scale = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    by_offset = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, length, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row.to(tl.int64)[:, None] * length + column[None, :]
        mask = there[:, None] & (column < length)[None, :]
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        n = tl.load(nu + at, mask=mask, other=0.0)
        sigma = _sigmoid(n)
        h = _rectified(sigma)
        c = tl.load(code + at, mask=mask, other=0).to(tl.float32)
        w = tl.load(way + at, mask=mask, other=0).to(tl.float32)
        by_scale += g * ((c - z) + w * h)
        by_offset += g
        by_nu = tl.where((h > 0.0) & (h < 1.0), g * s * w * (1.2 * sigma * (1.0 - sigma)), 0.0)
        # A frozen weight's moments are zero and stay so: of most weights, in most phases, they are
        # neither read nor written.
        free = mask & _any_of_four(mask & (tl.abs(n) < FAR), ROWS, COLUMNS)
        m = tl.load(first + at, mask=free, other=0.0)
        m = m + (by_nu - m) * (1.0 - BETA1)
        v = tl.load(second + at, mask=free, other=0.0) * BETA2 + by_nu * by_nu * (1.0 - BETA2)
        tl.store(first + at, m, mask=free)
        tl.store(second + at, v, mask=free)
        tl.store(nu + at, n - size * m / (tl.sqrt(v) * root + EPS), mask=free)
    tl.store(sums + 2 * row, tl.sum(by_scale, axis=1), mask=there)
    tl.store(sums + 2 * row + 1, tl.sum(by_offset, axis=1), mask=there)


def _tile(rows: int, length: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and the number of programs."""
    columns = min(triton.next_power_of_2(length), _TILE)
    held = max(1, _TILE // columns)
    return held, columns, -(-rows // held)


def weights(soft: SoftRows, out: Tensor) -> None:
    held, columns, programs = _tile(*soft.nu.shape)
    # Triton launches where the current device is, whatever the tensors' is.
    with torch.cuda.device_of(soft.nu):
        _weights[(programs,)](
            *soft[:5],
            soft.zero if soft.offset is None else soft.offset,
            out,
            *soft.nu.shape,
            SHIFTED=soft.offset is not None,
            ROWS=held,
            COLUMNS=columns,
        )


def descend(
    gradient: Tensor, soft: SoftRows, first: Tensor, second: Tensor, adam: Adam, sums: Tensor
) -> None:
    held, columns, programs = _tile(*soft.nu.shape)
    with torch.cuda.device_of(soft.nu):
        _descend[(programs,)](
            gradient.contiguous(),
            *soft[:5],
            first,
            second,
            sums,
            *soft.nu.shape,
            adam.size,
            adam.root,
            BETA1=BETAS[0],
            BETA2=BETAS[1],
            EPS=EPSILON,
            FAR=FROZEN,
            ROWS=held,
            COLUMNS=columns,
        )


def try_out(device: torch.device) -> None:
    """Launch every kernel once."""
    nu = torch.zeros(1, 16, device=device)
    row = torch.ones(1, 1, device=device)
    soft = SoftRows(nu, nu.to(torch.uint8), nu.to(torch.int8), row, row)
    weights(soft, torch.empty_like(nu))
    sums = torch.empty(1, 2, device=device)
    descend(nu, soft, nu.clone(), nu.clone(), Adam(1e-3, 1), sums)
