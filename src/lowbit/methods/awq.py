"""AWQ (arXiv 2306.00978): per-channel scales that protect the channels with large activations, and
a search for clipped ranges.

Scales (section 3.2). A site's activation x is divided by s and the weights that read it are
multiplied by it, channel by channel, with

    s = mean|x| ** a / sqrt(max * min of that)        a = argmin ||Q(W s)(x / s) - W x||^2

where the mean is over the calibration tokens on the float stream, Q rounds to nearest on the
linear's grid, and a is one of n / ``exponents``. The output compared is that of the site's probe:
attention or the MLP as a whole, a linear where nothing else reads x. s is folded into the norm or
linear that makes x.

Clip (the authors' code, not in the paper). The range of each group is shrunk by 1 - i / 20,

    argmin ||Q(clamp(w)) x - w x||^2

over the group's own inputs. The defaults are the variant that TesseraQ starts from: the range
shrunk toward both its own ends ("asymmetric"), on the quantized stream. The official repository
shrinks the absolute maximum ("symmetric").

Helpers: `_scale_search` (what arrives at a site, the error under a candidate), `_equivalent`
(where a factor can go), `model.rewrite.fold`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import GroupedGrid, Params
from ..grid.params import stacked
from ..model.block import Block
from ..model.context import TOKENS_PER_PASS
from ..model.graph import Site
from ..model.rewrite import checked, fold
from ..model.statistics import Seen
from ._equivalent import foldable
from ._gram import gram, inner
from ._parts import Span, by_rows
from ._race import FIRST
from ._scale_search import best_scale, collect_inputs, on_grid
from .cost import Cost, Shapes, Work

ClipKind = Literal["asymmetric", "symmetric", "none"]


@dataclass(frozen=True)
class AWQ:
    """The knobs of AWQ.

    Attributes:
        scales: search and fold per-channel scales.
        clip: which clip search to run after it, if any.
        exponents: how many exponents of the mean activation are tried, n / exponents for n = 0, 1,
            ...
        shrinks: how many range factors are tried, 1 - i/20 for i = 0, 1, ...
        rows: calibration rows used by both searches, at most.
        clip_tokens: tokens of them the clip search looks at; 0 means all.
        clip_sampling: which tokens: "random", or "strided" as the reference, where every 512th
            token is often a first token.
        doubt: a factor is left once it is so many standard errors above the best one, over the
            tokens seen by both; 0 leaves only what cannot win, as published.

    On K-quants every range that is tried is fitted by their own search, inputs weighted by their
    mean square.

    Codebooks have no range to clip; where each column has its own, scales change no code either and
    are left out, unless the site's input is quantized. Both are remarked.

    Raises:
        LowbitError: an option is out of range.
    """

    scales: bool = True
    clip: ClipKind = "asymmetric"
    exponents: int = 20
    shrinks: int = 10
    rows: int = 32
    clip_tokens: int = 512
    clip_sampling: Literal["random", "strided"] = "random"
    doubt: float = 0.0

    def __post_init__(self) -> None:
        if (
            self.exponents < 1
            or not 1 <= self.shrinks <= 20
            or self.rows < 1
            or self.clip_tokens < 0
            or not self.doubt >= 0
        ):
            raise LowbitError(
                "awq needs exponents >= 1, shrinks from 1 to 20, rows >= 1, clip_tokens >= 0 and "
                "doubt >= 0."
            )

    def __call__(self, block: Block) -> Block:
        rows = min(self.rows, block.tuned_rows)
        if self.scales:
            block = self._scaled(block, rows)
        grouped = {n: g for n, g in block.grids.items() if isinstance(g, GroupedGrid)}
        if self.clip != "none" and grouped:
            block = self._clipped(block, grouped, rows)
        bare = [n for n in block.grids if n not in grouped]
        if not bare:
            return block
        if not grouped and not block.notes.get("awq_exponents"):
            return block.remarked(f"awq: on codebooks {_NOTHING}")
        where = f" for {', '.join(bare)}" if grouped else ""
        return block if self.clip == "none" else block.remarked(f"awq: on codebooks no clip{where}")

    def _scaled(self, block: Block, rows: int) -> Block:
        sites = [s for s in block.graph.sites if s.source is not None and foldable(block, s)]
        sites = [s for s in sites if not _indifferent(block, s)]
        block.announce("awq: inputs")
        seen = collect_inputs(block, [s for s in sites if not on_grid(block, s)], rows)
        chosen: dict[str, float] = {}
        given = block
        for site in sites:
            block.announce(f"awq: scales of {', '.join(site.reads)}")
            key = site.reader
            # Where an input is quantized, what arrives depends on the factors before it.
            arrived = seen.pop(key) if key in seen else collect_inputs(block, [site], rows)[key]
            candidates = scale_candidates(arrived.mean, self.exponents)
            factor, chosen[key] = best_scale(block, site, arrived, candidates, self.doubt)
            if chosen[key] > 0:
                block = fold(block, site, factor)
        return checked(given, block).with_notes(awq_exponents=chosen)

    def _clipped(self, block: Block, grids: Mapping[str, GroupedGrid[Any]], rows: int) -> Block:
        moments = self._moments(block, grids, rows)
        first = {n: readers[0] for readers in block.graph.readings for n in readers}

        def limits(span: Span) -> tuple[Tensor, Tensor, Params]:
            name, at = span.linear, span.rows
            block.announce(f"awq: clip of {name}")
            weight, grid = block.weight(name), grids[name]
            gram, drift = moments[first[name], grid.group(weight.shape[1])]
            low, high = search_clip(
                weight[at],
                gram,
                grid,
                self.shrinks,
                symmetric=self.clip == "symmetric",
                skip_rows=max(0, dict(block.graph.unclipped).get(name, 0) - at.start),
                drift=drift,
            )
            return low, high, grid.fit(_clamped(grid, weight[at], low, high), _importance(gram))

        names = [n for n in first if n in grids]
        found = by_rows(block, names, limits)
        weights, params = {}, {}
        for name, parts in found.items():
            lows, highs, fitted = zip(*parts, strict=True)
            low, high = torch.cat(lows), torch.cat(highs)
            weights[name] = _clamped(grids[name], block.weight(name), low, high)
            params[name] = stacked(fitted) if len(fitted) > 1 else fitted[0]
        return block.clipped(weights, params)

    def _moments(
        self, block: Block, grids: Mapping[str, GroupedGrid[Any]], rows: int
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
        """(first of those that see the same tokens, group length) -> sums over the quantized
        stream, (groups, group, group) each.

        With x the input in floating point and q what its activation grid makes of it: q q^T, and q
        (q - x)^T, or None where activations are not quantized.
        """
        lengths: dict[int, list[str]] = {}
        for readers in block.graph.readings:
            read = [n for n in readers if n in grids]
            widths = {grids[n].group(block.weight(n).shape[1]) for n in read}
            for length in sorted(widths):
                lengths.setdefault(length, []).append(readers[0])
        total, generator = rows * block.xq.shape[1], torch.Generator().manual_seed(block.seed)
        tokens = pick_tokens(total, self.clip_tokens, self.clip_sampling, generator)
        out: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        for length, linears in lengths.items():
            dtype = block.weight(linears[0]).dtype

            def sums(seen: Seen, length: int = length, dtype: torch.dtype = dtype) -> Tensor:
                q = seen.met.reshape(len(seen.met), -1, length).transpose(0, 1)
                found = [gram(q, dtype)]  # (groups, group, group)
                if quantized(block, seen.linear):
                    drift = (seen.met - seen.exact).reshape(len(seen.met), -1, length)
                    found.append(inner(q, drift.transpose(0, 1), dtype))
                return torch.stack(found)

            seen = block.statistics(linears, "quantized", sums, rows=rows, tokens=tokens)
            for name, s in seen.items():
                out[name, length] = s.value[0], s.value[1] if len(s.value) > 1 else None
        return out


_NOTHING = "nothing: each column has levels of its own"


def scale_candidates(mean: Tensor, exponents: int) -> list[tuple[Tensor, float]]:
    """The factors that are tried, with their exponents n / ``exponents`` in [0, 1).

    Args:
        mean: (channels,) of |x|.
    """
    candidates = []
    for n in range(exponents):
        factor = mean.pow(n / exponents).clamp(min=1e-4)
        candidates.append((factor / (factor.max() * factor.min()).sqrt(), n / exponents))
    return candidates


def quantized(block: Block, linear: str) -> bool:
    """Whether a linear's input is quantized."""
    input_quantizer = block.input_quantizers.get(linear)
    return input_quantizer is not None and input_quantizer.grid is not None


def _importance(gram: Tensor) -> Tensor:
    """(in,): the mean square of each input, up to a factor, from (groups, group, group)."""
    return gram.diagonal(dim1=1, dim2=2).flatten()


def _clamped(grid: GroupedGrid[Any], weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(out, in), every group between its limits, (out, groups)."""
    g = grid.grouped(weight)  # (out, groups, group)
    return torch.minimum(torch.maximum(g, low[..., None]), high[..., None]).flatten(1)


def _indifferent(block: Block, site: Site) -> bool:
    """Whether a per-channel factor would change no code: where every channel has levels of its own
    and is read as it is.
    """
    return all(block.grids[n].scales_with_inputs and not quantized(block, n) for n in site.reads)


def pick_tokens(total: int, count: int, sampling: str, generator: torch.Generator) -> Tensor | None:
    """Numbers of ``count`` of ``total`` tokens: random ones without replacement or every n-th; None
    for all (count 0 or enough).
    """
    if count == 0 or total <= count:
        return None
    if sampling == "strided":
        return torch.arange(0, total, total // count)[:count]
    return torch.randperm(total, generator=generator)[:count]


@torch.no_grad()
def search_clip(
    weight: Tensor,
    gram: Tensor,
    grid: GroupedGrid[Any],
    shrinks: int,
    *,
    symmetric: bool = False,
    skip_rows: int = 0,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per group, the shrunk range whose rounded weights change that group's partial output least.

    Args:
        weight: (out, in) float. gram: (groups, group, group) float, the sum of q q^T over what
            enters each group's product.
        shrinks: factors 1 - i/20 for i < shrinks.
        symmetric: clip to the shrunk absolute maximum on both sides instead of to the shrunk
            minimum and maximum.
        skip_rows: leading rows that keep their full range.
        drift: (groups, group, group), the sum of q (q - x)^T, if q is a quantized form of the input
            x; the output to be kept is x's.

    Returns:
        low, high: (out, groups), the limits to clamp the weights to.
    """
    g = grid.grouped(weight)  # (out, groups, group)
    low_full, high_full = g.amin(-1), g.amax(-1)
    if symmetric:
        high_full = torch.maximum(-low_full, high_full)
        low_full = -high_full
    # |w' q - w x|^2 = d Q d + 2 d D w + const, with d = w' - w, Q the gram and D the drift.
    pull = 0.0 if drift is None else 2 * g.transpose(0, 1) @ drift.transpose(1, 2)
    best = torch.full_like(low_full, float("inf"))
    factor = torch.ones_like(low_full)
    for i in range(shrinks):
        p = 1 - i / 20
        clamped = torch.minimum(
            torch.maximum(g, (low_full * p)[..., None]), (high_full * p)[..., None]
        )
        params = grid.fit(clamped.flatten(1), _importance(gram))
        decoded: Tensor = grid.decode(grid.encode(clamped.flatten(1), params), params)
        delta = (grid.grouped(decoded) - g).transpose(0, 1)
        error = ((delta @ gram + pull) * delta).sum(-1).T  # (groups, out, group) -> (out, groups)
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, p, factor)
    factor[:skip_rows] = 1.0
    return low_full * factor, high_full * factor


# Bytes that pass memory for every weight, temporaries included: a scale that is tried, rounded in
# float64; a range that is tried.
_CANDIDATE, _SHRINK = 60, 40
_SEARCHED = 1024  # tokens of a part, on which a CPU looks at a candidate


def fixes_ranges(method: AWQ) -> bool:
    """Whether ranges are searched, and not scales alone."""
    return method.clip != "none"


def cost(method: AWQ, shapes: Shapes) -> Cost:
    """The site's inputs and their products while scales are searched; folded and clipped weights,
    and those before the clip, which are kept.
    """
    layer, rows = shapes.layer, shapes.rows
    weights, largest = layer.weights, layer.largest
    clips = method.clip != "none"
    keeps = rows.stored * weights if clips else 0
    tokens = shapes.learned(method.rows) * rows.length
    seen = tokens * rows.compute * max(3 * layer.hidden, layer.widest) + 4 * layer.widest**2
    scales = 4 * weights + seen + max(shapes.passing, 32 * largest) if method.scales else 0
    clip = 8 * weights + max(shapes.passing, 20 * largest) if clips else 0
    parts = {"passes": shapes.forward(2 * shapes.learned(method.rows))}  # of all sites, twice
    if method.scales:
        parts |= _scales_work(method, shapes, tokens)
    if clips and isinstance(shapes.grid, GroupedGrid):
        parts["clip search"] = _clip_work(method, shapes, tokens)
    return Cost(held=max(scales, clip), keeps=keeps, lighter="rtn", parts=parts)


def _scales_work(method: AWQ, shapes: Shapes, tokens: int) -> dict[str, Work]:
    layer, all_ = shapes.layer, shapes.rows
    inner = [names for names in shapes.sites if not set(names).isdisjoint(shapes.inner)]
    known = {n for names in inner for n in names}
    # Candidates are left once they have lost: all are begun, about two are finished.
    part = _SEARCHED if shapes.device.type == "cpu" else TOKENS_PER_PASS
    begun = min(1.0, (FIRST if method.doubt else 1) * part / tokens)
    tried = method.exponents * begun + 2 * (1 - begun)
    # Inside an MLP a site is judged through its Gram matrix, the others by running their part.
    rest = layer.active - sum(
        layer.share(n) * a * b for n, (a, b) in layer.linears.items() if n in known
    )
    gathered = judged = summed = 0.0
    for names in inner:
        wide, outputs = layer.linears[names[0]][1], sum(layer.linears[n][0] for n in names)
        gathered += 2.0 * tokens * layer.share(names[0]) * wide**2
        judged += all_.part(2.0 * outputs * wide**2 * tried)
        summed += 4.0 * wide**2
    moved = float(_CANDIDATE * layer.weights * method.exponents)
    return {
        "scale search": shapes.products(2.0 * rest * tokens * (1 + tried))
        + shapes.grams(gathered)
        + Work(single=judged)
        + all_.summed(summed),
        "candidates rounded": Work(moved=moved),
    }


def _clip_work(method: AWQ, shapes: Shapes, tokens: int) -> Work:
    size, layer, all_ = shapes.grid.group_size, shapes.layer, shapes.rows
    seen = min(tokens, math.ceil(all_.part(method.clip_tokens)) or tokens)
    moments = sum(2.0 * seen * width * (size or width) for width in shapes.widths)
    searched = sum(2.0 * a * b * (size or b) for a, b in layer.linears.values()) * method.shrinks
    moved = _SHRINK * layer.weights * method.shrinks
    own = Work(single=searched, moved=moved) * all_.part(1)
    squares = sum(4.0 * width * (size or width) for width in shapes.widths)
    limits = sum(4.0 * 4 * a * (b // (size or b)) for a, b in layer.linears.values())
    return shapes.grams(moments) + own + all_.summed(squares) + all_.gathered(limits)
