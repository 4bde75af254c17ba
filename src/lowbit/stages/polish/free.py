"""What the codes of a block leave free, and the block's weights as that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LowbitError
from ...grid import Coded, OrderedGrid, Params
from ...grid.kmeans import NotFiniteError
from ...grid.straight import through
from ...model.block import Block

_LEVELS, _VECTOR = "levels of ", "vector "  # before the name of what a variable moves


@dataclass(frozen=True)
class Free:
    """The variables of one block: zeros leave it as it was given.

    Attributes:
        block: every linear coded, other parameters in float32.
        vectors: names of those that are trained.
    """

    block: Block
    vectors: tuple[str, ...]

    @classmethod
    def of(cls, block: Block, norms: bool) -> Free:
        """The variables of a block.

        Args:
            norms: norm gains and biases are among them.
        """
        return cls(block, tuple(_vectors(block)) if norms else ())

    def zeros(self) -> dict[str, Tensor]:
        """The variables where nothing has moved, float32, by what they move."""
        levels = {_LEVELS + n: ordered(q).freedom(q.params) for n, q in self.block.coded.items()}
        vectors = {_VECTOR + n: self.block.weights[n].shape for n in self.vectors}
        device = self.block.device
        return {k: torch.zeros(size, device=device) for k, size in (levels | vectors).items()}

    def weights(self, variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter of the block as an artifact would hold it, decoded; differentiable by the
        variables.
        """
        out = dict(self.block.weights)
        for name, q in self.block.coded.items():
            dense = q.grid.decode(q.codes, self._params(name, q, variables)).view(q.codes.shape)
            if q.outliers is not None:
                values = q.outliers.values.to(self.block.stored).to(dense.dtype)
                flat = dense.flatten().index_copy(0, q.outliers.index, values)
                dense = flat.view(q.codes.shape)
            out[f"{name}.weight"] = dense
        return {**out, **{n: self._vector(n, variables) for n in self.vectors}}

    @torch.no_grad()
    def block_of(self, variables: Mapping[str, Tensor]) -> Block:
        """The block with the variables put into it.

        Raises:
            LowbitError: a number is beyond what is stored.
        """
        coded: dict[str, Coded] = {}
        for name, q in self.block.coded.items():
            codes, params = ordered(q).arranged(q.codes, self._params(name, q, variables))
            try:
                q.grid.check_finite(params)
            except NotFiniteError as e:
                raise LowbitError(f"'{self.block.name}.{name}' as polished: {e}.") from e
            coded[name] = replace(q, codes=codes, params=params)
        moved = {n: self._vector(n, variables) for n in self.vectors}
        return replace(self.block, coded=coded, weights={**self.block.weights, **moved})

    def _params(self, name: str, q: Coded, variables: Mapping[str, Tensor]) -> Params:
        grid, move = ordered(q), variables[_LEVELS + name].clamp(-1, 1)
        found: Params = grid.stored(grid.moved(q.params, 1 + move), self.block.stored)
        return found

    def _vector(self, name: str, variables: Mapping[str, Tensor]) -> Tensor:
        start = self.block.weights[name]
        move = variables[_VECTOR + name]
        moved = start + start.square().mean().sqrt() * move
        held = moved.detach().to(self.block.context.keeps(name)).to(moved.dtype)
        # What did not move stays bit for bit as the checkpoint has it.
        return through(moved, torch.where(move.detach() == 0, start, held))


def ordered(q: Coded) -> OrderedGrid[Any]:
    """The grid of a linear, whose levels can move."""
    assert isinstance(q.grid, OrderedGrid)  # `lowbit.methods.polish.check` refuses others
    return q.grid


def _vectors(block: Block) -> list[str]:
    """Norm gains, and biases of norms and quantized linears; none that are zeros."""
    gains = {
        n for n, w in block.weights.items() if n.rpartition(".")[2] == "weight" and w.dim() == 1
    }
    owners = {n.removesuffix(".weight") for n in gains} | set(block.coded)
    biases = {f"{n}.bias" for n in owners} & set(block.weights)
    return [n for n in block.weights if n in gains | biases and bool(block.weights[n].any())]
