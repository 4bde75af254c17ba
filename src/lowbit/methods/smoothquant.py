"""SmoothQuant (arXiv 2211.10438): moves part of the activations' per-channel range into the weights
that read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LowbitError
from ..model.block import Block, Call
from ..model.rewrite import fold

_LEAST = 1e-5


@dataclass(frozen=True)
class SmoothQuant:
    """The knobs of SmoothQuant. Folds into the norms before attention and MLP only, as published.

    Attributes:
        alpha: migration strength, factor = max|x|**alpha / max|w|**(1 - alpha) per channel. 0.5 in
            the paper's OPT runs, 0.85 in the authors' Llama-2 7B and 13B runs.
        rows: calibration rows whose channel maxima are taken, at most; 0 means all.
    """

    alpha: float = 0.85
    rows: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.rows < 0:
            raise LowbitError("smoothquant needs alpha in [0, 1] and rows >= 0.")

    def __call__(self, block: Block) -> Block:
        sites = {
            s.reads[0]: s
            for s in block.wiring.sites
            if s.source is not None and s.source.kind == "norm" and s.residual
        }
        ranges = channel_ranges(
            block, list(sites), min(self.rows or block.tuned_rows, block.tuned_rows)
        )
        for name, site in sites.items():
            weights = torch.stack([block.weight(n).abs().amax(0) for n in site.reads]).amax(0)
            low, high = ranges[name]
            block = fold(block, site, smoothing(torch.maximum(-low, high), weights, self.alpha))
        return block


@torch.no_grad()
def channel_ranges(block: Block, linears: list[str], rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and largest value of each input channel of some linears on the float stream,
    (channels,) each.
    """
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(name: str, call: Call) -> None:
        x = call.args[0].flatten(0, -2)
        low, high = x.amin(0), x.amax(0)
        if name in ranges:
            low, high = torch.minimum(ranges[name][0], low), torch.maximum(ranges[name][1], high)
        ranges[name] = low, high

    if linears:
        block.exact().observe(linears, block.x, rows, visit)
    return (
        ranges
        if block.ranks.size == 1
        else {name: _over_ranks(block, name, ranges.get(name)) for name in linears}
    )


def _over_ranks(
    block: Block, linear: str, found: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Least and largest values over all ranks, of which some may have none of the rows looked
    at.
    """
    nothing = torch.full(
        (block.weight(linear).shape[1],), float("inf"), device=block.device, dtype=block.compute
    )
    low, high = (nothing, -nothing) if found is None else found
    ends = torch.stack([-low, high]).double()  # as every backend can compare
    block.ranks.max_(ends)
    return (-ends[0]).to(low.dtype), ends[1].to(low.dtype)


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The factor for each channel, (channels,) float64, from the channel maxima of both sides; 1
    where a channel is dead.
    """
    a, w = activations.double(), weights.double()
    factor = a.clamp(min=_LEAST).pow(alpha) / w.clamp(min=_LEAST).pow(1 - alpha)
    return torch.where((a > 0) & (w > 0), factor.clamp(min=_LEAST), torch.ones_like(factor))
