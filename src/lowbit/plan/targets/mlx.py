"""MLX, through mlx-lm: its own layout, written by `export`."""

from __future__ import annotations

from ...export.for_mlx import misread
from ...formats import mlx
from ...formats.uniform import uniform
from ...grid import AnyGrid
from .base import Planned, Verdict, export_to, misfits, only_weights, refusal, tally

NAME = "MLX"


def judge(p: Planned) -> Verdict:
    """By the rules of its layout and the families of mlx-lm."""
    no = refusal(NAME, (misread(p.config), *misfits(p, _check), *only_weights(p, NAME)))
    if no is not None:
        return no
    sizes = {n: mlx.group_of(g, p.shapes[n][1], n) for n, g in p.uniform.items()}
    repeated = any(g.group(p.shapes[n][1]) != sizes[n] for n, g in p.uniform.items())
    return Verdict(
        NAME,
        True,
        mlx.NAME,
        tally(f"{g.bits}-bit, groups of {sizes[n]}" for n, g in p.uniform.items()),
        export_to(mlx.NAME),
        "mlx-lm 0.32 was tried",
        notes=("zero points are kept as offsets, rounded to the model's dtype",)
        + (("scales are repeated, since it takes groups of up to 128",) if repeated else ()),
    )


def _check(grid: AnyGrid, rows: int, columns: int, name: str) -> None:
    mlx.group_of(uniform(grid, name, NAME), columns, name)
