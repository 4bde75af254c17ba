"""Round to nearest: codes whatever is left, on fixed ranges where a clip has set them, on minimum
and maximum elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..grid import QTensor
from ..model.block import Block


@dataclass(frozen=True)
class RTN:
    """Nearest codes, no data used."""

    def __call__(self, block: Block) -> Block:
        codes = {}
        for name in block.wiring.linears:
            if name not in block.coded:
                grid, params = block.grids[name], block.range_of(name)
                codes[name] = QTensor(grid, grid.encode(block.weight(name), params), params)
        return block.solved(codes)
