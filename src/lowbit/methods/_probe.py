"""Which per-channel factor of a site makes its quantized readers hurt least: what arrives there,
and the error under a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from ..grid import Grid, Reading
from ..model.block import Block, Call, first
from ..model.wiring import Site

_TOKENS = 1024  # of a batch on which a candidate's error is computed before it is looked at
_PARTS = 8  # of a linear's outputs, likewise
_HELD = 1 << 27  # bytes of quantized candidates held rather than made again when their turn comes


def _rtn(weight: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    params = grid.stored(grid.fit(weight), stored)
    rounded: Tensor = grid.decode(grid.encode(weight, params), params)
    return rounded


@dataclass
class Seen:
    """What arrives at a site on the float stream, as far as a search of its scales needs it.

    Attributes:
        tokens: how many. size: (channels,) float64, the sum of |x| over them.
        gram: (channels, channels), the sum of x x^T, where the site's probe is a linear that reads
            x in floating point; else None.
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
    """What arrives at some sites on the first rows of the float stream, in one pass: a factor
    folded at one site changes nothing at another.

    Returns:
        by each site's first reader.
    """
    exact, seen, of = (
        block.exact(),
        {},
        {name: site for site in sites for name in (site.reads[0], site.probe)},
    )
    for site in sites:
        width = block.weight(site.reads[0]).shape[1]
        seen[site.reads[0]] = Seen(
            0, torch.zeros(width, dtype=torch.float64, device=block.device), None, [], []
        )

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

    # Few rows at a time can be told apart sooner; but an activation grid may look at all rows of a
    # pass.
    whole = block.kv is not None or bool(block.readings) or block.device.type != "cpu"
    own = block.x[: block.ranks.count(rows)]
    step = rows if whole else max(1, _TOKENS // block.x.shape[1])
    for start in range(0, len(own), step):
        exact.observe(list(of), own[start : start + step], step * block.ranks.size, visit)
    for site in sites:
        _over_ranks(block, site, seen[site.reads[0]])
    return seen


def _over_ranks(block: Block, site: Site, seen: Seen) -> None:
    """Complete the sums, in place; batches stay where they are."""
    ranks = block.ranks
    if ranks.size == 1:
        return
    seen.tokens = int(ranks.total(seen.tokens)[0])
    ranks.sum_(seen.size)
    if site.probe in site.reads and not on_grid(block, site):
        width = len(seen.size)
        seen.gram = (
            torch.zeros(width, width, dtype=block.weight(site.probe).dtype, device=block.device)
            if seen.gram is None
            else seen.gram
        )
        ranks.sum_(seen.gram)


def on_grid(block: Block, site: Site) -> bool:
    """Whether the readers of a site quantize their input."""
    reading = block.readings.get(site.reads[0])
    return reading is not None and reading.grid is not None


@torch.no_grad()
def search_scale(block: Block, site: Site, seen: Seen, exponents: int) -> tuple[Tensor, float]:
    """The per-channel factor mean|x| ** exponent, normalised, that makes the site's quantized
    readers hurt least.

    Returns:
        (channels,) factor, and its exponent in [0, 1).
    """
    candidates = []
    for n in range(exponents):
        factor = seen.mean.pow(n / exponents).clamp(min=1e-4)
        candidates.append((factor / (factor.max() * factor.min()).sqrt(), n / exponents))
    return least_harmful(block, site, seen, candidates)


@torch.no_grad()
def least_harmful(
    block: Block, site: Site, seen: Seen, candidates: Sequence[tuple[Tensor, float]]
) -> tuple[Tensor, float]:
    """Of the given per-channel factors, with a number each, the one under which the site's
    quantized readers hurt least, and its number.

    An error is a sum of squares over parts: once a candidate's has outgrown the least of those
    known, the rest of it need not be computed. The most promising after one part go first. What is
    chosen is what computing everything would choose.
    """
    probe = (
        _linear_probe(block, site, seen)
        if site.probe in site.reads
        else _module_probe(block, site, seen.calls)
    )
    reading = block.readings.get(site.reads[0])

    def under(factor: Tensor) -> tuple[dict[str, Tensor], dict[str, Reading]]:
        quantized = {}
        for name in site.reads:
            weight = block.weight(name)
            scaled = (weight.double() * factor).to(weight.dtype)
            quantized[name] = (_rtn(scaled, block.grids[name], block.stored).double() / factor).to(
                weight.dtype
            )
        return quantized, {} if reading is None else dict.fromkeys(
            site.reads, reading.with_factor(factor)
        )

    [parts] = block.ranks.stacked(torch.tensor([probe.parts])).amax(0).tolist()

    def error(quantized: Mapping[str, Tensor], read: Mapping[str, Reading], part: int) -> Tensor:
        own = (
            probe.error(quantized, read, part)
            if part < probe.parts
            else torch.zeros((), dtype=torch.float64, device=block.device)
        )
        if not probe.complete:
            block.ranks.sum_(own)
        return own

    size = len(candidates) * sum(
        block.weight(n).numel() * block.weight(n).element_size() for n in site.reads
    )
    made = [under(factor) if size <= _HELD else None for factor, _ in candidates]
    first_errors = [
        error(*(held or under(factor)), 0)
        for held, (factor, _) in zip(made, candidates, strict=True)
    ]
    # In one go: an accelerator is waited for once.
    firsts = torch.stack(first_errors).nan_to_num(nan=float("inf")).tolist()
    best, least = -1, float("inf")
    for i in sorted(range(len(candidates)), key=lambda i: (firsts[i], i)):
        if firsts[i] > least or firsts[i] == float("inf"):
            break
        total = firsts[i]
        quantized, read = (made[i] or under(candidates[i][0])) if parts > 1 else ({}, {})
        for part in range(1, parts):
            total += float(error(quantized, read, part))
            if not total <= least:
                break
        if total < least or (total == least and i < best):
            best, least = i, total
    if best < 0:
        return torch.ones(len(seen.size), dtype=torch.float64, device=block.device), 0.0
    return candidates[best]


class _linear_probe:
    """Output error of a single linear, through its inputs' Gram matrix where they stay in floating
    point: exact, and free of the number of tokens. Its parts are outputs then, else batches.
    """

    def __init__(self, block: Block, site: Site, seen: Seen) -> None:
        self.name, self.weight, self.seen = site.probe, block.weight(site.probe), seen
        self.parts = len(seen.inputs) if seen.gram is None else min(_PARTS, len(self.weight))
        self.complete = seen.gram is not None  # else an error is that of this rank's rows

    def error(
        self, quantized: Mapping[str, Tensor], readings: Mapping[str, Reading], part: int
    ) -> Tensor:
        weight, gram = quantized[self.name], self.seen.gram
        if gram is not None:
            rows = slice(part * len(weight) // self.parts, (part + 1) * len(weight) // self.parts)
            delta = weight[rows] - self.weight[rows]
            return ((delta @ gram) * delta).sum(dtype=torch.float64)
        x = self.seen.inputs[part]
        delta = (
            readings[self.name](x).to(weight.dtype) @ weight.T - x.to(weight.dtype) @ self.weight.T
        )
        return delta.float().pow(2).sum(dtype=torch.float64)


class _module_probe:
    """Output error of a submodule (attention, MLP) on the calls it received, which are its
    parts.
    """

    def __init__(self, block: Block, site: Site, calls: list[Call]) -> None:
        self.block, self.module, self.calls, self.prefix = (
            block,
            block.module.get_submodule(site.probe),
            calls,
            site.probe + ".",
        )
        self.compute, self.exact = block.compute, block.exact().readings
        self.weights = {
            k[len(self.prefix) :]: v for k, v in block.weights.items() if k.startswith(self.prefix)
        }
        self.expected = [self._run(call, self.weights, self.exact) for call in calls]
        self.parts = len(calls)
        self.complete = False

    def _run(
        self, call: Call, weights: Mapping[str, Tensor], readings: Mapping[str, Reading]
    ) -> Tensor:
        cast = {k: w.to(self.compute) for k, w in weights.items()}
        with self.block.reading(readings):
            return first(functional_call(self.module, cast, call.args, dict(call.kwargs)))

    def error(
        self, quantized: Mapping[str, Tensor], readings: Mapping[str, Reading], part: int
    ) -> Tensor:
        weights = {
            **self.weights,
            **{f"{k[len(self.prefix) :]}.weight": v for k, v in quantized.items()},
        }
        y = self._run(self.calls[part], weights, {**self.exact, **readings})
        # Squares overflow 16 bits.
        return (y.float() - self.expected[part].float()).pow(2).sum(dtype=torch.float64)
