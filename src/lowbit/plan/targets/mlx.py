"""MLX, through mlx-lm: its own layout, written by `export`."""

from __future__ import annotations

from ...formats import mlx
from ...formats.uniform import uniform
from ...grid import AnyGrid
from .base import Planned, Verdict, export_to, misfits, only_weights, refusal, tally

NAME = "MLX"
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")


def judge(p: Planned) -> Verdict:
    """By the rules of its layout and the families of mlx-lm."""
    no = refusal(NAME, (_family(p), *misfits(p, _check), *only_weights(p, NAME)))
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


def _family(p: Planned) -> str | None:
    """mlx-lm has no OPT, and packs BitNet's linears in a way of its own."""
    family = p.config.model_type
    if family in _FAMILIES:
        return None
    known = ", ".join(_FAMILIES)
    return f"mlx-lm does not read packed weights of '{family}' models, but of {known}."
