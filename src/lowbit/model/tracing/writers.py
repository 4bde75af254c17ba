"""The residual stream: which linears write all that is added to it."""

from __future__ import annotations

import torch
from torch import Tensor

from .kind import Kind
from .replay import key_of

_SAME = 1e-9


def writers(kind: Kind) -> tuple[str, ...]:
    """Linears whose outputs, times numbers that do not depend on the channel, are all that is
    added to the stream; none if something else is added, too.
    """
    base = kind.base
    several = base.out.dim() > 3  # streams: what mixes them reads them in no other basis
    if several or key_of(base.out) not in base.stream or not base.added:
        return ()
    found: list[str] = []
    left = [a.clone() for a in base.added]
    for name in kind.linears:
        if kind.modules[name].out_features != base.out.shape[-1]:
            continue
        shares = _shares(kind, name)
        if shares is None:
            continue
        found.append(name)
        left = [a - s for a, s in zip(left, shares, strict=True)]
    alike = all(_none_left(a, of) for a, of in zip(left, base.added, strict=True))
    return tuple(n for n in found if kind.stands(n)) if alike else ()


def _shares(kind: Kind, name: str) -> list[Tensor] | None:
    """What of each addition a linear makes; None if what it makes is not its output times numbers
    that do not depend on the channel.
    """
    factors = torch.linspace(0.5, 1.5, kind.base.out.shape[-1], dtype=torch.float64)
    without = kind.replay({name: torch.zeros_like}).added
    scaled = kind.replay({name: lambda y: y * factors}).added
    if not len(without) == len(scaled) == len(kind.base.added):
        return None
    shares: list[Tensor] = []
    any_share = False
    for whole, zero, now in zip(kind.base.added, without, scaled, strict=True):
        share = whole - zero
        if float(share.abs().max()) > _SAME:
            any_share = True
            if not torch.allclose(now - zero, share * factors, rtol=1e-7, atol=_SAME):
                # A later addition sees the changed stream; the first one is what counts.
                if shares and any(float(s.abs().max()) > _SAME for s in shares):
                    share = torch.zeros_like(share)
                else:
                    return None
        shares.append(share)
    return shares if any_share else None


def _none_left(rest: Tensor, of: Tensor) -> bool:
    return float(rest.abs().max()) < 1e-7 * (1 + float(of.abs().max()))
