"""Hardening in Triton: the weight at a rank is found digit by digit, without a sort, a temporary of
the weights' size or a wait for the device.

|h(nu) - 1/2| grows with |nu|, and the bits of floats that are not negative lie in their order. So
each pass counts one digit of |nu| among the weights whose digits before it are those of the rank.
Counts of a program are added up in its registers: however many weights are frozen, none waits for
another.
"""

# Triton's language is not Python's, and what a kernel takes has no type in either.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, operator, arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import FROZEN, rectified

_DIGIT = 8  # bits
_TILE = 2048  # weights that a program holds at a time
_PROGRAMS = 1024  # to aim at: a few for every multiprocessor of a large card


@triton.jit
def _count(
    nu,
    known,
    counts,
    length,
    share,
    SHIFT: tl.constexpr,
    DIGIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """counts[row, part, digit] of this program's ``share`` of a row's weights, of those whose
    higher bits are ``known``.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    above = tl.load(known + row)
    total = tl.zeros((1 << DIGIT,), dtype=tl.int32)
    for start in range(part * share, part * share + share, TILE):
        column = start + tl.arange(0, TILE)
        there = column < length
        at = nu + row.to(tl.int64) * length + column
        bits = tl.load(at, mask=there, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if SHIFT + DIGIT < 32:
            there = there & ((bits >> (SHIFT + DIGIT)) == above)
        total += tl.histogram((bits >> SHIFT) & ((1 << DIGIT) - 1), 1 << DIGIT, mask=there)
    to = (row * tl.num_programs(1) + part) * (1 << DIGIT) + tl.arange(0, 1 << DIGIT)
    tl.store(counts + to, total)


@triton.jit
def _freeze(nu, most, length, FAR: tl.constexpr, TILE: tl.constexpr):
    """Freezes what is farther from zero than its row's ``most``."""
    row = tl.program_id(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = nu + row.to(tl.int64) * length + column
    value = tl.load(at, mask=column < length, other=0.0)
    far = tl.abs(value) > tl.load(most + row)
    tl.store(at, tl.where(value > 0, FAR, -FAR), mask=far & (column < length))


def harden(nu: Tensor, soft_share: float) -> None:
    rows, length = nu.shape
    most = _ranked(nu, int(soft_share * (length - 1)))
    # A weight whose h is clamped lies no nearer to the middle than a frozen one.
    most.masked_fill_(rectified(most) >= 1, float("inf"))
    # Triton launches where the current device is, whatever the tensors' is.
    with torch.cuda.device_of(nu):
        _freeze[(rows, triton.cdiv(length, _TILE))](nu, most, length, FAR=FROZEN, TILE=_TILE)


def _ranked(nu: Tensor, rank: int) -> Tensor:
    """(rows,) float32: the number of that rank, from 0 on, of the |nu| of each row."""
    rows, length = nu.shape
    parts = max(1, min(_PROGRAMS // rows, triton.cdiv(length, _TILE)))
    share = triton.cdiv(triton.cdiv(length, parts), _TILE) * _TILE
    counts = torch.empty(rows, parts, 1 << _DIGIT, dtype=torch.int32, device=nu.device)
    known = torch.zeros(rows, dtype=torch.int32, device=nu.device)
    left = torch.full((rows, 1), rank, dtype=torch.int64, device=nu.device)
    for shift in range(32 - _DIGIT, -1, -_DIGIT):
        with torch.cuda.device_of(nu):
            _count[(rows, parts)](
                nu, known, counts, length, share, SHIFT=shift, DIGIT=_DIGIT, TILE=_TILE
            )
        below = counts.sum(1).cumsum(1)  # (rows, digits) int64
        digit = (below <= left).sum(1, keepdim=True)
        left -= torch.where(digit > 0, below.gather(1, (digit - 1).clamp_(min=0)), 0)
        known = (known << _DIGIT) + digit[:, 0].to(torch.int32)
    return known.view(torch.float32)


def try_out(device: torch.device) -> None:
    """Launch every kernel once."""
    harden(torch.zeros(1, 16, device=device), 0.5)
