"""x W^T in integers: 8-bit codes on both sides, sums in int32, scales applied to the sums.

With q the codes of x and p those of W, s, z and r, y their scales and zero points, the product is s
r (q - z)(p - y)^T. The sum over int8 codes is `torch._int_mm`; zero points add what row sums tell.
All of it is exact; only the scales are floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, LLMInt8, PerToken, QTensor

_MOST_INPUTS = (2**31 - 1) // 255**2  # sums of products of two differences of 8-bit codes fit int32
_LEAST_ROWS = 32  # CUDA's kernel wants more than 16, by eights


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight on a uniform grid as integers.

    Attributes:
        codes: (out, in) int8, 8-bit codes less 128. sums: (out, groups) int32, their sums.
        zero_point: (out, groups) int32, less 128 likewise. scale: (out, groups) float32. group:
            inputs that share a scale.
        centred: whether all zero points are 0 thus, so that they add nothing.
    """

    codes: Tensor
    sums: Tensor
    zero_point: Tensor
    scale: Tensor
    group: int
    centred: bool

    @classmethod
    def of(cls, q: QTensor[Any, Any], name: str = "weight") -> IntegerWeight:
        """From codes and scales.

        Raises:
            LowbitError: not a uniform grid, weights are kept apart, or it is too wide for 32-bit
                sums.
        """
        if not isinstance(q.grid, Affine) or q.outliers is not None:
            raise LowbitError(
                f"'{name}' is not on a uniform grid alone: it has no integer product."
            )
        group = q.grid.group(q.codes.shape[1])
        if group > _MOST_INPUTS:
            raise LowbitError(
                f"'{name}' sums {group} products: more than {_MOST_INPUTS} can exceed 32 bits."
            )
        shift = 128 if q.grid.bits == 8 else 0
        codes = (q.codes.to(torch.int16) - shift).to(torch.int8)
        sums = codes.view(len(codes), -1, group).sum(-1, dtype=torch.int32)
        zero_point = q.params.zero_point.to(torch.int32) - shift
        centred = not bool(zero_point.any())
        return cls(codes, sums, zero_point, q.params.scale.float(), group, centred)

    def accumulate(self, codes: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
        """(q - z)(p - y)^T over one group of inputs, exact. Nothing waits for the device.

        Args:
            codes: (n, in) int8. zero_point: (n, 1) int32, None for zeros.

        Returns:
            (n, out) int32.
        """
        at = slice(group * self.group, (group + 1) * self.group)
        q = codes[:, at]
        sums = _product(q, self.codes[:, at])
        y = self.zero_point[:, group]
        if zero_point is not None:
            sums = sums - zero_point * (self.sums[:, group] - self.group * y)
        return sums if self.centred else sums - q.sum(1, keepdim=True, dtype=torch.int32) * y


def linear(x: Tensor, weight: IntegerWeight, grid: PerToken | LLMInt8) -> Tensor:
    """x on its grid times W^T, in integers; channels that LLM.int8() keeps are multiplied in x's
    dtype.

    Args:
        x: (..., in) float.

    Returns:
        (..., out) in x's dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(grid, LLMInt8):
        kept = grid.outliers(flat)
        y = _quantized(flat.masked_fill(kept, 0), weight, grid.rest)
        at = kept.nonzero().squeeze(1)
        if len(at):
            y = y + flat[:, at] @ columns(weight, at).to(x.dtype).T
    else:
        y = _quantized(flat, weight, grid)
    return y.view(*x.shape[:-1], len(weight.codes))


def columns(weight: IntegerWeight, at: Tensor) -> Tensor:
    """Some decoded columns of a weight, (out, len(at)) float32."""
    group = at // weight.group
    return (weight.codes[:, at] - weight.zero_point[:, group]).float() * weight.scale[:, group]


def quantized(x: Tensor, grid: PerToken) -> tuple[Tensor, Tensor, Tensor | None]:
    """(n, in) float -> codes (n, in) int8, scale (n, 1) float32, zero_point (n, 1) int32, None for
    zeros; 8-bit codes and their zero points less 128.
    """
    codes, scale, zero_point = grid.codes(x)
    shift = 128 if grid.bits == 8 else 0
    centred = grid.symmetric and grid.bits == 8
    zero = None if centred else zero_point.to(torch.int32) - shift
    return codes.sub_(shift).to(torch.int8), scale, zero


def _quantized(x: Tensor, weight: IntegerWeight, grid: PerToken) -> Tensor:
    codes, scale, zero_point = quantized(x, grid)
    total: Tensor | None = None
    for group in range(weight.scale.shape[1]):
        part = weight.accumulate(codes, zero_point, group).float().mul_(weight.scale[:, group])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.mul_(scale).to(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 matrices, int32."""
    if not a.is_cuda:
        return torch._int_mm(a.contiguous(), b.T)
    rows = max(_LEAST_ROWS, -(-len(a) // 8) * 8)
    padded = torch.zeros(rows, a.shape[1], dtype=torch.int8, device=a.device)
    padded[: len(a)] = a
    return torch._int_mm(padded, b.T)[: len(a)]
