"""Which of ggml's block types holds a weight, so that its codes are kept."""

from __future__ import annotations

from ..errors import LowbitError
from ..grid import Affine, Grid, KQuant
from .ggml import BLOCKS, BlockType

# (bits, symmetric) -> types by preference, each with what a group must be a multiple of: the inputs that share a scale in it.
_HOLDS: dict[tuple[int, bool], tuple[tuple[str, int], ...]] = {
    (2, True): (("Q2_0", 64),),
    (2, False): (("Q2_K", 16),),
    (3, True): (("Q3_K", 16),),
    (4, True): (("Q4_0", 32),),
    (4, False): (("Q4_K", 32), ("Q4_1", 32)),
    **dict.fromkeys(((5, True), (6, True), (8, True)), (("Q8_0", 32),)),
}


def block_type(grid: Grid, columns: int, name: str = "weight") -> BlockType:
    """The type for a weight with this many inputs. The one place where a kind of grid gets its types.

    Args:
        name: full name, for errors.

    Raises:
        LowbitError: no type holds it; says what would fit.
    """
    if isinstance(grid, KQuant):
        found = BLOCKS[grid.kind.upper()]
        if columns % found.size:
            raise LowbitError(f"'{name}' has {columns} inputs, and {found.name} takes rows in multiples of {found.size}: choose a scheme with g.")
        return found
    if not isinstance(grid, Affine):
        raise LowbitError(f"'{name}' is on {grid}, which no GGUF type holds: choose a scheme for uniform weights, or a K-quant such as gguf:q2_k.")
    types = _HOLDS.get((grid.bits, grid.symmetric))
    if types is None:
        raise LowbitError(f"'{name}' is {grid}, and no GGUF type holds {_missing(grid)}.")
    rows = [(BLOCKS[kind], multiple) for kind, multiple in types if columns % BLOCKS[kind].size == 0]
    if not rows and grid.group(columns) % types[-1][1] == 0:
        small = "g64 with 'sym' (Q2_0)" if grid.bits == 2 and columns % 64 == 0 else "W4 with g32"
        size = BLOCKS[types[-1][0]].size
        raise LowbitError(f"'{name}' is {grid} with {columns} inputs, and {types[-1][0]} takes rows in multiples of {size}: choose {small}.")
    for held, multiple in rows:
        if grid.group(columns) % multiple == 0:
            return held
    kinds, least = " or ".join(kind for kind, _ in types), types[0][1]
    raise LowbitError(f"'{name}' is {grid}, and {kinds} takes groups of {least} inputs and multiples: choose g{least} or g128.")


def _missing(grid: Affine) -> str:
    """What there is no type for, and what to do."""
    if (grid.bits, grid.symmetric) == (3, False):
        return "3 bits with zero points: add 'sym' to the scheme (Q3_K), use the scheme gguf:q3_k, or export --to gguf:q4_k at 4.5 bits"
    if grid.bits == 1:
        return "1-bit weights: choose W2 or more"
    if grid.bits == 7:
        return "7-bit weights: choose W8 with 'sym'"
    return f"{grid.bits}-bit weights with zero points: add 'sym' to the scheme"
