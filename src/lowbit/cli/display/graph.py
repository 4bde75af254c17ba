"""What `lowbit plan --graph` shows: what was found in the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from typing import Any

from ...console import Table
from ...model.beside import Keys
from ...model.graph import Described, Frame, Graph, Site, Source
from ...model.roles import roles

_UNTURNED = "cannot be rotated: "


def graph_tables(found: Described) -> list[Table]:
    """Return a table of what lies around the blocks, and two for each kind of block: what reads
    what, and the rest.
    """
    around = Table(show_header=False, title="around the blocks")
    for row in _around(found):
        around.add_row(*row)
    tables = [around]
    for number, graph in enumerate(found.kinds):
        sites = Table("read by", "made by", "read beside", show_lines=True)
        sites.title = f"{_blocks(found, number)} of {len(found.of_layers)}"
        named = roles(graph)
        for site in graph.sites:
            sites.add_row(
                "\n".join(f"{n} ({named[n]})" if named[n] else n for n in site.reads),
                _made(site),
                "\n".join(f"{n} (made up for)" if site.source else n for n in site.beside),
            )
        rest = Table(show_header=False)
        for row in _rest(graph):
            rest.add_row(*row)
        tables += [sites, rest]
    return tables


def graph_data(found: Described) -> dict[str, Any]:
    """The same as plain data, for JSON."""
    return {
        "around": asdict(found.frame),
        "beside": [asdict(item) for item in found.items],
        "kinds": [
            {
                **asdict(graph),
                "blocks": [i for i, kind in enumerate(found.of_layers) if kind == number],
                "roles": roles(graph),
                "unclipped": dict(graph.unclipped),
                "kept": dict(graph.kept),
                "dropped": dict(graph.dropped),
                "stream": _stream(graph),
            }
            for number, graph in enumerate(found.kinds)
        ],
    }


def _blocks(found: Described, number: int) -> str:
    """Which blocks are of a kind: runs of neighbours, or of every so many."""
    own = [i for i, kind in enumerate(found.of_layers) if kind == number]
    steps = {b - a for a, b in pairwise(own)}
    if len(own) > 2 and len(steps) == 1 and steps != {1}:
        return f"blocks {own[0]}, {own[1]}, ... {own[-1]}: {len(own)}"
    runs = [[i for _, i in run] for _, run in groupby(enumerate(own), key=lambda at: at[1] - at[0])]
    said = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
    return f"block{'s' * (len(own) > 1)} {said}: {len(own)}"


def _around(found: Described) -> Iterator[tuple[str, str]]:
    frame = found.frame
    yield "blocks", f"{len(found.of_layers)} in {frame.layers}, of {_count(found.kinds)}"
    yield "embeddings", ", ".join(frame.embeddings)
    yield "after the last block", _final(frame)
    alike: dict[tuple[int | None, Keys], list[int]] = {}
    for item in found.items:
        for i, where in item.readers:
            alike.setdefault((item.maker, where), []).append(i)
    for (maker, where), readers in alike.items():
        yield "given beside the stream", _passing(maker, where, readers)


def _passing(maker: int | None, where: Keys, readers: list[int]) -> str:
    blocks = f"block{'s' * (len(readers) > 1)} {', '.join(map(str, readers))}"
    by = "the tokens alone decide" if maker is None else f"block {maker} leaves"
    return f"{'.'.join(map(str, where))} to {blocks}: {by} it"


def _count(kinds: Sequence[Graph]) -> str:
    return "one kind" if len(kinds) == 1 else f"{len(kinds)} kinds"


def _final(frame: Frame) -> str:
    norms = f"{', '.join(frame.final) or 'the head'} (gain {_gain(frame.final_offset)})"
    if not frame.open:
        return norms if frame.final else "the head"
    return (
        f"{', '.join(frame.final) or 'the head'}; {_UNTURNED}the stream is changed between "
        "embeddings and blocks, or blocks and head"
    )


def _gain(offset: float) -> str:
    return f"{offset:g} + w" if offset else "w"


def _made(site: Site) -> str:
    source = site.source
    if source is None:
        return "nothing that takes a factor"
    return _gains(source) if source.kind == "norm" else _rows(source)


def _gains(source: Source) -> str:
    return f"{source.module} (gain {_gain(source.offset)})"


def _rows(source: Source) -> str:
    if source.rows is None:
        return source.module
    return f"rows {source.rows[0]} to {source.rows[1] - 1} of {source.module}"


def _rest(graph: Graph) -> Iterator[tuple[str, str]]:
    yield "residual stream", _stream(graph)
    if graph.attention is not None:
        yield "keys and values", f"stored by {graph.attention}"
    if graph.heads is not None:
        heads = graph.heads
        through = f", through {heads.norm}," if heads.norm else ""
        yield (
            "heads",
            f"{heads.count} of {heads.width} channels, from {_rows(heads.values)}{through} to "
            f"{heads.output}",
        )
    if graph.unclipped:
        yield "queries and keys", ", ".join(f"rows 0 to {n - 1} of {m}" for m, n in graph.unclipped)
    for name, why in graph.kept:
        yield "kept as it is", f"{name}: {why}"
    for name, why in graph.dropped:
        yield "dropped by its proof", f"{name}: {why}"


def _stream(graph: Graph) -> str:
    if graph.rotatable:
        return f"can be rotated; written by {', '.join(graph.writers)}"
    if graph.writers:
        return _UNTURNED + "no linear reads it behind a norm whose gain it could take"
    dropped = dict(graph.dropped).get("the residual stream")
    return _UNTURNED + (dropped or "something else than outputs of linears is added to it")
