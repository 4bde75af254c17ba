"""AWQ (arXiv 2306.00978): per-channel scales that protect the channels with large activations, and
a search for clipped ranges.

The defaults are the variant that TesseraQ starts from: scales chosen on the float stream, the range
shrunk toward both its own ends ("asymmetric" clip) on the quantized stream. The official repository
shrinks the absolute maximum ("symmetric").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, Codebook, Grid, KQuant
from ..model.block import Block, Call
from ..model.rewrite import fold
from ..model.wiring import Site
from ._probe import on_grid, search_scale, seen_at

Clip = Literal["asymmetric", "symmetric", "none"]


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

    On K-quants every range that is tried is fitted by their own search, inputs weighted by their
    mean square.

    Codebooks have no range to clip; where each column has its own, scales change no code either and
    are left out, unless the site's input is quantized. Both are remarked.

    Raises:
        LowbitError: an option is out of range.
    """

    scales: bool = True
    clip: Clip = "asymmetric"
    exponents: int = 20
    shrinks: int = 10
    rows: int = 32
    clip_tokens: int = 512
    clip_sampling: Literal["random", "strided"] = "random"

    def __post_init__(self) -> None:
        if (
            self.exponents < 1
            or not 1 <= self.shrinks <= 20
            or self.rows < 1
            or self.clip_tokens < 0
        ):
            raise LowbitError(
                "awq needs exponents >= 1, shrinks from 1 to 20, rows >= 1 and clip_tokens >= 0."
            )

    def __call__(self, block: Block) -> Block:
        rows = min(self.rows, block.tuned_rows)
        chosen: dict[str, float] = {}
        if self.scales:
            searched = [
                s
                for s in block.wiring.sites
                if s.source is not None and foldable(block, s) and not _indifferent(block, s)
            ]
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
            block = block.noted(
                trouble=[*block.notes.get("trouble", ()), f"awq: on codebooks {done}"]
            )
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
                    weight,
                    gram,
                    grid,
                    self.shrinks,
                    symmetric=self.clip == "symmetric",
                    skip_rows=spared.get(name, 0),
                    drift=drift,
                )
                g = grid.grouped(weight)
                clamped = torch.minimum(torch.maximum(g, low[..., None]), high[..., None]).flatten(
                    1
                )
                weights[name] = clamped
                params[name] = _fitted(grid, clamped, gram)
        return block.clipped(weights, params)

    def _group_moments(
        self, block: Block, rows: int
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
        """(first reader of a site, group length) -> sums over the quantized stream, (groups, group,
        group) each.

        With x the input in floating point and q what its activation grid makes of it: q q^T, and q
        (q - x)^T, or None where activations are not quantized.
        """
        groups: dict[str, set[int]] = {}
        for site in block.wiring.sites:
            groups[site.reads[0]] = {
                _ranged(block.grids[n]).group(block.weight(n).shape[1]) for n in site.reads
            }
        picked = pick_tokens(
            rows * block.xq.shape[1],
            self.clip_tokens,
            self.clip_sampling,
            torch.Generator().manual_seed(block.seed),
        )
        picked = None if picked is None else block.ranks.tokens(picked, block.xq.shape[1])
        moments: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        seen = dict.fromkeys(groups, 0)
        exact = block.exact()

        def visit(name: str, call: Call) -> None:
            x, q = (
                exact.entering(name, call.args[0]).flatten(0, -2),
                block.entering(name, call.args[0]).flatten(0, -2),
            )
            at = seen[name]
            seen[name] += len(x)
            if picked is not None:
                here = (picked[(picked >= at) & (picked < at + len(x))] - at).to(x.device)
                x, q = x[here], q[here]
                if not len(here):
                    return
            reading = block.readings.get(name)
            e = None if reading is None or reading.grid is None else q - x
            for group in groups[name]:
                cut = [
                    None if t is None else t.reshape(len(x), -1, group).transpose(0, 1).float()
                    for t in (q, e)
                ]
                found = [None if t is None else cut[0].transpose(1, 2) @ t for t in cut]  # type: ignore[union-attr]
                before = moments.get((name, group), (None, None))
                gram, drift = (
                    b if f is None else f if b is None else b + f
                    for b, f in zip(before, found, strict=True)
                )
                assert gram is not None
                moments[name, group] = gram, drift

        with torch.no_grad():
            block.observe(list(groups), block.xq, rows, visit)
        return _summed(block, groups, moments)


def _summed(
    block: Block,
    groups: Mapping[str, set[int]],
    moments: Mapping[tuple[str, int], tuple[Tensor, Tensor | None]],
) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
    """The moments over all ranks, of which some may have seen no token of the few rows looked
    at.
    """
    if block.ranks.size == 1:
        return dict(moments)
    out: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
    for name, cuts in groups.items():
        reading = block.readings.get(name)
        for group in sorted(cuts):
            zeros = torch.zeros(
                block.weight(name).shape[1] // group, group, group, device=block.device
            )
            drifts = reading is not None and reading.grid is not None
            gram, drift = moments.get((name, group), (zeros, zeros.clone() if drifts else None))
            block.ranks.sum_(gram, *([] if drift is None else [drift]))
            out[name, group] = gram, drift
    return out


def _ranged(grid: Grid) -> Affine | KQuant:
    assert isinstance(grid, (Affine, KQuant))
    return grid


def _fitted(grid: Affine | KQuant, weight: Tensor, gram: Tensor) -> Any:
    """Params for a weight whose groups' inputs have these second moments."""
    return (
        grid.fit(weight, gram.diagonal(dim1=1, dim2=2).flatten())
        if isinstance(grid, KQuant)
        else grid.fit(weight)
    )


def _indifferent(block: Block, site: Site) -> bool:
    """Whether a per-channel factor would change no code: where every channel has a codebook of its
    own and is read as it is.
    """
    return all(
        isinstance(g := block.grids[n], Codebook)
        and g.scales_with_inputs
        and (n not in block.readings or block.readings[n].grid is None)
        for n in site.reads
    )


def foldable(block: Block, site: Site) -> bool:
    """Whether a per-channel factor can be folded at a site: not behind an online rotation, where
    channels are mixed.
    """
    return all(block.readings[n].rotation is None for n in site.reads if n in block.readings)


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
    grid: Affine | KQuant,
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
        params = _fitted(grid, clamped.flatten(1), gram)
        decoded: Tensor = grid.decode(grid.encode(clamped.flatten(1), params), params)
        delta = (grid.grouped(decoded) - g).transpose(0, 1)
        error = ((delta @ gram + pull) * delta).sum(-1).T  # (groups, out, group) -> (out, groups)
        better = error < best
        best, factor = torch.where(better, error, best), torch.where(better, p, factor)
    factor[:skip_rows] = 1.0
    return low_full * factor, high_full * factor
