"""How an artifact names what it holds: as the checkpoint does, and where an expert is cut out of a
larger tensor, as a linear of its own beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .graph import Described
from .modules import ModuleNames, expert_names
from .naming import Names
from .outer import Outer


@dataclass(frozen=True)
class Written:
    """The names of a model's tensors in an artifact. "Full" names are those of the text model.

    Attributes:
        names: the checkpoint's. modules: those of the class that loads it.
        copied: stored tensors of which nothing is quantized, though parameters are parts of them.
        parts: full names of these parameters.
        heads: full names of embedding and head. tied: they are one tensor.
        experts: see `lowbit.formats.native`; None if no expert is quantized.
    """

    names: Names
    modules: ModuleNames
    copied: tuple[str, ...]
    parts: frozenset[str]
    heads: tuple[str, str]
    tied: bool
    experts: Mapping[str, str] | None

    @classmethod
    def of(
        cls,
        names: Names,
        modules: ModuleNames,
        described: Described,
        stored_in: Sequence[Mapping[str, tuple[int, ...]]],
        outer: Outer,
    ) -> Written:
        """Decide on names.

        Args:
            stored_in: names inside each block of everything that it stores.
        """
        apart, linears = set[str](), dict[str, str]()
        for i, stored in enumerate(stored_in):
            graph, prefix = described.graph(i), f"{described.block_name(i)}."
            # Experts of which one linear is quantized lie apart altogether.
            mixtures = tuple(
                f"{m}." for m in graph.mixtures if any(n.startswith(f"{m}.") for n in graph.linears)
            )
            own = {f"{n}.{kind}" for n in graph.linears for kind in ("weight", "bias")}
            for name in stored:
                if name in own or (mixtures and name.startswith(mixtures)):
                    apart.add(prefix + name)
            if mixtures:
                inside = (n for n in graph.linears if n.startswith(mixtures))
                linears |= {prefix + n: names.module(prefix + n) for n in inside}
        cut = {p.tensor for n in apart if n in names.apart for p in names.places[n]}
        parts = frozenset(
            n
            for n in names.apart
            if n not in apart and not any(p.tensor in cut for p in names.places[n])
        )
        return cls(
            names,
            modules,
            tuple(sorted({p.tensor for n in parts for p in names.places[n]})),
            parts,
            (outer.embedding, outer.head),
            outer.tied,
            expert_names(linears, modules) if linears else None,
        )

    def name(self, full: str) -> str | None:
        """The name of a parameter or a linear in files; None of one that is part of what is
        copied.
        """
        if full in self.parts:
            return None
        return self.names.tensor(full) if full in self.names.places else self.linear(full)

    def linear(self, full: str) -> str:
        """The name of a linear in files."""
        return self.outer(f"{full}.weight").removesuffix(".weight")

    def outer(self, full: str) -> str:
        """The name in files of a parameter that is whole."""
        embedding, head = self.heads
        places = self.names.places
        if full == head and full in places and places[full] == places.get(embedding):
            # Of its own where the two are no longer one.
            before = self.names.tensor(embedding)
            return before.removesuffix(embedding) + head if before.endswith(embedding) else head
        stored = self.names.tensor(full) if full in places else full
        # Either of a tied pair may hold the other's tensor.
        return full if stored in places and stored in self.heads else stored

    def spellings(self, full: str) -> tuple[str, ...]:
        """The names of a linear in the files, in the class that loads them, and in runtimes that
        put the text model into a larger one.
        """
        stored = self.linear(full)
        module = self.modules.of(stored)
        inside = () if module == full else (f"language_model.{full}",)
        return tuple(dict.fromkeys((module, stored, *inside)))
