"""What linears do in a block, in the words of the field, read off its graph."""

from __future__ import annotations

from .graph import Graph, Site

QKV = ("query", "key", "value")


def roles(graph: Graph) -> dict[str, str]:
    """Linear -> "query", "key", "value", "latent", "output", "gate", "up", "down" or "state"; those
    of its parts where one linear makes several; "" where the graph does not tell.

    Args:
        graph: of one kind of block.
    """
    found = dict.fromkeys(graph.linears, "")
    found |= dict.fromkeys(graph.mixing, "state")
    for site in graph.sites:
        if not set(site.reads).isdisjoint(graph.inner):
            found |= _inner(graph, site)
    return found | _attention(graph)


def _attention(graph: Graph) -> dict[str, str]:
    if graph.output is None:
        return {}
    part = graph.attention or graph.output.rpartition(".")[0]
    inside = [n for n in graph.linears if n.startswith(f"{part}.")]
    found = {graph.output: "output"}
    # Without keys and values of its own.
    left = list(QKV if graph.attention is not None else QKV[:1])
    if graph.heads is not None:
        values = graph.heads.values
        if values.rows is None:
            found[values.module] = left.pop()
    made = [n for n, _ in graph.unclipped if n not in found]
    for name in made[:-1]:
        found[name] = left.pop(0)
    if made:  # the last makes what is left, if no other linear is there to make values
        at = graph.site_of(made[-1]).reads
        others = [n for n in at if n in inside and n not in made and n not in found]
        several = left[:1] if others or not left[1:] else left
        found[made[-1]] = ", ".join(several)
        left = left[len(several) :]
        names = [*left, "gate"]
        found |= {n: names[min(i, len(names) - 1)] for i, n in enumerate(others)}
    return found | {n: "latent" for n in inside if n not in found}


def _inner(graph: Graph, site: Site) -> dict[str, str]:
    """An MLP, or another part that reads the stream, computes and writes."""
    makers, found = graph.makers(site), {}
    if any(n in graph.mixing for n in makers):
        beside = {n: "gate" for n in makers if n not in graph.mixing}
        return {**beside, **dict.fromkeys(site.reads, "output")}
    up = None if site.source is None or site.source.kind == "norm" else site.source.module
    if up in makers and site.source is not None and site.source.rows is not None:
        found[up] = "gate, up"
    elif makers:
        up = up if up in makers else makers[-1]
        found = {n: "up" if n == up else "gate" for n in makers}
    return {**found, **dict.fromkeys(site.reads, "down")}
