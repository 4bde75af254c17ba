"""What methods that scale channels share: where a factor can go, channel ranges, SmoothQuant's
factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.block import Block
from ..model.graph import Site
from ..model.statistics import Seen

_LEAST = 1e-5


def foldable(block: Block, site: Site) -> bool:
    """Whether a per-channel factor can be folded at a site: not behind an online rotation, where
    channels are mixed.
    """
    return all(
        block.input_quantizers[n].rotation is None
        for n in site.reads
        if n in block.input_quantizers
    )


def channel_ranges(
    block: Block, linears: Sequence[str], rows: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and largest value of each input channel of some linears on the float stream,
    (channels,) each.
    """

    def ends(seen: Seen) -> Tensor:
        x = seen.exact  # (tokens, channels)
        return torch.stack([-x.amin(0), x.amax(0)])  # (2, channels)

    found = block.statistics(linears, "float", ends, "max", rows=rows)
    return {name: (-s.value[0], s.value[1]) for name, s in found.items()}


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factor for each channel, (channels,) float64; 1 where a channel is dead.

    Args:
        activations, weights: (channels,) maxima of the sizes of both sides.
    """
    a, w = activations.double(), weights.double()
    factor = a.clamp(min=_LEAST).pow(alpha) / w.clamp(min=_LEAST).pow(1 - alpha)
    return torch.where((a > 0) & (w > 0), factor.clamp(min=_LEAST), torch.ones_like(factor))
