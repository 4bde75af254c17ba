"""The column loop: weights are coded one input column at a time, and each column's error is made up for by the columns to come.

Shared by methods that solve argmin ||(W - Q) X||^2 greedily; what a column may be coded to is the coder's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Coder(Protocol):
    """Codes single columns, and may choose their levels when it first sees them.

    Attributes:
        period: how many columns share levels: ``current`` is promised to be up to date for ``period`` columns from every
            multiple of ``period`` on. 1 for a coder that looks at no column but its own.
    """

    @property
    def period(self) -> int: ...

    def code(self, column: int, values: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        """Code one column; called once for each, in ascending order.

        Args:
            column: its number in coding order.
            values: (rows,) the column with all earlier errors made up for.
            current: (rows, columns) the weights so far, not to be kept: coded columns as they were when coded, the others
                compensated (at a multiple of ``period``, fully so for the next ``period`` columns).

        Returns:
            (rows,) uint8 codes, and (rows,) the values a loader will see, in the dtype of ``values``.
        """
        ...


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper triangular U with U^T U = hessian^-1, or None if the matrix is not positive definite to working precision.

    Row c of U, divided by its diagonal element, says how the columns after c answer an error in column c once all before it
    are settled (GPTQ, section 3.3, step 3).

    Args:
        hessian: (columns, columns) symmetric, float64.
    """
    # With the order of columns reversed, the Cholesky factor of H itself is U^-1: no inverse has to be formed and factored.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    noise = len(hessian) * torch.finfo(hessian.dtype).eps * hessian.diagonal().max()
    if int(failed) or not bool(lower.diagonal().square().min() > noise):
        return None
    upper = lower.flip(0, 1)
    del lower  # as large as the Hessian, which may be gigabytes
    factor: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True)
    return factor


def code_columns(weight: Tensor, factor: Tensor, coder: Coder, block_size: int) -> Tensor:
    """Code all columns from left to right (GPTQ, algorithm 1).

    Args:
        weight: (rows, columns) float; the arithmetic is done in its dtype. Rows are independent of each other.
        factor: (columns, columns) from `inverse_factor`, in the same dtype.
        block_size: columns whose errors reach the columns after them in one product. Changes speed and rounding noise only.

    Returns:
        (rows, columns) uint8 codes.
    """
    rest = weight.T.contiguous()  # (columns, rows): what a step reads and writes lies together
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start, stop in _spans(len(rest), coder.period, block_size):
        errors = torch.empty_like(rest[start:stop])
        for c in range(start, stop):
            codes[c], decoded = coder.code(c, rest[c], rest.T)
            errors[c - start] = (rest[c] - decoded) / factor[c, c]
            rest[c + 1 : stop].addr_(factor[c, c + 1 : stop], errors[c - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def code_in_order(weight: Tensor, factor: Tensor, order: Tensor, coder: Coder, block_size: int) -> Tensor:
    """`code_columns` in an order of its own.

    Args:
        weight: (rows, columns) float, inputs as they are.
        factor: (columns, columns) from `inverse_factor`, inputs in coding order, in any float dtype.
        order: (columns,) int64, the inputs in coding order.

    Returns:
        (rows, columns) uint8 codes, inputs as they are.
    """
    coded = code_columns(weight[:, order], factor.to(weight.dtype), coder, block_size)
    codes = torch.empty_like(coded)
    codes[:, order] = coded
    return codes


def _spans(columns: int, period: int, block_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks that hold whole periods or lie inside one: only there is a period up to date when it starts."""
    outer = max(period, block_size // period * period)
    for start in range(0, columns, outer):
        end = min(start + outer, columns)
        for at in range(start, end, block_size):
            yield at, min(at + block_size, end)
