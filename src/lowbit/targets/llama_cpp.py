"""llama.cpp: GGUF, written by `export`, each linear in the block type that holds its grid.

Rows are made of whole blocks: 256 weights in Q2_K, Q3_K and Q4_K, 64 in Q2_0, 32 in Q4_0, Q4_1 and Q8_0. The K types have scales for
16 (Q4_K: 32) weights each, which are numbers of 4 or 6 bits times one of the superblock.
"""

from __future__ import annotations

from ..errors import LowbitError
from ..grid import Grid
from .base import Planned, Verdict, export_to, misfits, only_weights, refusal, tally, uniform

NAME = "llama.cpp"
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SUPER = 256
_KIND = {  # what becomes of codes and scales
    "Q2_0": "2.25 bits, exact",
    "Q2_K": "2.625 bits, codes kept, scales fitted anew",
    "Q3_K": "3.4375 bits, codes kept, scales fitted anew",
    "Q4_0": "4.5 bits, exact",
    "Q4_1": "5 bits, codes kept, offsets rounded to float16",
    "Q4_K": "4.5 bits, codes kept, scales fitted anew",
    "Q8_0": "8.5 bits, exact",
}


def judge(p: Planned) -> Verdict:
    """By the rules of its block types and the families that `export` can name."""
    no = refusal(NAME, (_family(p), *misfits(p, block_type), *only_weights(p, NAME)))
    if no is not None:
        return no
    types = [block_type(g, *p.shapes[n], n) for n, g in p.grids.items()]
    return Verdict(
        NAME, True, "gguf", tally(f"{t} ({_KIND[t]})" for t in types), export_to("gguf"),
        f"{NAME} of August 2026 or newer" if "Q2_0" in types else f"{NAME}; no oldest version is known",
        notes=("Q2_0 is GGUF type 42, which older programs and the gguf package 0.19 do not know",) if "Q2_0" in types else (),
    )  # fmt: skip


def block_type(grid: Grid, rows: int, columns: int, name: str) -> str:
    """The GGUF type that holds a weight on this grid. The one place to add other kinds of grid.

    Raises:
        LowbitError: there is none; says what would fit.
    """
    affine = uniform(grid, name, NAME)
    kind = "symmetric" if affine.symmetric else "asymmetric"
    holds = {(2, True): _q2_0, (2, False): _q2_k, (3, True): _q3_k, (4, True): _q4_0, (4, False): _q4_k_or_1}
    holds |= dict.fromkeys(((5, True), (6, True), (8, True)), _q8_0)
    if (affine.bits, affine.symmetric) == (3, False):
        raise LowbitError(
            f"'{name}' is {grid}, and no GGUF type holds 3 bits with zero points: add 'sym' to the scheme (Q3_K), use the scheme gguf:q3_k, "
            "or export --to gguf:q4_k at 4.5 bits."
        )
    if (affine.bits, affine.symmetric) not in holds:
        better = "add 'sym' to the scheme" if affine.bits in (5, 6, 8) else "choose W8 with 'sym'" if affine.bits == 7 else "choose W2 or more"
        raise LowbitError(f"'{name}' is {grid}, and no GGUF type holds {affine.bits}-bit {kind} weights: {better}.")
    found = holds[affine.bits, affine.symmetric](affine.group(columns), columns)
    if found in _KIND:
        return found
    raise LowbitError(f"'{name}' is {grid} with {columns} inputs, and {found}.")


# Each gives a type, or what is in its way and what to do.


def _q2_0(group: int, columns: int) -> str:
    return "Q2_0" if group % 64 == 0 else "Q2_0 takes groups of 64 and multiples: choose g64 or g128, or leave 'sym' out (Q2_K)"


def _q2_k(group: int, columns: int) -> str:
    if columns % _SUPER:
        return f"Q2_K takes rows in multiples of {_SUPER}: " + ("choose g64 with 'sym' (Q2_0)" if columns % 64 == 0 else "choose W4 with g32")
    return "Q2_K" if group % 16 == 0 else "Q2_K takes groups of 16 and multiples: choose g64 or g128"


def _q3_k(group: int, columns: int) -> str:
    if columns % _SUPER:
        return f"Q3_K takes rows in multiples of {_SUPER}: choose W4 with g32"
    return "Q3_K" if group % 16 == 0 else "Q3_K takes groups of 16 and multiples: choose g64 or g128"


def _q4_0(group: int, columns: int) -> str:
    return "Q4_0" if group % 32 == 0 else "Q4_0 takes groups of 32 and multiples: choose g64 or g128"


def _q4_k_or_1(group: int, columns: int) -> str:
    if group % 32:
        return "Q4_K and Q4_1 take groups of 32 and multiples: choose g64 or g128"
    return "Q4_1" if columns % _SUPER else "Q4_K"


def _q8_0(group: int, columns: int) -> str:
    return "Q8_0" if group % 32 == 0 else "Q8_0 takes groups of 32 and multiples: choose g64 or g128"


def _family(p: Planned) -> str | None:
    family = p.config.model_type
    return None if family in _FAMILIES else f"lowbit writes GGUF of {', '.join(_FAMILIES)} models, not of '{family}' ones: choose another runtime."
