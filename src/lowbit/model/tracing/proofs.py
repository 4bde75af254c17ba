"""Proofs: what the graph says may be done to a block is done to the narrow copy, and its function
compared. What does not keep the function is taken out of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import LowbitError
from ...grid import Rotation
from ..beside import Place, Values
from ..block import Block
from ..context import Context
from ..graph import Graph, Site
from ..order import reorder
from ..residual import Basis, rotate_block
from ..rewrite import fold
from .kind import FAR, Kind
from .spread import spread

_SAME = 1e-4  # some norms compute in float32 whatever they are given, and blocks add that up
_SEED = 0
_SHARED = "others use what it makes besides the linears that read it"
_CUT = "the block cuts what it makes at a limit, or bends it"


def proved(kind: Kind, graph: Graph, centred: bool) -> Graph:
    """The graph without what is wrong in it.

    Args:
        centred: the model's norms are LayerNorms.
    """
    dropped: dict[str, str] = {}
    sites = []
    for site in graph.sites:
        every = spread(Graph((site,)), kind.counts(kind.block)).sites
        wrong = next(filter(None, (_misfolds(kind, graph, s) for s in every)), None)
        if site.source is not None and wrong is not None:
            dropped[site.source.module] = wrong
            site = replace(site, source=None, residual=False)
        sites.append(site)
    out = replace(graph, sites=tuple(sites))
    whole = spread(out, kind.counts(kind.block))
    if whole.rotatable and not _turns(kind, whole, centred):
        dropped["the residual stream"] = (
            "in another basis the block computes something else, or a norm's bias has no reader "
            "that could take it over"
        )
        out = replace(out, writers=())
    fixed = [n for s in out.sites if out.movable(s) and not _moves(kind, out, s) for n in s.reads]
    return replace(out, fixed=tuple(fixed), dropped=tuple(dropped.items()))


def _weights(kind: Kind) -> dict[str, Tensor]:
    return dict(kind.block.named_parameters()) | dict(kind.block.named_buffers())


def _block(kind: Kind, graph: Graph, weights: Mapping[str, Tensor]) -> Block:
    x = kind.called.x
    context = Context(
        name="the narrow copy",
        module=kind.block,
        graph=graph,
        kwargs=kind.called.kwargs,
        compute=torch.float64,
        stored=torch.float64,
        grids={},
        x=x,
        xq=x,
        target=x,
        tuned_rows=0,
        seed=_SEED,
        place=Place(left=dict.fromkeys(kind.leaves, 0)),
    )
    return Block(context, weights)


def _misfolds(kind: Kind, graph: Graph, site: Site) -> str | None:
    """Why a random factor, folded as methods fold it, changes the block's output; None where it
    does not.
    """
    if site.source is None:
        return None
    block = _block(kind, graph, _weights(kind))
    channels = block.weight(site.reads[0]).shape[1]
    generator = torch.Generator().manual_seed(_SEED)
    factor = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    try:
        changed = fold(block, site, factor).passed(kind.called.x)
    except (ValueError, RuntimeError, KeyError):  # rows or columns that are not there
        return _SHARED
    if not _kept(kind, *changed):
        return _SHARED
    return None if _folds_far(kind, block, site, factor) else _CUT


def _folds_far(kind: Kind, block: Block, site: Site, factor: Tensor) -> bool:
    """Whether it does so too where what a linear makes is large: a block may cut it there, which
    numbers around one do not show.
    """
    assert site.source is not None
    if site.source.module not in kind.linears:
        return True
    # Its own output, and nothing else of the block, is multiplied.
    large = {
        name: block.weights[name] * FAR
        for name in (f"{site.source.module}.weight", f"{site.source.module}.bias")
        if name in block.weights
    }
    far = block.with_weights(large)
    one, left = far.passed(kind.called.x)
    other, now_left = fold(far, site, factor).passed(kind.called.x)
    return _close(one, other) and all(_close(t, now_left[path]) for path, t in left.items())


def _moves(kind: Kind, graph: Graph, site: Site) -> bool:
    """Whether the block computes the same with the channels of a site in another order."""
    block = _block(kind, graph, _weights(kind))
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(block.weight(site.reads[0]).shape[1], generator=generator)
    try:
        changed = reorder(block, site, order).passed(kind.called.x)
    except (ValueError, RuntimeError, IndexError, KeyError):  # rows that are not there
        return False
    return _kept(kind, *changed)


@dataclass(frozen=True, eq=False)
class _Turn(Basis):
    """Any orthogonal matrix instead of a Hadamard matrix: narrow sizes may have none."""

    matrix: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        return x.double() @ self.matrix


def _turns(kind: Kind, graph: Graph, centred: bool) -> bool:
    """Whether the block, rotated as QuaRot rotates it, computes the same in the other basis."""
    x = kind.called.x
    turn = _turn(x.shape[-1], centred)
    weights = _weights(kind)
    floats = {k: v for k, v in weights.items() if v.is_floating_point()}
    try:
        turned = rotate_block(floats, graph, turn, torch.float64, {})
    except LowbitError:  # a norm's bias that no reader could take over
        return False
    block = _block(kind, graph, {**weights, **turned})
    out, left = block.passed(turn.written(x))
    return _alike(out, turn.written(kind.base.out)) and _left_alike(kind, left)


def _turn(hidden: int, centred: bool) -> _Turn:
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    if centred:  # the vector of ones stays what it is
        first = torch.linalg.qr(torch.cat([torch.ones(hidden, 1).double(), drawn[:, 1:]], 1))[0]
        turn = torch.eye(hidden, dtype=torch.float64)
        turn[1:, 1:] = torch.linalg.qr(drawn[1:, 1:])[0]
        matrix = first @ turn @ first.T
    else:
        matrix = torch.linalg.qr(drawn)[0]
    return _Turn(Rotation((hidden,)), torch.ones(hidden).double(), centred, matrix)


def _kept(kind: Kind, out: Tensor, left: Values) -> bool:
    """Whether the block computes the same, and leaves the same to later blocks."""
    return _alike(out, kind.base.out) and _left_alike(kind, left)


def _left_alike(kind: Kind, left: Values) -> bool:
    return all(_alike(t, kind.base.left[path]) for path, t in left.items())


def _close(one: Tensor, other: Tensor) -> bool:
    """As `_alike`, by the size of the numbers, and never where one is not finite."""
    one, other = one.double(), other.double()
    return bool((one - other).abs().max() <= _SAME * other.abs().max())


def _alike(one: Tensor, other: Tensor) -> bool:
    one, other = one.double(), other.double()
    return bool((one - other).abs().max() <= _SAME * (1 + other.abs().max()))
