"""llama.cpp: GGUF, written by `export`, each linear in the block type that holds its grid."""

from __future__ import annotations

from ..formats.block_types import block_type
from ..formats.ggml import BlockType
from ..grid import Affine, Grid
from .base import Planned, Verdict, export_to, misfits, only_weights, refusal, tally

NAME = "llama.cpp"
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_EXACT = ("Q2_0", "Q4_0", "Q8_0")


def judge(p: Planned) -> Verdict:
    """By the rules of its block types and the families that `export` can name."""
    no = refusal(NAME, (_family(p), *misfits(p, _check), *only_weights(p, NAME)))
    if no is not None:
        return no
    types = {n: block_type(g, p.shapes[n][1], n) for n, g in p.grids.items()}
    recent = any(t.name == "Q2_0" for t in types.values())
    return Verdict(
        NAME, True, "gguf", tally(_said(t, p.grids[n]) for n, t in types.items()), export_to("gguf"),
        f"{NAME} of August 2026 or newer" if recent else f"{NAME}; no oldest version is known",
        notes=("Q2_0 is GGUF type 42, which older programs and the gguf package 0.19 do not know",) if recent else (),
    )  # fmt: skip


def _check(grid: Grid, rows: int, columns: int, name: str) -> None:
    block_type(grid, columns, name)


def _said(held: BlockType, grid: Grid) -> str:
    """A type, its bits, and what becomes of the tuned numbers in it."""
    if not isinstance(grid, Affine) or held.name in _EXACT:
        kept = "exact"
    elif held.name == "Q4_1":
        kept = "codes kept, offsets rounded to float16"
    else:
        kept = "codes kept, scales fitted anew"
    return f"{held.name} ({8 * held.bytes / held.size:g} bits, {kept})"


def _family(p: Planned) -> str | None:
    family = p.config.model_type
    return None if family in _FAMILIES else f"lowbit writes GGUF of {', '.join(_FAMILIES)} models, not of '{family}' ones: choose another runtime."
