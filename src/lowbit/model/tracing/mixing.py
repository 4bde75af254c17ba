"""Linears whose outputs reach later tokens without attention: those of recurrences, of gated
DeltaNet and of short convolutions.
"""

from __future__ import annotations

from torch import Tensor

from .kind import Kind

_MOVED = 1e-13


def mixing(kind: Kind, attention: str | None) -> tuple[str, ...]:
    """Linears outside attention that matter at tokens after their own.

    Args:
        attention: the module that stores keys and values; None without one.
    """
    outside = [n for n in kind.linears if attention is None or not n.startswith(f"{attention}.")]
    # Linears that see single rows tell nothing of tokens.
    return tuple(n for n in outside if kind.base.inputs[n].dim() > 2 and _mixes(kind, n))


def _mixes(kind: Kind, linear: str) -> bool:
    def at_first(y: Tensor) -> Tensor:
        out = y.clone()
        out[:, :1] *= 1.5
        return out

    moved = (kind.replay({linear: at_first}).out - kind.base.out)[:, 1:].abs().max()
    return float(moved) > _MOVED
