"""How far each linear of a finished block is from the one it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .block import Block, Call

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
    exact = block.exact()
    read: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site in block.wiring.sites:
        none = torch.empty(
            0, block.weight(site.reads[0]).shape[1], device=block.device, dtype=block.compute
        )
        read[site.reads[0]] = [(none, none)]
    most = len(block.ranks.tokens(torch.arange(_TOKENS), block.xq.shape[1]))

    def visit(name: str, call: Call) -> None:
        left = most - sum(len(x) for x, _ in read[name])
        if left > 0:
            x, met = exact.entering(name, call.args[0]), block.entering(name, call.args[0])
            read[name].append((x.flatten(0, -2)[:left].clone(), met.flatten(0, -2)[:left].clone()))

    rows = min(block.tuned_rows, -(-_TOKENS // block.xq.shape[1]))
    replace(block, weights=block.decoded()).observe(list(read), block.xq, rows, visit)
    out: dict[str, LinearError] = {}
    for site in block.wiring.sites:
        x, met = (
            torch.cat(parts).to(block.weight(site.reads[0]).dtype)
            for parts in zip(*read.pop(site.reads[0]), strict=True)
        )
        for name in site.reads:
            if name not in block.coded:
                continue
            grid, weight = block.grids[name], block.weight(name)
            whole = block.whole[name].to(weight.dtype) if name in block.whole else weight
            expected = x @ whole.T
            nearest = grid.stored(grid.fit(whole), block.stored)
            squares = [expected.square().sum(dtype=torch.float64)]
            squares += [
                (met @ w.T - expected).square().sum(dtype=torch.float64)
                for w in (
                    grid.decode(grid.encode(whole, nearest), nearest),
                    block.coded[name].decode(block.stored).to(weight.dtype),
                )
            ]
            total = torch.stack(squares)
            block.ranks.sum_(total)
            nearest_error, error = (total[1:] / total[0].clamp(min=1e-300)).tolist()
            out[name] = LinearError(nearest_error, error)
    return out
