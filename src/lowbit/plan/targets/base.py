"""What a run would make, what a runtime says to it, and the rules that several runtimes share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import LowbitError
from ...formats.uniform import Uniform, as_uniform
from ...grid import AnyGrid
from ...model.graph import Described, Graph
from ...recipe import Recipe

# packed codes lie in words of this many bits, and a device's share of them must end with a word
WORD = 32
_OF_EXPERTS = (4, 8)
_DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Planned:
    """The artifact that a run would make, and on how many devices it would be served.

    Attributes:
        shapes: full linear name -> (out, in), of every linear to be quantized. config: the model's,
            of transformers.
        described: what reads what in its blocks.
        beyond: what compressed-tensors cannot carry of it, so that `quantize` writes the format of
            lowbit; None if it carries it all.
        biased: full names of the linears with a bias.
        tensor_parallel: number of devices that share every linear.
        online: full names of the linears whose input the finished model rotates.
    """

    recipe: Recipe
    shapes: Mapping[str, tuple[int, int]]
    described: Described
    config: Any
    beyond: str | None = None
    biased: frozenset[str] = frozenset()
    tensor_parallel: int = 1
    online: frozenset[str] = frozenset()

    @cached_property
    def grids(self) -> dict[str, AnyGrid]:
        """Full linear name -> grid."""
        return {n: self.recipe.grid_of(n) for n in self.shapes}

    @cached_property
    def uniform(self) -> dict[str, Uniform]:
        """The linears on uniform grids: all of them, where a runtime that needs that has not
        refused.
        """
        return {n: g for n, own in self.grids.items() if (g := as_uniform(own)) is not None}

    @cached_property
    def split_by_inputs(self) -> frozenset[str]:
        """Full names of the linears of which each device gets some of the inputs: what comes after
        attention or ends an MLP. Of every other linear it gets some of the outputs.
        """
        ends = [
            {*g.writers, *g.inner, *(() if g.heads is None else (g.heads.output,))}
            for g in self.described.kinds
        ]
        of_layers = self.described.of_layers
        places = {name: self.place(name) for name in self.shapes}
        return frozenset(n for n, (i, local) in places.items() if local in ends[of_layers[i]])

    @cached_property
    def distinct(self) -> dict[str, Uniform]:
        """One linear of each sort: the first of those of one place in blocks of one kind, or of one
        place in experts, of one size and on one grid. Rules that ask for nothing else need not look
        at the others.
        """
        first: dict[Any, str] = {}
        for name, grid in self.uniform.items():
            i, local = self.place(name)
            kind = self.described.of_layers[i]
            own = self._without_number(kind, local)
            first.setdefault((kind, own, self.shapes[name], grid), name)
        return {name: self.uniform[name] for name in first.values()}

    def _without_number(self, kind: int, local: str) -> tuple[str, str]:
        """A linear's name inside its block, that of an expert without the expert's number."""
        for mixture in self.described.kinds[kind].mixtures:
            if local.startswith(f"{mixture}."):
                number, _, rest = local.removeprefix(f"{mixture}.").partition(".")
                return (mixture, rest) if number.isdigit() else ("", local)
        return "", local

    def local(self, name: str) -> str:
        """A linear's name inside its block."""
        return self.place(name)[1]

    def graph(self, name: str) -> Graph:
        """The graph of the block that a linear is in."""
        return self.described.graph(self.place(name)[0])

    def place(self, name: str) -> tuple[int, str]:
        """A linear's block and its name inside it."""
        number, _, local = name.removeprefix(f"{self.described.frame.layers}.").partition(".")
        return int(number), local


@dataclass(frozen=True)
class Verdict:
    """What a runtime says to it.

    Attributes:
        runtime: its name; in lower case, the value of --target.
        format: what it reads. weights: bits and grouping, as it holds them. export: the command
            that makes it from the artifact OUT; empty if the artifact is that already. requires:
            the oldest version known to take it. All four are empty if it refuses.
        reasons: sentences that say what does not fit and what to do; empty if it accepts.
        notes: what else to know before choosing it.
    """

    runtime: str
    accepts: bool
    format: str = ""
    weights: str = ""
    export: str = ""
    requires: str = ""
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def refusal(runtime: str, reasons: Iterable[str | None]) -> Verdict | None:
    """The verdict for these reasons; None without any."""
    given = tuple(r for r in reasons if r is not None)
    return Verdict(runtime, False, reasons=given) if given else None


def export_to(target: str) -> str:
    """The command that exports an artifact."""
    return f"lowbit export OUT -o DIR --to {target}"


def tally(words: Iterable[str]) -> str:
    """What linears are, in words, each with the number of linears if there are several."""
    counts = Counter(words).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return "; ".join(f"{word} in {n} linears" for word, n in counts)


# --- rules ----------------------------------------------------------------------------------------


def misfits(p: Planned, check: Callable[[AnyGrid, int, int, str], object]) -> list[str]:
    """The first complaint about every grid.

    Args:
        check: called with a linear's grid, outputs, inputs and full name; raises LowbitError if the
            runtime cannot have it.
    """
    found: dict[AnyGrid, str] = {}
    for name, grid in p.grids.items():
        if grid not in found:
            try:
                check(grid, *p.shapes[name], name)
            except LowbitError as e:
                found[grid] = str(e)
    return list(found.values())


def only_weights(p: Planned, runtime: str) -> list[str | None]:
    """What a runtime cannot take that reads packed weights and nothing else."""
    return [kept(p, runtime), cache(p, runtime), activations(p, runtime), rotations(p, runtime)]


def kept(p: Planned, runtime: str) -> str | None:
    """Weights kept in floating point."""
    option = p.recipe.outliers
    if option is None:
        return None
    return (
        f"Weights kept in floating point have no place in what {runtime} reads: --set {option}=0 "
        "leaves them out."
    )


def cache(p: Planned, runtime: str) -> str | None:
    """Quantized keys and values."""
    if p.recipe.kv is None:
        return None
    return (
        f"{runtime} does not read how keys and values are quantized here: leave "
        f"KV{p.recipe.kv.bits} out of the scheme."
    )


def activations(p: Planned, runtime: str) -> str | None:
    """Quantized activations."""
    if p.recipe.activations is None:
        return None
    return (
        f"{runtime} reads no quantized activations in this format: write A16 instead of "
        f"A{p.recipe.activations.bits} in the scheme."
    )


def experts(p: Planned, runtime: str) -> str | None:
    """Experts on grids that fused kernels do not take.

    Source: vLLM's and SGLang's compressed_tensors_moe.py: symmetric, packed, 4 or 8 bits.
    """
    for name, grid in p.distinct.items():
        fits = grid.symmetric and grid.bits in _OF_EXPERTS
        if p.graph(name).scattered(p.local(name)) and not fits:
            return (
                f"{runtime} takes experts of 4 or 8 bits on symmetric grids, and '{name}' is "
                f"{p.grids[name]}: write 'sym' at the end of the scheme, or override "
                "'*.experts.*'."
            )
    return None


def rotations(p: Planned, runtime: str) -> str | None:
    """Activations rotated while the model runs."""
    if not p.online:
        return None
    return (
        f"{runtime} does not rotate activations while it runs: --set quarot.online=false leaves "
        "that out."
    )


def fused(p: Planned) -> list[tuple[str, ...]]:
    """Full names of the linears that read the same input, site by site; servers make one layer of
    each.
    """
    joined = [
        {s.reads[0]: (at, s.reads[1:]) for at, s in enumerate(graph.sites) if len(s.reads) > 1}
        for graph in p.described.kinds
    ]
    found: list[tuple[tuple[int, int], tuple[str, ...]]] = []
    for name in p.shapes:
        i, local = p.place(name)
        kind = p.described.of_layers[i]
        if local in joined[kind]:
            at, others = joined[kind][local]
            block = name.removesuffix(local)
            found.append(((kind, at), (name, *(block + n for n in others))))
    return [names for _, names in sorted(found, key=lambda entry: entry[0])]


def unlike(p: Planned, runtime: str) -> str | None:
    """Linears on different grids of which the runtime makes one layer."""
    for names in fused(p):
        for name in names[1:]:
            if p.grids[name] != p.grids[names[0]]:
                joined = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in names))
                return (
                    f"'{names[0]}' is {p.grids[names[0]]} and '{name}' {p.grids[name]}, and "
                    f"{runtime} makes one layer of {joined}: "
                    "give these the same scheme in the overrides."
                )
    return None


def parallel(p: Planned, packs_outputs: Callable[[Uniform], bool]) -> str | None:
    """What the number of devices does not fit to.

    Args:
        packs_outputs: whether the format packs something along the outputs of weights on this grid.
    """
    problem = _undivided(p, p.tensor_parallel, packs_outputs)
    if problem is None:
        return None
    return f"{problem}: --tensor-parallel may be {', '.join(map(str, degrees(p, packs_outputs)))}."


def degrees(p: Planned, packs_outputs: Callable[[Uniform], bool]) -> list[int]:
    """The usual numbers of devices that fit; see `parallel`."""
    return [d for d in _DEGREES if _undivided(p, d, packs_outputs) is None]


def _undivided(p: Planned, degree: int, packs_outputs: Callable[[Uniform], bool]) -> str | None:
    """What does not divide among that many devices: heads, inputs of what writes to the residual
    stream, outputs of what reads it.

    Source: vLLM and SGLang split attention by heads and the MLP by its inner channels; key and
    value heads fewer than devices are repeated.
    """
    if degree == 1:
        return None
    heads = p.config.num_attention_heads
    kv = getattr(p.config, "num_key_value_heads", None) or heads
    if heads % degree:
        return f"{heads} attention heads do not divide among {degree} devices"
    if max(kv, degree) % min(kv, degree):
        return f"{kv} key and value heads do not divide among {degree} devices"
    for name, grid in p.distinct.items():
        columns = p.shapes[name][1]
        if name in p.split_by_inputs:
            if columns % degree or (columns // degree) % (grid.group_size or 1):
                groups = (
                    f", which groups of {grid.group_size} do not divide" if grid.group_size else ""
                )
                return (
                    f"Each of {degree} devices gets {columns / degree:g} of the {columns} inputs "
                    f"of '{name}'{groups}"
                )
            if columns // degree * grid.bits % WORD:
                share = f"{columns // degree} of the {columns} inputs"
                return (
                    f"Each of {degree} devices gets {share} of '{name}', whose {grid.bits}-bit "
                    "codes end inside a word"
                )
    for name, grid in p.distinct.items():
        if not packs_outputs(grid):
            continue
        shares = [s for s in _outputs(p, name, degree, heads, kv) if s * grid.bits % WORD]
        if shares:
            return (
                f"Each of {degree} devices gets {shares[0]} outputs of '{name}', whose "
                f"{grid.bits}-bit zero points end inside a word"
            )
    return None


def _outputs(p: Planned, name: str, degree: int, heads: int, kv: int) -> tuple[int, ...]:
    """A device's outputs of a linear, in parts that are packed one after the other; none if it gets
    all.
    """
    graph, local, rows = p.graph(name), p.local(name), p.shapes[name][0]
    if name in p.split_by_inputs:
        return ()
    if graph.heads is not None and graph.site_of(local).probe == graph.attention:
        width = graph.heads.width
        parts = {heads * width: (heads // degree,), kv * width: (max(1, kv // degree),)}
        # Else all three in one.
        return tuple(n * width for n in parts.get(rows, (heads // degree, max(1, kv // degree))))
    block, part = name.removesuffix(local), local.rpartition(".")[0]
    inner = [n for n in graph.inner if n.rpartition(".")[0] == part]
    return ((p.shapes[block + inner[0]][1] if inner else rows) // degree,)
