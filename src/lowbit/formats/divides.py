"""Whether layers are as wide as their grids want."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import LowbitError
from ..grid import AnyGrid
from . import LAYOUTS

_USUAL = (256, 128, 64, 32, 16, 8)


def check_widths(grids: Mapping[str, AnyGrid], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a grid whose groups or blocks do not divide a layer's inputs.

    Args:
        grids: full linear name -> grid. shapes: full linear name -> (out, in).

    Raises:
        LowbitError: naming the linear, its width and what would fit.
    """
    for name, grid in grids.items():
        width = shapes[name][1]
        unit = LAYOUTS[type(grid)].unit(grid)
        if unit and width % unit:
            raise LowbitError(
                f"{grid} comes in blocks of {unit} inputs, which do not divide the {width} inputs "
                f"of '{name}': choose a scheme with g."
            )
        size = None if unit else grid.group_size
        if size and width % size:
            fitting = [str(g) for g in _USUAL if all(w % g == 0 for _, w in shapes.values())]
            raise LowbitError(
                f"group size {size} does not divide the {width} inputs of '{name}'. Group sizes "
                "that fit every linear of this model: "
                f"{', '.join(fitting) or 'none of the usual ones'}, or a scheme without g (one "
                "scale per output channel)."
            )
