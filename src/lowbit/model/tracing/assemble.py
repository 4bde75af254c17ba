"""The graph of one kind of block, put together."""

from __future__ import annotations

from itertools import takewhile

from torch import nn

from ..graph import Graph, Site, Source
from .attention import attention_of
from .kind import Kind
from .mixing import mixing
from .proofs import proved
from .replay import Key, key_of
from .sources import linear_source, made_by, norm_offset
from .spread import spread
from .wide import wide
from .widen import widened
from .writers import writers


def graph_of(kind: Kind, centred: bool) -> Graph:
    """What reads what, who made it, what is added to the residual stream; proved on the narrow
    copy, with the real model's numbers of rows.

    Args:
        centred: the model's norms are LayerNorms.
    """
    norms: dict[str, Source] = {}  # reader -> the norm that alone makes what it reads
    for key, names in kind.readers.items():
        norm = kind.base.made.get(key)
        offset = None if norm is None else norm_offset(kind, norm, kind.seen_at(names[0]))
        if norm is not None and offset is not None:
            norms.update(dict.fromkeys(names, Source(norm, "norm", offset=offset)))
    attention = attention_of(kind, {name: source.module for name, source in norms.items()})
    found = [_site(kind, key, names, norms) for key, names in kind.readers.items()]
    sites = tuple(s for s in found if s is not None)
    writing = writers(kind)
    output = None if attention is None else attention.output
    inner = tuple(
        n
        for s in sites
        for n in s.reads
        if n != output and not _entering(kind, s.reads[0]) and kind.sizes(n)[0] == kind.hidden
    )
    graph = Graph(
        sites,
        unclipped=() if attention is None else attention.unclipped,
        writers=writing,
        heads=None if attention is None else attention.heads,
        attention=None if attention is None else attention.module,
        output=output,
        inner=inner,
        flat=tuple(n for n in kind.linears if kind.stands(n) and kind.base.inputs[n].dim() < 3),
        mixing=mixing(kind, None if attention is None else attention.module),
        kept=tuple(kind.kept.items()),
        wide=wide(kind),
    )
    narrow = proved(kind, graph, centred)
    return spread(widened(narrow, kind), kind.counts(kind.real))


def _site(kind: Kind, key: Key, names: list[str], norms: dict[str, Source]) -> Site | None:
    reads = tuple(n for n in names if n in kind.linears)
    if not reads:
        return None
    beside, closed = _beside(kind, [n for n in names if n not in reads], reads[0])
    source = norms.get(reads[0])
    residual = False
    if source is not None:
        residual = not closed and key_of(kind.base.inputs[source.module]) in kind.base.stream
    elif not _entering(kind, reads[0]):
        made = made_by(kind, reads[0], reads)
        source = linear_source(made, kind.modules[made[0]].out_features if made else 0)
    entering = residual or _entering(kind, reads[0])
    through = next((m for n in reads if (m := kind.seen_at(n)) != n), None)
    probe = reads[0]
    if entering or through is not None:
        probe = _parent(tuple(dict.fromkeys(kind.seen_at(n) for n in reads)))
    return Site(reads, None if closed else source, probe, residual, beside, through)


def _entering(kind: Kind, reader: str) -> bool:
    """Whether a module reads the residual stream, or its norm."""
    key = kind.key(reader)
    if key in kind.base.stream:
        return True
    norm = kind.base.made.get(key)
    return (
        norm is not None
        and norm in kind.base.inputs
        and (key_of(kind.base.inputs[norm]) in kind.base.stream)
        and not isinstance(kind.modules[norm], nn.Linear)
    )


def _beside(kind: Kind, names: list[str], reader: str) -> tuple[tuple[str, ...], bool]:
    """Parameters of other modules that read what a linear reads; and whether one of them has no
    columns that a factor could be made up for in.
    """
    width = kind.base.inputs[reader].shape[-1]
    found, closed = [], False
    for name in names:
        for key, p in kind.modules[name]._parameters.items():
            if p is None or p.dim() < 2:
                continue
            if p.shape[-1] == width:
                found.append(f"{name}.{key}")
            else:
                closed = True
    return tuple(found), closed


def _parent(reads: tuple[str, ...]) -> str:
    """The module that holds all of them, "" for the block; of one that lies in no other, itself."""
    if len(reads) == 1:
        return reads[0].rpartition(".")[0] or reads[0]
    paths = [n.split(".") for n in reads]
    shared = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, zip(*paths, strict=False))]
    return ".".join(shared)
