"""llama.cpp: GGUF, each linear in the block type that `lowbit.export.gguf` would choose for its
grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

from ...errors import LowbitError
from ...export.gguf.model import Architecture
from ...export.gguf.types import chosen, fitting, said
from ...formats import gguf
from ...grid import AnyGrid
from ...grid.names import scheme_name
from .base import Planned, Verdict, export_to, misfits, only_weights, refusal, tally

_Sort = TypeVar("_Sort")
NAME = "llama.cpp"
_RECENT = "Q2_0 is GGUF type 42, which older programs and the gguf package 0.19 do not know"


def judge(p: Planned) -> Verdict:
    """By the rules of the export: block types by grid and width, and what llama.cpp computes for
    the family.
    """
    try:
        remarks = Architecture.of(p.config).remarks
        other = None
    except LowbitError as e:
        remarks, other = (), f"{e} Choose another runtime."
    no = refusal(NAME, (other, *misfits(p, partial(_check, p)), *only_weights(p, NAME)))
    if no is not None:
        return no
    sorts = {n: (g, p.shapes[n][1]) for n, g in p.grids.items()}
    types = {sort: chosen(*sort, None, n) for sort, n in _first(sorts).items()}
    recent = any(t.name == "Q2_0" for t in types.values())
    if recent:
        remarks += (_RECENT,)
    return Verdict(
        NAME,
        True,
        gguf.NAME,
        tally(said(types[sort], sort[0]) for sort in sorts.values()),
        export_to(gguf.NAME),
        f"{NAME} of August 2026 or newer" if recent else f"{NAME}, no oldest version known",
        notes=remarks,
    )


def _first(sorts: Mapping[str, _Sort]) -> dict[_Sort, str]:
    """Sort of linears -> the first of it."""
    found: dict[_Sort, str] = {}
    for name, sort in sorts.items():
        found.setdefault(sort, name)
    return found


def _check(p: Planned, grid: AnyGrid, rows: int, columns: int, name: str) -> None:
    try:
        chosen(grid, columns, None, name)
    except LowbitError as e:
        better = fitting(grid, {n: shape for shape, n in _first(p.shapes).items()})
        raise LowbitError(
            f"{e} Scheme {scheme_name(better)} would fit." if better is not None else str(e)
        ) from e
