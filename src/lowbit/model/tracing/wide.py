"""Masks and the like that a block does not broadcast over the rows of its input."""

from __future__ import annotations

import torch

from ..beside import Keys, leaves, placed
from ..recorder import Called
from .kind import Kind
from .replay import Replay

_SAME = 1e-5  # some norms compute in float32 whatever they are given


def wide(kind: Kind) -> tuple[Keys, ...]:
    """What the block is called with that has to have as many rows as its input, although they are
    alike: nothing, if the block computes the same with one row of each.
    """
    rows, kwargs = len(kind.called.x), kind.called.kwargs
    alike = {
        path: t[:1]
        for path, t in leaves(kwargs)
        if t.dim() and len(t) == rows and torch.equal(t, t[:1].expand_as(t))
    }
    if not alike:
        return ()
    try:
        single = Replay(kind.block, Called(kind.called.x, placed(kwargs, alike)))
    except Exception:  # each block fails in ways of its own
        return tuple(alike)
    same = torch.allclose(single.out, kind.base.out, rtol=_SAME, atol=_SAME)
    return () if same else tuple(alike)
