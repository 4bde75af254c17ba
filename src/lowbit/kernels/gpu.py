"""The product in Triton: for up to 64 tokens from the packed codes, beyond that through decoded
tiles.

Two kernels per width. One multiplies: a program takes some outputs and some columns, unpacks and
looks up a slice of the weight in registers and gives it to the tensor cores, which take no fewer
than 16 tokens. The other corrects the outliers, a program for each output. Both write their sums
apart, and one addition in a fixed order joins them: the result is the same every time.
"""

# Triton's language is not Python's, and what a kernel takes has no type in either.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, operator, arg-type"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid.packed import PackedColumns, Segment, Sparse
from . import reference

_FEW = 64  # tokens that one program holds
_OUTPUTS = 128  # per program
_GROUPS = 16  # of columns at a time; tensor cores take no fewer
_ENTRIES = 64  # outliers of a row at a time
_PROGRAMS = 512  # to aim at: a few for every multiprocessor of a large card


@triton.jit
def _multiply(
    x,
    columns,
    codes,
    levels,
    places,
    sums,
    tokens,
    outputs,
    inputs,
    count,
    rows,
    share,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORK: tl.constexpr,
):
    """sums[split, token, output] for this program's outputs and its ``share`` of the groups; x is
    (tokens, inputs).
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.arange(0, TOKENS)
    first = tl.program_id(1) * share
    # One program of each share writes down where its columns are.
    noted = tl.where(tl.program_id(0) == 0, count, 0)
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for start in range(first, first + share, GROUPS):
        group = (start + tl.arange(0, GROUPS)).to(tl.int64)
        for word in tl.static_range(WORDS):
            here = _words(codes, group * WORDS + word, output, outputs, rows)
            after = here
            if (32 * word + 32) % BITS != 0:
                after = _words(codes, group * WORDS + word + 1, output, outputs, rows)
            for code in tl.static_range(
                (32 * word + BITS - 1) // BITS, (32 * word + 31) // BITS + 1
            ):
                index = here >> (code * BITS - 32 * word)
                if code * BITS - 32 * word + BITS > 32:
                    index = index | (after << (32 * word + 32 - code * BITS))
                column = group * CODES + code
                there = column < count
                channel = tl.load(columns + column, mask=there, other=0)
                tl.store(places + channel, column.to(tl.int32), mask=column < noted)
                at = column[:, None] * (1 << BITS) + (index & ((1 << BITS) - 1)).to(tl.int64)
                w = tl.load(levels + at, mask=there[:, None], other=0.0).to(WORK)
                some = tl.load(
                    x + token[:, None] * inputs + channel[None, :],
                    mask=(token < tokens)[:, None] & there[None, :],
                    other=0.0,
                )
                total = tl.dot(some.to(WORK), w, total, input_precision="ieee")
    to = (
        sums + (tl.program_id(1) * tokens + token[:, None]).to(tl.int64) * outputs + output[None, :]
    )
    tl.store(to, total, mask=(token < tokens)[:, None] & (output < outputs)[None, :])


@triton.jit
def _words(codes, row, output, outputs, rows):
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    return tl.load(codes + row[:, None] * outputs + output[None, :], mask=mask, other=0).to(
        tl.uint32, bitcast=True
    )


@triton.jit
def _correct(
    x,
    codes,
    levels,
    columns,
    places,
    starts,
    channels,
    values,
    sums,
    tokens,
    outputs,
    inputs,
    count,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """sums[token, output]: what the outliers in the columns of one width add to the output of this
    program.
    """
    output = tl.program_id(0)
    token = tl.arange(0, TOKENS)
    last = tl.load(starts + output + 1)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(tl.load(starts + output), last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        channel = tl.load(channels + entry, mask=entry < last, other=0)
        column = tl.load(places + channel)
        column = tl.where(column < count, column, 0).to(tl.int64)
        # A channel of another width has a place in its own columns.
        there = (entry < last) & (tl.load(columns + column) == channel)
        bit = column * BITS
        word = codes + bit // 32 * outputs + output
        shift = (bit % 32).to(tl.uint32)
        index = tl.load(word, mask=there, other=0).to(tl.uint32, bitcast=True) >> shift
        if 32 % BITS != 0:
            over = there & (shift + BITS > 32)
            after = tl.load(word + outputs, mask=over, other=0).to(tl.uint32, bitcast=True)
            index = index | tl.where(over, after << ((32 - shift) & 31), 0)
        level = tl.load(
            levels + column * (1 << BITS) + (index & ((1 << BITS) - 1)).to(tl.int64),
            mask=there,
            other=0.0,
        )
        value = tl.load(values + entry, mask=there, other=0.0)
        change = value.to(tl.float32) - level.to(tl.float32)
        some = tl.load(
            x + token[:, None] * inputs + channel[None, :],
            mask=(token < tokens)[:, None] & there[None, :],
            other=0.0,
        )
        total += tl.sum(some.to(tl.float32) * change[None, :], axis=1)
    tl.store(sums + token.to(tl.int64) * outputs + output, total, mask=token < tokens)


def product(x: Tensor, packed: PackedColumns) -> Tensor:
    """x W^T: (tokens, in) -> (tokens, out), both float32, bfloat16 or float16 on the device of the
    weight.
    """
    if not 0 < len(x) <= _FEW:
        return reference.product(x, packed)
    x = x.contiguous()
    splits = [_splits(s, packed.shape[0]) for s in packed.segments]
    dense = sum(splits)
    slices = dense + (len(splits) if packed.sparse is not None else 0)
    sums = torch.empty(slices, len(x), packed.shape[0], device=x.device)
    # Of each channel among the columns of its width.
    places = torch.empty(packed.shape[1], dtype=torch.int32, device=x.device)
    for segment, levels, part in zip(
        packed.segments, packed.rounded, torch.split(sums[:dense], splits), strict=True
    ):
        _launch_multiply(x, packed, segment, levels, places, part)
    if packed.sparse is not None and packed.kept is not None:
        of_segments = zip(packed.segments, packed.rounded, sums[dense:], strict=True)
        for segment, levels, part in of_segments:
            _launch_correct(x, packed.sparse, packed.kept, segment, levels, places, part)
    return sums.sum(0).to(x.dtype)


def _group_columns(segment: Segment) -> int:
    """Columns whose codes fill whole words."""
    return 32 // (segment.bits & -segment.bits)


def _blocks(segment: Segment) -> int:
    return -(-segment.columns.numel() // (_group_columns(segment) * _GROUPS))


def _splits(segment: Segment, outputs: int) -> int:
    """Into how many shares the columns go, so that there are enough programs."""
    return max(1, min(_PROGRAMS // -(-outputs // _OUTPUTS), _blocks(segment)))


def _work(x: Tensor, packed: PackedColumns) -> Any:
    """The type to multiply in: x's own if it holds the weight as it is. The interpreter cannot
    multiply bfloat16.
    """
    same = x.dtype == packed.dtype and (x.is_cuda or x.dtype != torch.bfloat16)
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(
        x.dtype if same else torch.float32, tl.float32
    )


def _launch_multiply(
    x: Tensor, packed: PackedColumns, segment: Segment, levels: Tensor, places: Tensor, sums: Tensor
) -> None:
    outputs, inputs = packed.shape
    share = -(-_blocks(segment) // len(sums)) * _GROUPS
    # Triton launches where the current device is, whatever the tensors' is.
    with torch.cuda.device_of(x):
        _multiply[(-(-outputs // _OUTPUTS), len(sums))](
            x,
            segment.columns,
            segment.codes,
            levels,
            places,
            sums,
            len(x),
            outputs,
            inputs,
            segment.columns.numel(),
            len(segment.codes),
            share,
            BITS=segment.bits,
            WORDS=segment.bits // (segment.bits & -segment.bits),
            CODES=_group_columns(segment),
            TOKENS=max(16, triton.next_power_of_2(len(x))),
            OUTPUTS=_OUTPUTS,
            GROUPS=_GROUPS,
            WORK=_work(x, packed),
        )


def _launch_correct(
    x: Tensor,
    sparse: Sparse,
    values: Tensor,
    segment: Segment,
    levels: Tensor,
    places: Tensor,
    sums: Tensor,
) -> None:
    outputs, inputs = sums.shape[1], x.shape[1]
    with torch.cuda.device_of(x):
        _correct[(outputs,)](
            x,
            segment.codes,
            levels,
            segment.columns,
            places,
            sparse.starts,
            sparse.columns,
            values,
            sums,
            len(x),
            outputs,
            inputs,
            segment.columns.numel(),
            BITS=segment.bits,
            TOKENS=triton.next_power_of_2(len(x)),
            ENTRIES=_ENTRIES,
        )
