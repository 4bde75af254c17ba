"""Round to nearest: codes whatever is left, on fixed ranges where a clip has set them, on minimum
and maximum elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.block import Block
from .cost import Cost, Shapes


@dataclass(frozen=True)
class RTN:
    """Nearest codes, no data used."""

    def __call__(self, block: Block) -> Block:
        left = [name for name in block.graph.linears if name not in block.coded]
        return block.with_codes({name: block.nearest(name) for name in left})


def cost(method: RTN, shapes: Shapes) -> Cost:
    """Codes of all linears, and one linear while it is rounded."""
    layer = shapes.layer
    return Cost(held=layer.weights + 12 * layer.largest)
