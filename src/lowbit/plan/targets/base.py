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
from ...model.wiring import Wiring
from ...recipe import Recipe

# packed codes lie in words of this many bits, and a device's share of them must end with a word
WORD = 32
_DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Planned:
    """The artifact that a run would make, and on how many devices it would be served.

    Attributes:
        shapes: full linear name -> (out, in), of every linear to be quantized. config: the model's,
            of transformers.
        beyond: what compressed-tensors cannot carry of it, so that `quantize` writes the format of
            lowbit; None if it carries it all.
        biased: linears with a bias, by their names inside a block.
        tensor_parallel: number of devices that share every linear.
        online: linears whose input the finished model rotates, by their names inside a block.
    """

    recipe: Recipe
    shapes: Mapping[str, tuple[int, int]]
    wiring: Wiring
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

    def local(self, name: str) -> str:
        """A linear's name inside its block."""
        return name.removeprefix(f"{self.wiring.layers}.").partition(".")[2]


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


def rotations(p: Planned, runtime: str) -> str | None:
    """Activations rotated while the model runs."""
    if not p.online:
        return None
    return (
        f"{runtime} does not rotate activations while it runs: --set quarot.online=false leaves "
        "that out."
    )


def fused(p: Planned) -> Iterable[tuple[str, ...]]:
    """Full names of the linears that read the same input; servers make one layer of each."""
    for first, *others in (s.reads for s in p.wiring.sites if len(s.reads) > 1):
        for name in p.shapes:
            if p.local(name) == first:
                yield (name, *(name.removesuffix(first) + n for n in others))


def unlike(p: Planned, runtime: str) -> str | None:
    """Linears on different grids of which the runtime makes one layer."""
    for names in fused(p):
        for name in names[1:]:
            if p.grids[name] != p.grids[names[0]]:
                joined = ", ".join(n.rpartition(".")[2] for n in names)
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
    for name, grid in p.uniform.items():
        columns = p.shapes[name][1]
        if p.local(name) in p.wiring.writers:
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
    for name, grid in p.uniform.items():
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
    if p.local(name) in p.wiring.writers:
        return ()
    if p.local(name) in p.wiring.sites[0].reads:
        assert p.wiring.heads is not None
        width, rows = p.wiring.heads.width, p.shapes[name][0]
        parts = {heads * width: (heads // degree,), kv * width: (max(1, kv // degree),)}
        # Else all three in one.
        return tuple(n * width for n in parts.get(rows, (heads // degree, max(1, kv // degree))))
    block = name.removesuffix(p.local(name))
    return (p.shapes[block + p.wiring.sites[-1].reads[0]][1] // degree,)
