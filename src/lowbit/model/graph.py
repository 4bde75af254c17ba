"""What reads what inside one kind of decoder block, and around the blocks: data that every method
shares, discovered by `lowbit.model.tracing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import LowbitError
from .beside import Item, Keys, Place


@dataclass(frozen=True)
class Source:
    """What produces a site's activation, channel by channel, so that a per-channel factor can be
    folded into it.

    Attributes:
        module: name inside the block.
        kind: "norm" (gain, and bias if there is one) or "linear" (output rows, and bias if there is
            one).
        rows: the linear's output rows that make the activation, as (start, stop); None means all of
            them.
        offset: what a norm adds to its stored gain before it multiplies (Gemma: 1).
    """

    module: str
    kind: Literal["norm", "linear"]
    rows: tuple[int, int] | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Site:
    """One activation and the linears that read it.

    Attributes:
        reads: names of the linears inside the block; they see the same input.
        source: where a per-channel factor may be folded, or None if nowhere.
        probe: the module whose output tells how much an error in ``reads`` hurts (AWQ's inspected
            module); "" is the block.
        residual: the activation is the residual stream after the source norm.
        beside: parameters (..., in) that read the activation too and stay in floating point
            (routers, shared gates), by their names inside the block; a factor folded into the
            source is made up for in their columns.
        through: the mixture of experts that hands each expert some of the tokens; None where all
            readers see the same tokens.
    """

    reads: tuple[str, ...]
    source: Source | None
    probe: str
    residual: bool = False
    beside: tuple[str, ...] = ()
    through: str | None = None

    @property
    def reader(self) -> str:
        """A module whose first argument is the activation, all tokens of it."""
        return self.through or self.reads[0]

    @property
    def readings(self) -> tuple[tuple[str, ...], ...]:
        """The readers by who sees the same tokens: each expert's, and those outside the mixture."""
        if self.through is None:
            return (self.reads,)
        groups: dict[str, list[str]] = {}
        for name in self.reads:
            inside = name.startswith(f"{self.through}.")
            expert = name.removeprefix(f"{self.through}.").partition(".")[0] if inside else ""
            groups.setdefault(expert, []).append(name)
        return tuple(map(tuple, groups.values()))


@dataclass(frozen=True)
class Heads:
    """How values go through attention.

    Attributes:
        values: the linear's output rows that are the values, head by head.
        output: the linear that reads all heads side by side.
        count: query heads. width: channels of a head.
        norm: module between attention and ``output``, None if there is none.
    """

    values: Source
    output: str
    count: int
    width: int
    norm: str | None = None


@dataclass(frozen=True)
class Graph:
    """One kind of block.

    Attributes:
        sites: the block's reading sites in the order of the forward pass.
        unclipped: linear -> number of its first output rows that produce queries and keys; clip
            searches leave them alone.
        writers: linears whose output is added to the residual stream; empty where something else
            is added, too.
        heads: attention's values; None where no linear makes them or the block has no attention.
        attention: name of the module that stores keys and values; None without one.
        output: the linear that reads what attention computed; None without attention. Without
            ``attention`` it is computed with the keys and values of an earlier block.
        inner: linears that read what an MLP, or an expert, computed between its linears.
        flat: linears that are given the tokens of all rows in one matrix.
        mixing: linears outside attention that matter at tokens after their own (recurrences,
            convolutions).
        fixed: linears of ``inner`` whose channels cannot change places.
        mixtures: modules that hold experts, by their numbers.
        kept: linears that are not quantized, each with the reason.
        wide: where that is of what the block is called with that must have a row for each of its
            input, although they are alike.
        dropped: where a change of the block that looked possible does not keep its function, each
            with the reason; it is not made.
    """

    sites: tuple[Site, ...]
    unclipped: tuple[tuple[str, int], ...] = ()
    writers: tuple[str, ...] = ()
    heads: Heads | None = None
    attention: str | None = None
    output: str | None = None
    inner: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    mixing: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    mixtures: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    wide: tuple[Keys, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantizable linear of the block, in the order of the forward pass."""
        return tuple(name for site in self.sites for name in site.reads)

    @property
    def readings(self) -> tuple[tuple[str, ...], ...]:
        """The linears by who sees the same tokens, in the order of the forward pass."""
        return tuple(names for site in self.sites for names in site.readings)

    @property
    def levels(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The same, those together that are reached at once: all experts do the same at a time."""
        found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for at, site in enumerate(self.sites):
            name = site.reads[0]
            mixture = next((m for m in self.mixtures if name.startswith(f"{m}.")), None)
            key: tuple[str, ...] = (str(at),)
            if mixture is not None and site.through is None:
                key = mixture, name.removeprefix(f"{mixture}.").partition(".")[2]
            found.setdefault(key, []).extend(site.readings)
        return tuple(map(tuple, found.values()))

    @property
    def rotatable(self) -> bool:
        """Whether all that reads and writes the residual stream is known: its channels can be mixed
        or change places.
        """
        return bool(self.writers) and any(site.residual for site in self.sites)

    def scattered(self, linear: str) -> bool:
        """Whether a linear is given some of the tokens, so that their places are not known: that of
        an expert.
        """
        return any(linear.startswith(f"{m}.") for m in self.mixtures)

    def site_of(self, linear: str) -> Site:
        """The site that a linear reads.

        Raises:
            KeyError: it is none of the block's.
        """
        for site in self.sites:
            if linear in site.reads:
                return site
        raise KeyError(linear)

    def movable(self, site: Site) -> bool:
        """Whether the channels of a site of ``inner`` can change places."""
        movable = set(self.inner) - set(self.fixed)
        if site.source is None or movable.isdisjoint(site.reads):
            return False
        makers = self.makers(site)
        return bool(makers) and (site.source.kind == "norm" or site.source.module in makers)

    def makers(self, site: Site) -> tuple[str, ...]:
        """The linears whose outputs, channel by channel, make what a site of ``inner`` reads: those
        of the last site before it that are in the same MLP or expert.
        """
        part = site.reads[0].rpartition(".")[0]
        before = self.sites[: self.sites.index(site)]
        found = [tuple(n for n in s.reads if n.rpartition(".")[0] == part) for s in before]
        return next((names for names in reversed(found) if names), ())


@dataclass(frozen=True)
class Frame:
    """What lies around the blocks.

    Attributes:
        trunk: attribute path of the module that holds the layers (and embeds and normalises).
        layers: attribute path of the list of blocks.
        final: trunk modules applied after the last block, in order.
        final_offset: what the final norm adds to its stored gain.
        embeddings: trunk modules whose rows are added up to the first block's input.
        open: the stream is changed between embedding and blocks, or between blocks and head, by
            something that has no other basis (a projection): it can be neither rotated nor
            reordered.
        centred: norms take the mean off (LayerNorm).
        plain: logits are what the head makes of what the final modules make of the last block's
            output, and nothing else.
        streams: how many residual streams there are: (rows, length, streams, hidden) goes from
            block to block where there are several. turned: the model itself has the streams in
            front, see `lowbit.model.turning`.
        returns: how many things a block returns in a tuple, its output first; 0 where it returns
            its output alone.
    """

    trunk: str
    layers: str
    final: tuple[str, ...] = ("norm",)
    final_offset: float = 0.0
    embeddings: tuple[str, ...] = ("embed_tokens",)
    open: bool = False
    centred: bool = False
    plain: bool = False
    returns: int = 0
    streams: int = 1
    turned: bool = False


@dataclass(frozen=True)
class Described:
    """A model's blocks and what lies around them.

    Attributes:
        kinds: graphs that differ, each of at least one block.
        of_layers: of each block, the index of its graph in ``kinds``.
        items: what goes through the model beside the residual stream.
    """

    frame: Frame
    kinds: tuple[Graph, ...]
    of_layers: tuple[int, ...]
    items: tuple[Item, ...] = ()

    def graph(self, i: int) -> Graph:
        """The graph of block i."""
        return self.kinds[self.of_layers[i]]

    def place(self, i: int) -> Place:
        """What block i is given and leaves beside the residual stream."""
        return Place.of(self.items, i)

    def check(self, model: str) -> None:
        """Raise LowbitError if no block has a linear that can be quantized."""
        if not any(self.kinds[kind].linears for kind in self.of_layers):
            raise LowbitError(f"no block of '{model}' has a linear that can be quantized.")

    def block_name(self, i: int) -> str:
        """The prefix of block i in the names of tensors and modules."""
        return f"{self.frame.layers}.{i}"

    @property
    def linears(self) -> tuple[str, ...]:
        """The full name of every quantizable linear, block by block."""
        return tuple(
            f"{self.block_name(i)}.{name}"
            for i in range(len(self.of_layers))
            for name in self.graph(i).linears
        )

    @property
    def flat(self) -> tuple[str, ...]:
        """Names inside a block of the linears that some block gives the tokens of all rows in one
        matrix.
        """
        return tuple(dict.fromkeys(name for graph in self.kinds for name in graph.flat))
