"""The column loop: weights are coded one input column at a time, and each column's error is made up
for by the columns to come.

Shared by methods that solve argmin ||(W - Q) X||^2 greedily; what a column may be coded to is the
coder's business.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..grid.compiled import library, pointer, threads
from ..grid.triton_kernels import kernels
from ._steps import Steps as Steps

_SOURCE = Path(__file__).with_name("_columns.c")
_TILE = 32  # as in the source
_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOLVED = 512  # columns of the factor solved for at a time


class CodeUniform(Protocol):
    """Compiled code for columns on uniform levels."""

    def __call__(
        self,
        rest: Tensor,
        factor: Tensor,
        steps: Steps,
        codes: Tensor,
        errors: Tensor,
        stretch: tuple[int, int, int],
        stored: torch.dtype,
    ) -> None:
        """Code some columns in place, and make up for their errors in those that follow.

        Args:
            rest: (columns, rows) float32, the weights so far. factor: (columns, columns) float32.
            codes: (columns, rows) uint8, written. errors: (columns of the stretch, rows) float32,
                written: what was lost, over the factor's diagonal.
            stretch: (start, until, stop): columns from ``start`` to before ``until`` are coded,
                those up to ``stop`` compensated.
            stored: the dtype decoded weights are rounded to.
        """
        ...


class Coder(Protocol):
    """Codes single columns, and may choose their levels when it first sees them.

    Attributes:
        period: how many columns share levels: ``current`` is promised to be up to date for
            ``period`` columns from every multiple of ``period`` on. 1 for a coder that looks at no
            column but its own.
        uniform: whether `steps` gives levels, so that the loop can be compiled.
        stored: the dtype decoded weights are rounded to.
    """

    @property
    def period(self) -> int: ...

    @property
    def uniform(self) -> bool: ...

    @property
    def stored(self) -> torch.dtype: ...

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        """Code one column; called once for each, in ascending order.

        Args:
            column: its number in coding order.
            values: (rows,) the column with all earlier errors made up for.
            current: (rows, columns) the weights so far, not to be kept: coded columns as they were
                when coded, the others compensated (at a multiple of ``period``, fully so for the
                next ``period`` columns).

        Returns:
            (rows,) uint8 codes, and (rows,) the values a loader will see, in the dtype of
                ``values``.
        """
        ...

    def steps(self, start: int, stop: int, current: Tensor) -> tuple[Steps, int]:
        """Levels for the columns from ``start`` on, and the column before which they end, ``stop``
        at the latest. Called only where ``uniform`` holds.
        """
        ...


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper triangular U with U^T U = hessian^-1, or None if the matrix is not positive
    definite to working precision.

    Row c of U, divided by its diagonal element, says how the columns after c answer an error in
    column c once all before it are settled (GPTQ, section 3.3, step 3).

    Args:
        hessian: (columns, columns) symmetric, float64.
    """
    # With the order of columns reversed, the Cholesky factor of H itself is U^-1: no inverse has to
    # be formed and factored.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    noise = len(hessian) * torch.finfo(hessian.dtype).eps * hessian.diagonal().max()
    if int(failed) or not bool(lower.diagonal().square().min() > noise):
        return None
    upper = lower.flip(0, 1)
    del lower  # as large as the Hessian, which may be gigabytes
    # Column by column of the identity only the leading part of the triangle matters: a third of the
    # work of solving for all.
    factor = torch.zeros_like(upper)
    for start in range(0, len(upper), _SOLVED):
        stop = min(start + _SOLVED, len(upper))
        unit = torch.zeros(stop, stop - start, dtype=upper.dtype, device=upper.device)
        unit[start:].fill_diagonal_(1)
        factor[:stop, start:stop] = torch.linalg.solve_triangular(
            upper[:stop, :stop], unit, upper=True
        )
    return factor


def code_columns(weight: Tensor, factor: Tensor, coder: Coder, block_size: int) -> Tensor:
    """Code all columns from left to right (GPTQ, algorithm 1).

    Args:
        weight: (rows, columns) float; the arithmetic is done in its dtype. Rows are independent of
            each other.
        factor: (columns, columns) from `inverse_factor`, in the same dtype.
        block_size: columns whose errors reach the columns after them in one product. Changes speed
            and rounding noise only.

    Returns:
        (rows, columns) uint8 codes.
    """
    # (columns, rows): what a step reads and writes lies together. A copy, also of a single row.
    rest = weight.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(rest, dtype=torch.uint8)
    found = _compiled(rest, factor, coder)
    if found is not None:
        code_uniform, most = found
        factor = factor.contiguous()
        for start, stop in _spans(len(rest), coder.period, min(block_size, most)):
            errors = _coded_span(code_uniform, rest, factor, coder, codes, start, stop)
            rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        return codes.T.contiguous()
    diagonal = factor.diagonal()
    for start, stop in _spans(len(rest), coder.period, block_size):
        errors = torch.empty_like(rest[start:stop])
        for c in range(start, stop):
            codes[c], decoded = coder.code(c, rest[c], rest.T)
            torch.div(rest[c] - decoded, diagonal[c], out=errors[c - start])
            rest[c + 1 : stop].addr_(factor[c, c + 1 : stop], errors[c - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _compiled(rest: Tensor, factor: Tensor, coder: Coder) -> tuple[CodeUniform, int] | None:
    """Compiled code for these columns, and how many it takes at a time; None if there is none."""
    fits = rest.dtype == factor.dtype == torch.float32
    if not fits or not coder.uniform or coder.stored not in _STORED:
        return None
    if rest.device.type == "cpu":
        code = library(_SOURCE)
        return None if code is None else (functools.partial(_in_c, code), len(rest))
    module = kernels(f"{__package__}._columns_gpu", rest.device)
    return None if module is None else (module.code_uniform, module.MOST)


def _coded_span(
    code_uniform: CodeUniform,
    rest: Tensor,
    factor: Tensor,
    coder: Coder,
    codes: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    """Code some columns, as many at a time as their levels are known of. Returns their errors,
    (columns, rows).
    """
    errors = torch.empty_like(rest[start:stop])
    at = start
    while at < stop:
        steps, until = coder.steps(at, stop, rest.T)
        stretch = (at, until, stop)
        code_uniform(rest, factor, steps, codes, errors[at - start :], stretch, coder.stored)
        at = until
    return errors


def _in_c(
    code: ctypes.CDLL,
    rest: Tensor,
    factor: Tensor,
    steps: Steps,
    codes: Tensor,
    errors: Tensor,
    stretch: tuple[int, int, int],
    stored: torch.dtype,
) -> None:
    """`CodeUniform` in C, which keeps a tile of rows in the cache."""
    columns, rows = rest.shape
    start, until, stop = stretch

    def rows_from(first: int, last: int) -> None:
        scratch = torch.empty(stop - start, _TILE)
        code.code_uniform(
            *map(pointer, (rest, factor, steps.scale, steps.zero, steps.group, codes, errors)),
            *map(ctypes.c_int64, (columns, rows, first, last, start, until, stop, start)),
            ctypes.c_float(steps.top),
            ctypes.c_int(_STORED[stored]),
            pointer(scratch),
        )

    _in_threads(rows_from, rows, rows * (stop - start) * (until - start))


def _in_threads(work: Callable[[int, int], object], count: int, size: int) -> list[object]:
    """``work`` on (first, last) spans of ``count`` things, by as many threads as torch uses if
    ``size`` operations are worth it.
    """
    workers = threads() if size > 1 << 20 else 1
    step = max(1, -(-count // workers))
    spans = [(a, min(a + step, count)) for a in range(0, count, step)]
    if workers == 1:
        return [work(*s) for s in spans]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda s: work(*s), spans))


def least_range(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor | None:
    """Which of several ranges costs each group least when its weights are rounded to nearest, in
    sums of |error| ** 2.4.

    Args:
        weight: (groups, group) float32 on the CPU. scale, zero: (ranges, groups) float32.

    Returns:
        (groups,) int64, the first of the best; None where nothing can be compiled, or groups are
            beyond what it takes.
    """
    compiled = library(_SOURCE)
    if compiled is None:
        return None
    weight, scale, zero = weight.contiguous(), scale.contiguous(), zero.contiguous()
    best = torch.empty(len(weight), dtype=torch.int32)

    def search(first: int, last: int) -> object:
        tensors = map(pointer, (weight, scale, zero, best))
        sizes = map(ctypes.c_int64, (*weight.shape, first, last, len(scale)))
        return compiled.least_range(*tensors, *sizes, ctypes.c_float(top))

    failed = _in_threads(search, len(weight), weight.numel() * len(scale))
    return None if any(failed) else best.long()


def code_in_order(
    weight: Tensor, factor: Tensor, order: Tensor, coder: Coder, block_size: int
) -> Tensor:
    """`code_columns` in an order of its own.

    Args:
        weight: (rows, columns) float, inputs as they are.
        factor: (columns, columns) from `inverse_factor`, inputs in coding order, in any float
            dtype.
        order: (columns,) int64, the inputs in coding order.

    Returns:
        (rows, columns) uint8 codes, inputs as they are.
    """
    coded = code_columns(weight[:, order], factor.to(weight.dtype), coder, block_size)
    codes = torch.empty_like(coded)
    codes[:, order] = coded
    return codes


def _spans(columns: int, period: int, block_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks that hold whole periods or lie inside one: only there is a period up
    to date when it starts.
    """
    outer = max(period, block_size // period * period)
    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        for at in range(start, end, block_size):
            yield at, min(at + block_size, end)
