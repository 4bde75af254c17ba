"""Which per-channel factor of a site makes its quantized readers hurt least: what arrives there,
and the error under a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from ..grid import AnyGrid, InputQuantizer
from ..model.block import Block, first
from ..model.context import in_dtype
from ..model.graph import Site
from ..model.hooks import quantized_inputs
from ..model.statistics import Call, Value
from ..model.statistics import Seen as Arrived
from . import _gram
from ._race import FIRST, least

_TOKENS = 1024  # of a batch on which a candidate's error is computed before it is looked at
_PARTS = 8  # of a linear's outputs, likewise
_HELD = 1 << 27  # bytes of quantized candidates held rather than made again when their turn comes


def _rtn(weight: Tensor, grid: AnyGrid, stored: torch.dtype) -> Tensor:
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
def collect_inputs(block: Block, sites: Sequence[Site], rows: int) -> dict[str, Seen]:
    """What arrives at some sites on the first rows of the float stream, in one pass: a factor
    folded at one site changes nothing at another.

    Returns:
        by each site's first reader.
    """
    kept: dict[str, list[Call]] = {}
    linear = [s.reader for s in sites if s.probe in s.reads]
    grams = {s.reader for s in sites if s.probe in s.reads and not on_grid(block, s)}
    for site in sites:
        if site.reader not in grams:
            kept[_called(site)] = []

    def sums(seen: Arrived) -> Value:
        size = seen.arrived.abs().sum(0, dtype=torch.float64)  # (channels,)
        if seen.linear not in grams:
            return size
        return size, _gram.gram(seen.arrived, block.weight(seen.linear).dtype)

    # Few rows at a time can be told apart sooner; but an activation grid may look at all rows of a
    # pass.
    whole = block.kv is not None or bool(block.input_quantizers) or block.device.type != "cpu"
    # Of all ranks together, so that a part is of the same rows however many there are.
    most = None if whole else max(1, _TOKENS // block.x.shape[1] // block.ranks.size)
    first_readers = [site.reader for site in sites]
    found = block.statistics(first_readers, "float", sums, rows=rows, most=most, keep=kept)
    out: dict[str, Seen] = {}
    for site in sites:
        name = site.reader
        calls, (size, *gram) = kept.get(_called(site), []), found[name].values
        inputs = [call.args[0] for call in calls] if name in linear else []
        held = [] if name in linear else calls
        out[name] = Seen(found[name].tokens, size, gram[0] if gram else None, inputs, held)
    return out


def _called(site: Site) -> str:
    """The submodule whose calls a search needs."""
    return site.reader if site.probe in site.reads else site.probe


def on_grid(block: Block, site: Site) -> bool:
    """Whether the readers of a site quantize their input."""
    input_quantizer = block.input_quantizers.get(site.reads[0])
    return input_quantizer is not None and input_quantizer.grid is not None


@torch.no_grad()
def best_scale(
    block: Block,
    site: Site,
    seen: Seen,
    candidates: Sequence[tuple[Tensor, float]],
    doubt: float = 0.0,
) -> tuple[Tensor, float]:
    """Of the given per-channel factors, with a number each, the one under which the site's
    quantized readers hurt least, and its number; ones and 0 if no error is finite.

    Args:
        doubt: see `least`.
    """
    factors = [factor for factor, _ in candidates]
    trials = _Trials(block, site, seen, factors)
    best = least(len(candidates), trials.parts, trials.errors, doubt)
    if best and trials.coarse:
        best = _checked(block, site, seen, [factors[0], factors[best]], (0, best))
    if best is None:
        return torch.ones(len(seen.size), dtype=torch.float64, device=block.device), 0.0
    return candidates[best]


def _checked(
    block: Block, site: Site, seen: Seen, factors: Sequence[Tensor], numbers: tuple[int, int]
) -> int | None:
    """Which of two candidates has the least error on a few parts, computed in float32."""
    wide = block.computing(torch.float32)
    calls = [
        Call(in_dtype(c.args, wide.compute), in_dtype(c.kwargs, wide.compute))
        for c in seen.calls[:FIRST]
    ]
    trials = _Trials(wide, site, replace(seen, calls=calls), factors)
    best = least(2, trials.parts, trials.errors)
    return None if best is None else numbers[best]


Trial = tuple[dict[str, Tensor], dict[str, InputQuantizer]]


class _Trials:
    """The quantized readers of a site under each factor, and their errors.

    Attributes:
        parts: of an error, the most that any rank has. coarse: whether errors are of passes in 16
            bits.
    """

    def __init__(self, block: Block, site: Site, seen: Seen, factors: Sequence[Tensor]) -> None:
        self._block, self._site, self._factors = block, site, factors
        linear = site.probe in site.reads
        self._probe: _LinearProbe | _ModuleProbe = (
            _LinearProbe(block, site, seen) if linear else _ModuleProbe(block, site, seen.calls)
        )
        self.coarse = not linear and block.compute.itemsize < torch.float32.itemsize
        [self.parts] = block.ranks.stacked(torch.tensor([self._probe.parts])).amax(0).tolist()
        bytes_ = sum(block.weight(n).nbytes for n in site.reads)
        self._held = len(factors) * bytes_ <= _HELD
        self._last: tuple[int, Trial] | None = None
        self._made: dict[int, Trial] = {}

    def _under(self, i: int) -> Trial:
        """Quantized weights, factor taken out again, and how inputs are read, under a factor."""
        if i in self._made:
            return self._made[i]
        if self._last is not None and self._last[0] == i:
            return self._last[1]
        block, factor, quantized = self._block, self._factors[i], {}
        for name in self._site.reads:
            weight = block.weight(name)
            scaled = (weight.double() * factor).to(weight.dtype)
            rounded = _rtn(scaled, block.grids[name], block.stored)
            quantized[name] = (rounded.double() / factor).to(weight.dtype)
        own, read = block.input_quantizers.get(self._site.reads[0]), dict[str, InputQuantizer]()
        if own is not None:
            read = dict.fromkeys(self._site.reads, own.with_factor(factor))
        if self._held:
            self._made[i] = quantized, read
        else:
            self._last = i, (quantized, read)
        return quantized, read

    def _part(self, i: int, part: int) -> Tensor:
        """() float64, the error of a candidate on a part, over all ranks."""
        if part < self._probe.parts:
            own = self._probe.error(*self._under(i), part)
        else:
            own = torch.zeros((), dtype=torch.float64, device=self._block.device)
        self._block.ranks.sum_(own)
        return own

    def errors(self, candidates: Sequence[int], parts: range) -> list[list[float]]:
        """(candidates, parts), over all ranks; what is no number is infinite."""
        found = torch.stack([self._part(i, p) for i in candidates for p in parts])
        # In one go: an accelerator is waited for once.
        errors = found.nan_to_num(nan=float("inf")).view(len(candidates), len(parts))
        out: list[list[float]] = errors.tolist()
        return out


class _LinearProbe:
    """Output error of a single linear, through its inputs' Gram matrix where they stay in floating
    point: exact, and free of the number of tokens. Its parts are outputs then, else batches.
    """

    def __init__(self, block: Block, site: Site, seen: Seen) -> None:
        self.name, self.weight, self.seen = site.probe, block.weight(site.probe), seen
        self.share = block.ranks.share  # of a part's outputs, where the Gram matrix is known
        self.parts = len(seen.inputs) if seen.gram is None else min(_PARTS, len(self.weight))

    def error(
        self,
        quantized: Mapping[str, Tensor],
        input_quantizers: Mapping[str, InputQuantizer],
        part: int,
    ) -> Tensor:
        weight, gram = quantized[self.name], self.seen.gram
        if gram is not None:
            first, last = ((part + i) * len(weight) // self.parts for i in (0, 1))
            own = self.share(last - first)
            rows = slice(first + own.start, first + own.stop)
            delta = weight[rows] - self.weight[rows]
            return ((delta @ gram) * delta).sum(dtype=torch.float64)
        x = self.seen.inputs[part]
        delta = (
            input_quantizers[self.name](x).to(weight.dtype) @ weight.T
            - x.to(weight.dtype) @ self.weight.T
        )
        return delta.float().pow(2).sum(dtype=torch.float64)


class _ModuleProbe:
    """Output error of a submodule (attention, MLP, or the block) on the calls it received, which
    are its parts.
    """

    def __init__(self, block: Block, site: Site, calls: list[Call]) -> None:
        self.block, self.calls = block, calls
        self.prefix = f"{site.probe}." if site.probe else ""
        self.module = block.module.get_submodule(site.probe)
        self.part, self.exact = site.probe, block.exact().input_quantizers
        self.weights = {
            k[len(self.prefix) :]: v for k, v in block.weights.items() if k.startswith(self.prefix)
        }
        self.expected = [self._run(call, self.weights, self.exact) for call in calls]
        self.parts = len(calls)

    def _run(
        self,
        call: Call,
        weights: Mapping[str, Tensor],
        input_quantizers: Mapping[str, InputQuantizer],
    ) -> Tensor:
        cast = self.block.context.cast(weights, self.part)
        with quantized_inputs(self.block.module, input_quantizers):
            return first(functional_call(self.module, cast, call.args, dict(call.kwargs)))

    def error(
        self,
        quantized: Mapping[str, Tensor],
        input_quantizers: Mapping[str, InputQuantizer],
        part: int,
    ) -> Tensor:
        weights = {
            **self.weights,
            **{f"{k[len(self.prefix) :]}.weight": v for k, v in quantized.items()},
        }
        y = self._run(self.calls[part], weights, {**self.exact, **input_quantizers})
        # Squares overflow 16 bits.
        return (y.float() - self.expected[part].float()).pow(2).sum(dtype=torch.float64)
