"""Layouts of files: one layout, one file, each a pure pack / unpack pair.

`LAYOUTS` says how a weight on each kind of grid lies in an artifact. `lowbit.formats.by_name` has
the formats of other runtimes, which hold weights on uniform grids.
"""

from __future__ import annotations

from typing import Any

from ..grid import MXFP4, Affine, AnyGrid, Codebook, KQuant
from . import affine, codebook, kquant, mxfp4
from .layout import Layout

LAYOUTS: dict[type[AnyGrid], Layout[Any]] = {
    Affine: affine.LAYOUT,
    Codebook: codebook.LAYOUT,
    KQuant: kquant.LAYOUT,
    MXFP4: mxfp4.LAYOUT,
}
