"""A narrow block's graph with the numbers of the real one."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..graph import Graph, Site, Source
from .kind import Kind


def widened(graph: Graph, kind: Kind) -> Graph:
    """The same graph for the real block: counts stay, rows and widths grow.

    A place in a linear is a share of its rows, and shares stay; where a share is no whole number of
    real rows, the source is given up.
    """
    heads = graph.heads
    if heads is not None:
        values = _source(heads.values, kind)
        width = heads.width * kind.by
        heads = None if values is None else replace(heads, values=values, width=width)
    unclipped = ((name, _row(kind, name, rows)) for name, rows in graph.unclipped)
    return replace(
        graph,
        sites=tuple(_site(s, kind) for s in graph.sites),
        heads=heads,
        unclipped=tuple((name, rows) for name, rows in unclipped if rows is not None),
    )


def _site(site: Site, kind: Kind) -> Site:
    return site if site.source is None else replace(site, source=_source(site.source, kind))


def _source(source: Source, kind: Kind) -> Source | None:
    if source.rows is None:
        return source
    start, stop = (_row(kind, source.module, r) for r in source.rows)
    return None if start is None or stop is None else replace(source, rows=(start, stop))


def _row(kind: Kind, linear: str, row: int) -> int | None:
    narrow = kind.modules[linear]
    assert isinstance(narrow, nn.Linear)
    place, beyond = divmod(row * kind.sizes(linear)[0], narrow.out_features)
    return None if beyond else place
