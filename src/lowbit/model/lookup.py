"""Looking up the parameters of a skeleton among the names of a checkpoint."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from .conversion import Group, Numbered, Place, Renamed
from .experts import Experts
from .fused import BIAS, Part


class Lookup:
    """A skeleton's names seen through one way of renaming a checkpoint.

    Args:
        model: the skeleton. renamed: the checkpoint. held: stored name -> shape.
    """

    def __init__(
        self, model: nn.Module, renamed: Renamed, held: Mapping[str, tuple[int, ...]], config: Any
    ) -> None:
        self.renamed, self.held, self.config = renamed, held, config
        self.fused = {n: m for n, m in model.named_modules() if isinstance(m, Experts)}
        self.experts = dict(self._linears())
        self.shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        for name, module in self.fused.items():
            for part in module.form.parts.values():
                for whole in (part.parameter, part.parameter + BIAS):
                    self.shapes[f"{name}.{whole}"] = module.form.shape(whole)
        self._numbered: dict[int, Numbered] = {}

    def _linears(self) -> Iterator[tuple[str, tuple[str, int, Part]]]:
        """Linear of an expert -> the fused module, the expert's number, and its part."""
        for name, module in self.fused.items():
            for number in range(module.form.count):
                for linear, part in module.form.parts.items():
                    yield f"{name}.{number}.{linear}", (name, number, part)

    @cached_property
    def present(self) -> frozenset[str]:
        """Every name that a parameter may be found under."""
        return frozenset((*self.renamed.plain, *self.renamed.groups, *self.held))

    @cached_property
    def heads(self) -> dict[str, str]:
        """Name of a list of blocks in the skeleton -> in the checkpoint: the one under which most
        of the blocks' parameters are, in their shapes.
        """
        tails: dict[str, list[tuple[str, tuple[int, ...] | None]]] = {}
        for name in self.present:
            head, tail = split(name)
            if tail:
                stored = self.renamed.plain.get(name, name)
                tails.setdefault(tail, []).append((head, self.held.get(stored)))
        votes: dict[str, Counter[str]] = {}
        for name, wanted in self.shapes.items():
            mine, tail = split(name)
            for head, shape in tails.get(tail, ()):
                # Another decoder may use the same names: equal shapes count twice.
                votes.setdefault(mine, Counter())[head] += 1 + (shape == wanted)
        return {
            mine: max(heads, key=lambda h: (heads[h], h == mine, -len(h)))
            for mine, heads in votes.items()
        }

    @cached_property
    def found(self) -> int:
        """How many of the skeleton's parameters are present."""
        return sum(self._present(n) is not None for n in self.shapes)

    def _spelled(self, name: str) -> Iterator[str]:
        """Names under which a parameter may be present, the likeliest first."""
        head, tail = split(name)
        if tail and head in self.heads:
            yield f"{self.heads[head]}.{tail}"
        for mine, theirs in self.heads.items():
            old, new = _differing(mine, theirs)
            if name.startswith(old + ".") or (new and not old):
                rest = name.removeprefix(old + ".") if old else name
                yield f"{new}.{rest}" if new else rest
        yield name
        for mine, theirs in self.heads.items():
            old, new = _differing(mine, theirs)
            if old and new.endswith(old):  # a wrapper may hold the head as well
                yield new.removesuffix(old) + name

    def _present(self, name: str) -> str | None:
        return next((n for n in self._spelled(name) if n in self.present), None)

    def has(self, name: str) -> bool:
        """Whether a parameter is present under a name of its own."""
        return self._present(name) is not None

    def place(self, name: str) -> tuple[Place, ...] | None:
        """Where a parameter lies; None if it is nowhere."""
        there = self._present(name)
        if there is not None:
            return self._lying(there, None, None)
        linear, _, kind = name.rpartition(".")
        if linear not in self.experts:
            return None
        module, number, part = self.experts[linear]
        parameter = part.parameter + (BIAS if kind == "bias" else "")
        if self.lacking[module, parameter]:
            return None
        there = self._present(f"{module}.{parameter}")
        return None if there is None else self._lying(there, number, part)

    def _lying(self, there: str, number: int | None, part: Part | None) -> tuple[Place, ...] | None:
        """Where a parameter that is present lies, or the part of it that is one expert's."""
        group = self.renamed.groups.get(there)
        stored = self.renamed.plain.get(there) or (None if group else there)
        if stored is None and group is not None:
            numbered = self._follow(group)
            ids = numbered.made.get(there)
            if ids is not None and number is not None and part is not None:
                one, small = ids[number], part.divided(numbered.grain)
                ids = small.weight(one) if one.ndim == 2 else small.bias(one)
            return None if ids is None else numbered.places(ids)
        assert stored is not None  # what is present is in one of the three
        if number is None or part is None:
            return (Place(stored),)
        shape = self.held[stored]
        return (Place(stored, number, part.rows, part.transposed and len(shape) == 3),)

    @cached_property
    def lacking(self) -> dict[tuple[str, str], set[int]]:
        """Fused module and parameter -> numbers of the experts that are not stored in it."""
        return {
            (name, whole): self._lacks(name, whole)
            for name, module in self.fused.items()
            for part in module.form.parts.values()
            for whole in (part.parameter, part.parameter + BIAS)
        }

    def _lacks(self, module: str, parameter: str) -> set[int]:
        """Numbers of the experts that a fused parameter, if it is present, does not hold."""
        form = self.fused[module].form
        there = self._present(f"{module}.{parameter}")
        group = self.renamed.groups.get(there or "")
        if there is None:
            return set(range(form.count))
        if there not in self.renamed.plain and group is not None and "*" in "".join(group.sources):
            return group.lacking(form.count)
        stored = self.renamed.plain.get(there, there)
        if group is not None and stored not in self.held:
            stored = next(n for names in group.sources.values() for n in names)
        return set(range(self.held[stored][0], form.count))

    def _follow(self, group: Group) -> Numbered:
        if id(group) not in self._numbered:
            self._numbered[id(group)] = group.numbered(
                self.held, lambda n: self.shapes[self._spellings[n]], self.config
            )
        return self._numbered[id(group)]

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """Every name under which a parameter may be present -> the skeleton's name."""
        return {s: n for n in self.shapes for s in self._spelled(n)}


def split(name: str) -> tuple[str, str]:
    """What comes before the number of a block, and the rest; the rest is empty without one."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), len(parts))
    return ".".join(parts[:at]), ".".join(parts[at:])


def _differing(mine: str, theirs: str) -> tuple[str, str]:
    """What holds two lists of blocks, without the components that both names end with."""
    a, b = mine.split(".")[:-1], theirs.split(".")[:-1]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)


def missing(name: str, view: Lookup, source: str) -> str:
    """One sentence or two about a parameter that is nowhere."""
    linear, _, kind = name.rpartition(".")
    if linear in view.experts:
        module, _, part = view.experts[linear]
        count = view.fused[module].form.count
        leaf = linear.rpartition(".")[2]
        names = [f"{module}.{i}.{leaf}.{kind}" for i in range(count)]
        lacking = view.lacking[module, part.parameter + (BIAS if kind == "bias" else "")]
        absent = [i for i in sorted(lacking) if not view.has(names[i])]
        return (
            f"'{source}' holds {count - len(absent)} of the {count} experts that its config.json "
            f"asks for in '{module}': the '{leaf}.{kind}' of expert {absent[0]} is missing."
            + _similar(names[absent[0]], view)
        )
    routers = (_is_router(name, view.shapes[name], m, e) for m, e in view.fused.items())
    if any(routers):
        return f"the router '{name}' is missing from '{source}'." + _similar(name, view)
    return (
        f"tensor '{name}' is missing from '{source}': the checkpoint does not fit its config.json."
        + _similar(name, view)
    )


def _is_router(name: str, shape: tuple[int, ...], module: str, experts: Experts) -> bool:
    """Whether a parameter beside experts has one row for each of them."""
    form = experts.form
    beside = name.startswith(module.rpartition(".")[0] + ".")
    return beside and len(shape) == 2 and shape[0] in (form.count, form.count + form.identities)


def _similar(name: str, view: Lookup) -> str:
    """The stored names that are most like a parameter's."""
    near = difflib.get_close_matches(name, list(view.held), n=3, cutoff=0.6)
    return f" Tensors with similar names: {', '.join(near)}." if near else ""
