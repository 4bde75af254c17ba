"""SmoothQuant (arXiv 2211.10438): moves part of the activations' per-channel range into the weights
that read them.

    factor_j = max|x_j| ** alpha / max|w_j| ** (1 - alpha)        (equation 4)
    x_j <- x_j / factor_j,    w_j <- w_j * factor_j

over the tokens of the calibration text and over all linears that read the activation. The factor is
folded into the norm before attention and before the MLP, as published; other sites stay.
Helpers: `_equivalent` (the factor), `model.rewrite.fold`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import LowbitError
from ..model.block import Block
from ..model.rewrite import fold
from ._equivalent import channel_ranges, smoothing


@dataclass(frozen=True)
class SmoothQuant:
    """The knobs of SmoothQuant. Folds into the norms before attention and MLP only, as published.

    Attributes:
        alpha: migration strength. 0.5 in the paper's OPT runs, 0.85 in the authors' Llama-2 7B and
            13B runs.
        rows: calibration rows whose channel maxima are taken, at most; 0 means all.
    """

    alpha: float = 0.85
    rows: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.rows < 0:
            raise LowbitError("smoothquant needs alpha in [0, 1] and rows >= 0.")

    def __call__(self, block: Block) -> Block:
        sites = {
            s.reader: s
            for s in block.graph.sites
            if s.source is not None and s.source.kind == "norm" and s.residual
        }
        rows = min(self.rows or block.tuned_rows, block.tuned_rows)
        ranges = channel_ranges(block, list(sites), rows)
        for name, site in sites.items():
            weights = torch.stack([block.weight(n).abs().amax(0) for n in site.reads]).amax(0)
            low, high = ranges[name]
            factor = smoothing(torch.maximum(-low, high), weights, self.alpha)
            block = fold(block, site, factor)
        return block
