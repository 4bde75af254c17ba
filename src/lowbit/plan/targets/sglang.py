"""SGLang: compressed-tensors where its Marlin kernels take it, else GPTQ.

Source: SGLang 0.5.23 and the kernels of its GPTQ path, which turn to the next group's scale after
16 weights of 2 bits or 32 of others and start anew every 128; read, not run.
"""

from __future__ import annotations

from functools import partial

from ...errors import LowbitError
from ...formats import compressed_tensors as ct
from ...formats import gptq
from ...formats.packing import said
from ...formats.uniform import Uniform, most_common, uniform
from ...grid import AnyGrid
from .base import (
    Planned,
    Verdict,
    degrees,
    experts,
    export_to,
    fused,
    misfits,
    only_weights,
    parallel,
    refusal,
    tally,
    unlike,
)

NAME = "SGLang"
_MARLIN_GROUPS = (None, 32, 64, 128)
_START = 128


def judge(p: Planned) -> Verdict:
    """By the rules of its loaders and of the export to GPTQ."""
    shared = [*only_weights(p, NAME), experts(p, NAME), unlike(p, NAME)]
    version = gptq.V1 if all(g.symmetric for g in p.uniform.values()) else gptq.V2
    plain = len(p.uniform) == len(p.grids) and all(map(_marlin, p.uniform.values()))
    if plain:
        no = refusal(NAME, (*shared, parallel(p, _has_zero_points)))
        to, fitting = ct.NAME, degrees(p, _has_zero_points)
    else:
        no = refusal(
            NAME,
            (*misfits(p, partial(_check, version)), *shared, _exceptions(p), parallel(p, _always)),
        )
        to, fitting = version, degrees(p, _always)
    return no or Verdict(
        NAME,
        True,
        to,
        tally(map(said, p.grids.values())),
        "" if plain else export_to(to),
        f"{NAME} 0.5.23 or newer; older ones were not read",
        notes=(f"tensor parallel degrees that fit: {', '.join(map(str, fitting))}",),
    )


def _marlin(grid: Uniform) -> bool:
    """Whether its loader of compressed-tensors has a kernel for this grid: 4 bits, or 8 symmetric
    ones.
    """
    return (
        grid.bits == 4 or (grid.bits == 8 and grid.symmetric)
    ) and grid.group_size in _MARLIN_GROUPS


def _check(version: str, grid: AnyGrid, rows: int, columns: int, name: str) -> None:
    own = uniform(grid, name, NAME)
    if own.bits not in gptq.BITS:
        raise LowbitError(
            f"'{name}' is {grid}, and {NAME} takes GPTQ with 2, 3, 4 and 8 bits, "
            "compressed-tensors with 4 and 8: choose one of these."
        )
    gptq.check(own, rows, columns, version, name)
    size, least = own.group_size, 16 if own.bits == 2 else 32
    if size is not None and size % _START and (size < least or _START % size):
        fitting = "g16, g32, g64 or g128" if least == 16 else "g32, g64 or g128"
        raise LowbitError(
            f"'{name}' is {grid}, whose groups {NAME}'s kernels for GPTQ do not step through: "
            f"choose {fitting}."
        )


def _exceptions(p: Planned) -> str | None:
    """GPTQ's loaders look exceptions up by the names of their own, fused layers, which the linears'
    names in the file do not match.
    """
    common, others = most_common(p.uniform) if p.uniform else (None, {})
    name = next((n for names in fused(p) for n in names if n in others), None)
    if name is None:
        return None
    return (
        f"'{name}' is {p.grids[name]} where most linears are {common}, and {NAME} finds no "
        "exceptions among linears that it fuses: "
        "keep overrides to linears such as o_proj and down_proj."
    )


def _has_zero_points(grid: Uniform) -> bool:
    return not grid.symmetric


def _always(grid: Uniform) -> bool:
    return True
