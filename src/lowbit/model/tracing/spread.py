"""One expert stands for all: what is found of it holds for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from ..graph import Graph, Site


@dataclass(frozen=True)
class Seat:
    """The expert that stands for a mixture.

    Attributes:
        mixture: name of the module that holds the experts. number: of the one that is studied.
    """

    mixture: str
    number: int

    @property
    def prefix(self) -> str:
        """What the names of its linears begin with."""
        return f"{self.mixture}.{self.number}."

    def names(self, name: str, count: int) -> list[str]:
        """The same linear of every expert."""
        own = name.removeprefix(self.prefix)
        return [f"{self.mixture}.{i}.{own}" for i in range(count)]


def spread(graph: Graph, counts: Mapping[Seat, int]) -> Graph:
    """The graph with every expert of so many in it."""

    def each(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(_each(names, counts))

    return replace(
        graph,
        sites=tuple(s for site in graph.sites for s in _sites(site, counts)),
        writers=each(graph.writers),
        inner=each(graph.inner),
        flat=each(graph.flat),
        fixed=each(graph.fixed),
        mixtures=tuple(dict.fromkeys(s.mixture for s in counts)),
        kept=tuple((n, why) for name, why in graph.kept for n in each([name])),
    )


def _seat(name: str, counts: Mapping[Seat, int]) -> Seat | None:
    return next((s for s in counts if name.startswith(s.prefix)), None)


def _each(names: Iterable[str], counts: Mapping[Seat, int]) -> Iterator[str]:
    """Names in their order, those of an expert expert by expert."""
    for seat, group in groupby(names, lambda n: _seat(n, counts)):
        if seat is None:
            yield from group
        else:
            linears = [seat.names(n, counts[seat]) for n in group]
            yield from (n for one in zip(*linears, strict=True) for n in one)


def _sites(site: Site, counts: Mapping[Seat, int]) -> Iterator[Site]:
    """A site inside an expert once for each; any other site with all that read it."""
    seat = _seat(site.reads[0], counts)
    inside = seat is not None and all(n.startswith(seat.prefix) for n in site.reads)
    if seat is None or not inside or not site.probe.startswith(seat.prefix):
        yield replace(site, reads=tuple(_each(site.reads, counts)))
        return
    for i in range(counts[seat]):
        prefix = f"{seat.mixture}.{i}."

        def own(name: str, prefix: str = prefix, seat: Seat = seat) -> str:
            within = name.startswith(seat.prefix)
            return prefix + name.removeprefix(seat.prefix) if within else name

        source = site.source and replace(site.source, module=own(site.source.module))
        reads = tuple(own(n) for n in site.reads)
        yield replace(site, reads=reads, source=source, probe=own(site.probe))
