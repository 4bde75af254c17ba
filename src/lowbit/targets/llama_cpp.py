"""llama.cpp: GGUF, each linear in the block type that `lowbit.export.gguf` would choose for its
grid.
"""

from __future__ import annotations

from functools import partial

from ..errors import LowbitError
from ..export.gguf.model import Architecture
from ..export.gguf.types import chosen
from ..formats import gguf
from ..formats.ggml import BlockType
from ..grid import Affine, Grid
from ..grid.names import scheme_name
from .base import Planned, Verdict, export_to, misfits, only_weights, refusal, tally

NAME = "llama.cpp"
_EXACT = ("Q2_0", "Q4_0", "Q8_0")
_GROUPS = (64, 128, 32)


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
    types = {n: chosen(g, p.shapes[n][1], None, n) for n, g in p.grids.items()}
    recent = any(t.name == "Q2_0" for t in types.values())
    return Verdict(
        NAME,
        True,
        gguf.NAME,
        tally(_said(t, p.grids[n]) for n, t in types.items()),
        export_to(gguf.NAME),
        f"{NAME} of August 2026 or newer" if recent else f"{NAME}, no oldest version known",
        notes=remarks
        + (
            ("Q2_0 is GGUF type 42, which older programs and the gguf package 0.19 do not know",)
            if recent
            else ()
        ),
    )


def _check(p: Planned, grid: Grid, rows: int, columns: int, name: str) -> None:
    try:
        chosen(grid, columns, None, name)
    except LowbitError as e:
        symmetric = isinstance(grid, Affine) and grid.symmetric
        better = next(
            (
                g
                for bits in range(max(2, grid.bits), 9)
                if (g := _fitting(p, bits, symmetric)) is not None
            ),
            None,
        )
        raise LowbitError(
            f"{e} Scheme {scheme_name(better)} would fit." if better is not None else str(e)
        ) from e


def _fitting(p: Planned, bits: int, symmetric: bool) -> Affine | None:
    """A uniform grid of these bits, better so symmetric, that every linear could have."""
    for grid in (
        Affine(bits, size, kind) for kind in (symmetric, not symmetric) for size in _GROUPS
    ):
        try:
            types = [
                chosen(grid, columns, None, n)
                for n, (_, columns) in p.shapes.items()
                if columns % (grid.group_size or 1) == 0
            ]
        except LowbitError:
            continue
        if len(types) == len(p.shapes):
            return grid
    return None


def _bits(held: BlockType) -> float:
    """Of a weight, scales included."""
    return 8 * held.bytes / held.size


def _said(held: BlockType, grid: Grid) -> str:
    """A type, its bits, and what becomes of the tuned numbers in it."""
    if not isinstance(grid, Affine) or held.name in _EXACT:
        kept = "exact"
    elif held.name == "Q4_1":
        kept = "codes kept, offsets rounded to float16"
    else:
        kept = "codes kept, scales fitted anew"
    return f"{held.name} ({_bits(held):g} bits, {kept})"
