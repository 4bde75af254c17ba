"""Products summed over tokens: Gram matrices and the like."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.precision import HALVES


def gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x^T x, see `inner`."""
    return inner(x, x, dtype)


def inner(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a^T b, summed over tokens.

    On CUDA, products of 16-bit numbers are made of them as they are: each is exact in float32, in
    which they are added up. A cast to float32 first would tell the device nothing more, and keep it
    from its fast units; torch's global switch for those would change the products of others.

    Args:
        a, b: (tokens, n) and (tokens, m), or (batch, tokens, n) and (batch, tokens, m), of one
            dtype.
        dtype: of the result, float32 or float64.

    Returns:
        (n, m), or (batch, n, m).
    """
    if takes_16_bits(a.device) and a.dtype in HALVES and dtype == torch.float32:
        product = torch.mm if a.dim() == 2 else torch.bmm
        return product(a.mT, b, out_dtype=dtype)
    wide = a.to(dtype)
    return wide.mT @ (wide if b is a else b.to(dtype))


def takes_16_bits(device: torch.device) -> bool:
    """Whether products of 16-bit numbers can be summed in float32 there."""
    return device.type == "cuda" and torch.version.hip is None
