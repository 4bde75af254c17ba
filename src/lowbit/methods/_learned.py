"""The variables of OmniQuant: clipping logits by group, factors and shifts by channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Params, RangedGrid
from ..model.block import Block
from ..model.graph import Site
from ..model.rewrite import fold
from ._equivalent import channel_ranges, smoothing

_START = 4.0  # of the logits: sigmoid 0.982
_LEAST_FACTOR = 1e-2


class Learned:
    """The variables of one block, and its weights as they make them."""

    def __init__(self, block: Block, sites: tuple[Site, ...], alpha: float) -> None:
        self.block, self.sites = block, sites
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        for name in block.graph.linears:
            if name not in block.coded and name not in block.params:
                rows, columns = block.weight(name).shape
                shape = (rows, columns // ranged(block, name).group(columns))
                self.low[name], self.high[name] = (
                    torch.full(shape, _START, device=block.device).requires_grad_()
                    for _ in range(2)
                )
        self.factor: dict[str, Tensor] = {}
        self.shift: dict[str, Tensor] = {}
        ranges = channel_ranges(block, [s.reader for s in sites], block.tuned_rows)
        for site in sites:
            key, (low, high) = site.reader, ranges[site.reader]
            if shiftable(block, site):
                self.shift[key] = ((low + high) / 2).float().requires_grad_()
                low, high = low - (low + high) / 2, high - (low + high) / 2
            weights = torch.stack([block.weight(n).abs().amax(0) for n in site.reads]).amax(0)
            start = (
                smoothing(torch.maximum(-low, high), weights, alpha)
                .float()
                .clamp(min=_LEAST_FACTOR)
            )
            self.factor[key] = start.requires_grad_()

    def clips(self) -> list[Tensor]:
        return [*self.low.values(), *self.high.values()]

    def transforms(self) -> list[Tensor]:
        return [*self.factor.values(), *self.shift.values()]

    def _transformed(self) -> dict[str, Tensor]:
        """The block's parameters after the transformation; differentiable. The same rewriting as
        `fold`.
        """
        out = dict(self.block.weights)
        for site in self.sites:
            source, factor = site.source, self.factor[site.reader].clamp(min=_LEAST_FACTOR)
            shift = self.shift.get(site.reader)
            assert source is not None
            key, bias = f"{source.module}.weight", f"{source.module}.bias"
            rows = slice(*source.rows) if source.rows else slice(None)
            if source.kind == "norm":
                out[key] = (out[key] + source.offset) / factor - source.offset
            else:
                scale = torch.ones(len(out[key]), device=factor.device).index_put(
                    (torch.arange(len(out[key]), device=factor.device)[rows],), factor
                )
                out[key] = out[key] / scale[:, None]
            if bias in out:
                whole, taken = out[bias], 0.0 if shift is None else shift
                part = (whole[rows] - taken) / factor
                out[bias] = part
                if source.rows:
                    out[bias] = torch.cat([whole[: rows.start], part, whole[rows.stop :]])
            for name in site.reads:
                if shift is not None:
                    out[f"{name}.bias"] = out[f"{name}.bias"] + out[f"{name}.weight"] @ shift
                out[f"{name}.weight"] = out[f"{name}.weight"] * factor
            for key in site.beside:
                out[key] = out[key] * factor
        return out

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters, linears on their grids; straight-through where something is
        rounded.
        """
        out = self._transformed()
        for name in self.block.graph.linears:
            key, grid = f"{name}.weight", ranged(self.block, name)
            if name in self.low:
                found = clipped_range(out[key], grid, self.low[name], self.high[name])
                params: Params = grid.stored(found, self.block.stored)
            else:
                params = self.block.range_of(name)
            out[key] = grid.rounded(out[key], params)
        return out

    @torch.no_grad()
    def folded(self, block: Block) -> Block:
        """The block with the transformation folded in and the learned ranges fixed."""
        for site in self.sites:
            shift = self.shift.get(site.reader)
            block = fold(block, site, self.factor[site.reader].clamp(min=_LEAST_FACTOR), shift)
        params = {
            name: clipped_range(block.weight(name), ranged(block, name), low, self.high[name])
            for name, low in self.low.items()
        }
        return block.with_params(params)


def shiftable(block: Block, site: Site) -> bool:
    """Whether a shift can be taken off a site's activation: its source and all its readers have
    biases, and nothing else reads it.
    """
    assert site.source is not None
    return not site.beside and all(
        f"{n}.bias" in block.weights for n in (site.source.module, *site.reads)
    )


def ranged(block: Block, linear: str) -> RangedGrid[Any]:
    """The grid of a linear, one with ranges.

    Raises:
        LowbitError: it has none.
    """
    grid = block.grids[linear]
    if not isinstance(grid, RangedGrid):
        raise LowbitError(
            f"omniquant shapes the ranges of uniform grids, and '{block.name}.{linear}' has a "
            f"{grid}: leave omniquant out of the recipe."
        )
    return grid


def clipped_range(weight: Tensor, grid: RangedGrid[Any], low: Tensor, high: Tensor) -> Params:
    """Params of the range [sigmoid(low) * min, sigmoid(high) * max]; differentiable.

    Args:
        weight: (out, in). low, high: (out, groups) logits.
    """
    bottom, top = grid.ends(weight)  # (out, groups) each
    params: Params = grid.from_range(bottom * torch.sigmoid(low), top * torch.sigmoid(high))
    return params
