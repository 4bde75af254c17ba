"""Channel maps: which output row of a linear makes each channel of an activation, up to factors.

A row makes a channel if the channel is multiplied by exactly what the row's output is multiplied
by, whatever that is, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EXACT = 1e-8
_CHUNKS = (1, 2, 3, 4)  # of a fused linear: gate and up, or queries, keys and values

Scaled = Callable[[str, Tensor], Tensor | None]


def rows_of(scaled: Scaled, linear: str, count: int, base: Tensor) -> Tensor | None:
    """The row of ``linear`` that makes each channel.

    Args:
        scaled: (linear, factors of its outputs) -> the activation then, None where its shape
            changed. count: rows of the linear. base: (rows, length, channels) the activation as it
            is, or (tokens, channels).

    Returns:
        (channels,) int64; None if some channel is made by none.
    """
    every = scaled(linear, _factors(count, slice(0, count)))
    if every is not None and torch.equal(every, base):
        return None  # nothing of the linear reaches what is read
    for chunks in _CHUNKS:
        if chunks > 1 and (count % chunks or count < base.shape[-1]):
            continue
        for start in range(0, count, count // chunks):
            part = slice(start, start + count // chunks)
            rows = _candidates(scaled, linear, count, part, base)
            if rows is not None and _proved(scaled, linear, count, rows, base):
                return rows
    return None


def _candidates(
    scaled: Scaled, linear: str, count: int, part: slice, base: Tensor
) -> Tensor | None:
    """Rows whose factors the channels take, seen at all tokens or at first ones: there attention
    has one token to look at, and queries and keys change nothing.
    """
    factors = _factors(count, part)
    now = scaled(linear, factors)
    if now is None:
        return None
    found = _matched(base.flatten(0, -2), now.flatten(0, -2), factors)
    if base.dim() == 3 and bool((found < 0).any()):
        first = _matched(base[:, 0], now[:, 0], factors)
        found = torch.where(found < 0, first, found)
    found = _filled(found, (base == 0).flatten(0, -2).all(0))
    return None if bool((found < 0).any()) else found


def _filled(rows: Tensor, dead: Tensor) -> Tensor:
    """Channels that are zero at every token (behind a ReLU) belong between their neighbours."""
    out = rows.clone()
    for at in dead.nonzero().flatten().tolist():
        if at and out[at] < 0 <= out[at - 1]:
            out[at] = out[at - 1] + 1
        elif out[at] < 0 and at + 1 < len(out) and out[at + 1] > 0:
            out[at] = out[at + 1] - 1
    return out


def _proved(scaled: Scaled, linear: str, count: int, rows: Tensor, base: Tensor) -> bool:
    """Whether those rows alone make the channels, at every token."""
    factors = torch.ones(count, dtype=torch.float64)
    used = torch.tensor(sorted(set(rows.tolist())))
    factors[used] = torch.linspace(0.5, 1.5, len(used), dtype=torch.float64)
    now = scaled(linear, factors)
    wanted = base * factors[rows]
    return now is not None and torch.allclose(now, wanted, rtol=_EXACT, atol=_EXACT)


def _factors(count: int, part: slice) -> Tensor:
    generator = torch.Generator().manual_seed(part.start)
    factors = torch.ones(count, dtype=torch.float64)
    drawn = torch.rand(part.stop - part.start, generator=generator, dtype=torch.float64)
    factors[part] = drawn + 0.5
    return factors


def _matched(base: Tensor, now: Tensor, factors: Tensor) -> Tensor:
    """The row whose factor each channel took exactly; -1 for none.

    Args:
        base, now: (tokens, channels). factors: (rows,).
    """
    ratio = torch.where(base.abs() > 1e-12, now / base, torch.nan)
    middle = ratio.nanmedian(0).values
    constant = (((ratio - middle).abs() < _EXACT) | ratio.isnan()).all(0) & ~middle.isnan()
    rows = (factors != 1).nonzero().squeeze(1)
    ordered, by = factors[rows].sort()
    above = torch.searchsorted(ordered, middle.nan_to_num()).clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    gaps = [(middle - ordered[at]).abs() for at in (below, above)]
    nearest = torch.where(gaps[0] <= gaps[1], below, above)
    return torch.where(constant & (torch.minimum(*gaps) < _EXACT), rows[by[nearest]], -1)
