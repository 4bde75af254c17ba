"""Norms around and inside blocks, told by what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAME = 1e-5  # some norms compute in float32 whatever they are given


def is_centred(module: nn.Module, hidden: int) -> bool:
    """Whether a module is a norm of a stream of so many channels that takes the mean off."""
    gain = module._parameters.get("weight")
    if gain is None or gain.shape != (hidden,) or offset_of(module) is None:
        return False
    x = _drawn(gain)
    plain, shifted = _applied(module, x), _applied(module, x + 1)
    return plain is not None and shifted is not None and _close(shifted, plain)


def offset_of(module: nn.Module) -> float | None:
    """What a norm adds to its stored gain; None if a module is no norm of a vector."""
    gain, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if gain is None or gain.dim() != 1 or (bias is not None and bias.shape != gain.shape):
        return None
    x, shift = _drawn(gain), 0.0 if bias is None else bias
    base = _applied(module, x)
    if base is None:
        return None
    factors = torch.linspace(0.5, 1.5, len(gain), dtype=gain.dtype)
    held = gain.detach().clone()
    try:
        for offset in (0.0, 1.0):
            with torch.no_grad():
                gain.copy_((held + offset) * factors - offset)
            scaled = _applied(module, x)
            if scaled is not None and _close(scaled - shift, (base - shift) * factors):
                return offset
    finally:
        with torch.no_grad():
            gain.copy_(held)
    return None


@torch.no_grad()
def _applied(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a module makes of vectors, of their shape; None if it takes or makes something else."""
    try:
        out = module(x)
    except Exception:  # each class fails in ways of its own
        return None
    return out if isinstance(out, Tensor) and out.shape == x.shape else None


def _drawn(gain: Tensor) -> Tensor:
    """Three vectors for a gain."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, len(gain), generator=generator, dtype=gain.dtype)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=SAME, atol=SAME)
