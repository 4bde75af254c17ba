"""How far each linear of a finished block is from the one it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .block import Block
from .statistics import Seen

_TOKENS = 256


@dataclass(frozen=True)
class LinearError:
    """Squared error of a linear's output relative to the output's own square, both summed over
    tokens and outputs.

    Attributes:
        nearest: of plain nearest codes on the plain range.
        tuned: of the finished linear.
    """

    nearest: float
    tuned: float


@torch.no_grad()
def linear_errors(block: Block) -> dict[str, LinearError]:
    """The error of every coded linear on what reaches it in the finished block, at most 256
    calibration tokens.

    The linear it is compared with has the weight that transforms left, before any clip, and reads
    the same tokens with activations in floating point.

    Args:
        block: all linears coded.
    """
    length = block.xq.shape[1]
    rows = min(block.tuned_rows, -(-_TOKENS // length))
    tokens = torch.arange(min(_TOKENS, rows * length))
    coded = {names[0]: [n for n in names if n in block.coded] for names in block.graph.readings}

    def squares(seen: Seen) -> Tensor:
        """(linears that read it, 3): of the output, the nearest one's error, the tuned one's."""
        return torch.stack([_squares(block, n, seen) for n in coded[seen.linear]])

    first = [name for name, linears in coded.items() if linears]
    found = block.statistics(first, "quantized", squares, rows=rows, tokens=tokens)
    out: dict[str, LinearError] = {}
    for name, statistic in found.items():
        relative = statistic.value[:, 1:] / statistic.value[:, :1].clamp(min=1e-300)
        for linear, (nearest, tuned) in zip(coded[name], relative.tolist(), strict=True):
            out[linear] = LinearError(nearest, tuned)
    return out


def _squares(block: Block, linear: str, seen: Seen) -> Tensor:
    """(3,) float64, as above for one linear."""
    grid, weight = block.grids[linear], block.weight(linear)
    whole = block.whole[linear].to(weight.dtype) if linear in block.whole else weight
    plain = grid.stored(grid.fit(whole), block.stored)
    nearest = grid.decode(grid.encode(whole, plain), plain)
    tuned = block.coded[linear].decode(block.stored).to(weight.dtype)
    expected, met = seen.exact.to(weight.dtype) @ whole.T, seen.met.to(weight.dtype)
    errors = [(met @ w.T - expected).square().sum(dtype=torch.float64) for w in (nearest, tuned)]
    return torch.stack([expected.square().sum(dtype=torch.float64), *errors])
