"""AWQ (arXiv 2306.00978): per-channel scales that protect the channels with large activations, and a search for clipped ranges.

The defaults are the variant that TesseraQ starts from: scales chosen on the float stream, the range shrunk toward both its
own ends ("asymmetric" clip) on the quantized stream. The official repository shrinks the absolute maximum ("symmetric").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from ..grid import Affine, Codebook, Grid, KQuant, Reading
from ..model.block import Block, Call, first
from ..model.rewrite import fold
from ..model.wiring import Site

Clip = Literal["asymmetric", "symmetric", "none"]

_TOKENS = 1024  # of a batch on which a candidate's error is computed before it is looked at
_PARTS = 8  # of a linear's outputs, likewise
_HELD = 1 << 27  # bytes of quantized candidates held rather than made again when their turn comes


@dataclass(frozen=True)
class AWQ:
    """The knobs of AWQ.

    Attributes:
        scales: search and fold per-channel scales.
        clip: which clip search to run after it, if any.
        exponents: how many exponents of the mean activation are tried, n / exponents for n = 0, 1, ...
        shrinks: how many range factors are tried, 1 - i/20 for i = 0, 1, ...
        rows: calibration rows used by both searches, at most.
        clip_tokens: tokens of them the clip search looks at; 0 means all.
        clip_sampling: which tokens: "random", or "strided" as the reference, where every 512th token is often a first token.

    On K-quants every range that is tried is fitted by their own search, inputs weighted by their mean square.

    Codebooks have no range to clip; where each column has its own, scales change no code either and are left out, unless the
    site's input is quantized. Both are remarked.
    """

    scales: bool = True
    clip: Clip = "asymmetric"
    exponents: int = 20
    shrinks: int = 10
    rows: int = 32
    clip_tokens: int = 512
    clip_sampling: Literal["random", "strided"] = "random"

    def __call__(self, block: Block) -> Block:
        rows = min(self.rows, block.tuned_rows)
        chosen: dict[str, float] = {}
        if self.scales:
            searched = [s for s in block.wiring.sites if s.source is not None and foldable(block, s) and not _indifferent(block, s)]
            block.announce("awq: inputs")
            seen = seen_at(block, [s for s in searched if not on_grid(block, s)], rows)
            for site in searched:
                block.announce(f"awq: scales of {', '.join(site.reads)}")
                key = site.reads[0]
                arrived = seen.pop(key) if key in seen else seen_at(block, [site], rows)[key]
                factor, exponent = search_scale(block, site, arrived, self.exponents)
                chosen[key] = exponent
                if exponent > 0:
                    block = fold(block, site, factor)
        uniform = not any(isinstance(g, Codebook) for g in block.grids.values())
        if self.clip != "none" and uniform:
            block = self._clipped(block, rows)
        if not uniform:
            done = "no clip" if chosen else "nothing: each column has levels of its own"
            block = block.noted(trouble=[*block.notes.get("trouble", ()), f"awq: on codebooks {done}"])
        return block.noted(awq_exponents=chosen)

    def _clipped(self, block: Block, rows: int) -> Block:
        grams = self._group_moments(block, rows)
        spared = dict(block.wiring.unclipped)
        weights, params = {}, {}
        for site in block.wiring.sites:
            for name in site.reads:
                block.announce(f"awq: clip of {name}")
                weight, grid = block.weight(name), _ranged(block.grids[name])
                gram, drift = grams[site.reads[0], grid.group(weight.shape[1])]
                low, high = search_clip(
                    weight, gram, grid, self.shrinks, symmetric=self.clip == "symmetric", skip_rows=spared.get(name, 0), drift=drift
                )
                g = grid.grouped(weight)
                clamped = torch.minimum(torch.maximum(g, low[..., None]), high[..., None]).flatten(1)
                weights[name] = clamped
                params[name] = _fitted(grid, clamped, gram)
        return block.clipped(weights, params)

    def _group_moments(self, block: Block, rows: int) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
        """(first reader of a site, group length) -> sums over the quantized stream, (groups, group, group) each.

        With x the input in floating point and q what its activation grid makes of it: q q^T, and q (q - x)^T, or None where
        activations are not quantized.
        """
        groups: dict[str, set[int]] = {}
        for site in block.wiring.sites:
            groups[site.reads[0]] = {_ranged(block.grids[n]).group(block.weight(n).shape[1]) for n in site.reads}
        picked = pick_tokens(rows * block.xq.shape[1], self.clip_tokens, self.clip_sampling, torch.Generator().manual_seed(block.seed))
        moments: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        seen = dict.fromkeys(groups, 0)
        exact = block.exact()

        def visit(name: str, call: Call) -> None:
            x, q = exact.entering(name, call.args[0]).flatten(0, -2), block.entering(name, call.args[0]).flatten(0, -2)
            at = seen[name]
            seen[name] += len(x)
            if picked is not None:
                here = (picked[(picked >= at) & (picked < at + len(x))] - at).to(x.device)
                x, q = x[here], q[here]
            reading = block.readings.get(name)
            e = None if reading is None or reading.grid is None else q - x
            for group in groups[name]:
                cut = [None if t is None else t.reshape(len(x), -1, group).transpose(0, 1).float() for t in (q, e)]
                found = [None if t is None else cut[0].transpose(1, 2) @ t for t in cut]  # type: ignore[union-attr]
                before = moments.get((name, group), (None, None))
                gram, drift = (b if f is None else f if b is None else b + f for b, f in zip(before, found, strict=True))
                assert gram is not None
                moments[name, group] = gram, drift

        with torch.no_grad():
            block.observe(list(groups), block.xq, rows, visit)
        return moments


def _ranged(grid: Grid) -> Affine | KQuant:
    assert isinstance(grid, (Affine, KQuant))
    return grid


def _fitted(grid: Affine | KQuant, weight: Tensor, gram: Tensor) -> Any:
    """Params for a weight whose groups' inputs have these second moments."""
    return grid.fit(weight, gram.diagonal(dim1=1, dim2=2).flatten()) if isinstance(grid, KQuant) else grid.fit(weight)


def _indifferent(block: Block, site: Site) -> bool:
    """Whether a per-channel factor would change no code: where every channel has a codebook of its own and is read as it is."""
    return all(
        isinstance(g := block.grids[n], Codebook) and g.scales_with_inputs and (n not in block.readings or block.readings[n].grid is None)
        for n in site.reads
    )


def foldable(block: Block, site: Site) -> bool:
    """Whether a per-channel factor can be folded at a site: not behind an online rotation, where channels are mixed."""
    return all(block.readings[n].rotation is None for n in site.reads if n in block.readings)


def _rtn(weight: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    params = grid.stored(grid.fit(weight), stored)
    rounded: Tensor = grid.decode(grid.encode(weight, params), params)
    return rounded


@dataclass
class Seen:
    """What arrives at a site on the float stream, as far as a search of its scales needs it.

    Attributes:
        tokens: how many. size: (channels,) float64, the sum of |x| over them.
        gram: (channels, channels), the sum of x x^T, where the site's probe is a linear that reads x in floating point; else None.
        inputs: x, batch by batch, where the probe is a linear that reads x on a grid; else empty.
        calls: what the probe is called with, batch by batch, where it is a submodule; else empty.
    """

    tokens: int
    size: Tensor
    gram: Tensor | None
    inputs: list[Tensor]
    calls: list[Call]

    @property
    def mean(self) -> Tensor:
        """(channels,) float64, the mean of |x|."""
        return self.size / self.tokens


@torch.no_grad()
def seen_at(block: Block, sites: Sequence[Site], rows: int) -> dict[str, Seen]:
    """What arrives at some sites on the first rows of the float stream, in one pass: a factor folded at one site changes nothing at another.

    Returns:
        by each site's first reader.
    """
    exact, seen, of = block.exact(), {}, {name: site for site in sites for name in (site.reads[0], site.probe)}
    for site in sites:
        width = block.weight(site.reads[0]).shape[1]
        seen[site.reads[0]] = Seen(0, torch.zeros(width, dtype=torch.float64, device=block.device), None, [], [])

    def visit(name: str, call: Call) -> None:
        site = of[name]
        at = seen[site.reads[0]]
        if name == site.probe and name not in site.reads:
            at.calls.append(call)
        if name != site.reads[0]:
            return
        x = call.args[0]
        at.tokens += x[..., 0].numel()
        at.size += x.flatten(0, -2).abs().sum(0, dtype=torch.float64)
        if site.probe in site.reads and on_grid(block, site):
            at.inputs.append(x)
        elif site.probe in site.reads:
            flat = x.flatten(0, -2).to(block.weight(name).dtype)
            at.gram = flat.T @ flat if at.gram is None else at.gram.addmm_(flat.T, flat)

    # Few rows at a time can be told apart sooner; but an activation grid may look at all rows of a pass.
    whole = block.kv is not None or bool(block.readings) or block.device.type != "cpu"
    step = rows if whole else max(1, _TOKENS // block.x.shape[1])
    for start in range(0, rows, step):
        exact.observe(list(of), block.x[start : start + step], min(step, rows - start), visit)
    return seen


def on_grid(block: Block, site: Site) -> bool:
    """Whether the readers of a site quantize their input."""
    reading = block.readings.get(site.reads[0])
    return reading is not None and reading.grid is not None


@torch.no_grad()
def search_scale(block: Block, site: Site, seen: Seen, exponents: int) -> tuple[Tensor, float]:
    """The per-channel factor mean|x| ** exponent, normalised, that makes the site's quantized readers hurt least.

    Returns:
        (channels,) factor, and its exponent in [0, 1).
    """
    candidates = []
    for n in range(exponents):
        factor = seen.mean.pow(n / exponents).clamp(min=1e-4)
        candidates.append((factor / (factor.max() * factor.min()).sqrt(), n / exponents))
    return least_harmful(block, site, seen, candidates)


@torch.no_grad()
def least_harmful(block: Block, site: Site, seen: Seen, candidates: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, float]:
    """Of the given per-channel factors, with a number each, the one under which the site's quantized readers hurt least, and its number.

    An error is a sum of squares over parts: once a candidate's has outgrown the least of those known, the rest of it need not be computed.
    The most promising after one part go first. What is chosen is what computing everything would choose.
    """
    probe = _linear_probe(block, site, seen) if site.probe in site.reads else _module_probe(block, site, seen.calls)
    reading = block.readings.get(site.reads[0])

    def under(factor: Tensor) -> tuple[dict[str, Tensor], dict[str, Reading]]:
        quantized = {}
        for name in site.reads:
            weight = block.weight(name)
            scaled = (weight.double() * factor).to(weight.dtype)
            quantized[name] = (_rtn(scaled, block.grids[name], block.stored).double() / factor).to(weight.dtype)
        return quantized, {} if reading is None else dict.fromkeys(site.reads, reading.with_factor(factor))

    size = len(candidates) * sum(block.weight(n).numel() * block.weight(n).element_size() for n in site.reads)
    made = [under(factor) if size <= _HELD else None for factor, _ in candidates]
    parts = [probe.error(*(held or under(factor)), 0) for held, (factor, _) in zip(made, candidates, strict=True)]
    firsts = torch.stack(parts).nan_to_num(nan=float("inf")).tolist()  # in one go: an accelerator is waited for once
    best, least = -1, float("inf")
    for i in sorted(range(len(candidates)), key=lambda i: (firsts[i], i)):
        if firsts[i] > least or firsts[i] == float("inf"):
            break
        total = firsts[i]
        quantized, read = (made[i] or under(candidates[i][0])) if probe.parts > 1 else ({}, {})
        for part in range(1, probe.parts):
            total += float(probe.error(quantized, read, part))
            if not total <= least:
                break
        if total < least or (total == least and i < best):
            best, least = i, total
    if best < 0:
        return torch.ones(len(seen.size), dtype=torch.float64, device=block.device), 0.0
    return candidates[best]


class _linear_probe:
    """Output error of a single linear, through its inputs' Gram matrix where they stay in floating point: exact, and free of
    the number of tokens. Its parts are outputs then, else batches."""

    def __init__(self, block: Block, site: Site, seen: Seen) -> None:
        self.name, self.weight, self.seen = site.probe, block.weight(site.probe), seen
        self.parts = len(seen.inputs) if seen.gram is None else min(_PARTS, len(self.weight))

    def error(self, quantized: Mapping[str, Tensor], readings: Mapping[str, Reading], part: int) -> Tensor:
        weight, gram = quantized[self.name], self.seen.gram
        if gram is not None:
            rows = slice(part * len(weight) // self.parts, (part + 1) * len(weight) // self.parts)
            delta = weight[rows] - self.weight[rows]
            return ((delta @ gram) * delta).sum(dtype=torch.float64)
        x = self.seen.inputs[part]
        delta = readings[self.name](x).to(weight.dtype) @ weight.T - x.to(weight.dtype) @ self.weight.T
        return delta.pow(2).sum(dtype=torch.float64)


class _module_probe:
    """Output error of a submodule (attention, MLP) on the calls it received, which are its parts."""

    def __init__(self, block: Block, site: Site, calls: list[Call]) -> None:
        self.block, self.module, self.calls, self.prefix = block, block.module.get_submodule(site.probe), calls, site.probe + "."
        self.compute, self.exact = block.compute, block.exact().readings
        self.weights = {k[len(self.prefix) :]: v for k, v in block.weights.items() if k.startswith(self.prefix)}
        self.expected = [self._run(call, self.weights, self.exact) for call in calls]
        self.parts = len(calls)

    def _run(self, call: Call, weights: Mapping[str, Tensor], readings: Mapping[str, Reading]) -> Tensor:
        cast = {k: w.to(self.compute) for k, w in weights.items()}
        with self.block.reading(readings):
            return first(functional_call(self.module, cast, call.args, dict(call.kwargs)))

    def error(self, quantized: Mapping[str, Tensor], readings: Mapping[str, Reading], part: int) -> Tensor:
        weights = {**self.weights, **{f"{k[len(self.prefix) :]}.weight": v for k, v in quantized.items()}}
        y = self._run(self.calls[part], weights, {**self.exact, **readings})
        return (y - self.expected[part]).pow(2).sum(dtype=torch.float64)


def pick_tokens(total: int, count: int, sampling: str, generator: torch.Generator) -> Tensor | None:
    """Numbers of ``count`` of ``total`` tokens: random ones without replacement or every n-th; None for all (count 0 or enough)."""
    if count == 0 or total <= count:
        return None
    if sampling == "strided":
        return torch.arange(0, total, total // count)[:count]
    return torch.randperm(total, generator=generator)[:count]


@torch.no_grad()
def search_clip(
    weight: Tensor, gram: Tensor, grid: Affine | KQuant, shrinks: int, *, symmetric: bool = False, skip_rows: int = 0, drift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per group, the shrunk range whose rounded weights change that group's partial output least.

    Args:
        weight: (out, in) float. gram: (groups, group, group) float, the sum of q q^T over what enters each group's product.
        shrinks: factors 1 - i/20 for i < shrinks.
        symmetric: clip to the shrunk absolute maximum on both sides instead of to the shrunk minimum and maximum.
        skip_rows: leading rows that keep their full range.
        drift: (groups, group, group), the sum of q (q - x)^T, if q is a quantized form of the input x; the output to be kept is x's.

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
        clamped = torch.minimum(torch.maximum(g, (low_full * p)[..., None]), (high_full * p)[..., None])
        params = _fitted(grid, clamped.flatten(1), gram)
        decoded: Tensor = grid.decode(grid.encode(clamped.flatten(1), params), params)
        delta = (grid.grouped(decoded) - g).transpose(0, 1)
        error = ((delta @ gram + pull) * delta).sum(-1).T  # (groups, out, group) -> (out, groups)
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, p, factor)
    factor[:skip_rows] = 1.0
    return low_full * factor, high_full * factor
