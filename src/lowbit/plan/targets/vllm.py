"""vLLM: compressed-tensors, as `quantize` writes it; as `export` does where transformers alone
would compute something else.

Source: vLLM 0.25 and 0.33, compressed-tensors 0.17, humming-kernels 0.1.19; read, not run.
"""

from __future__ import annotations

from ...errors import LowbitError
from ...formats import compressed_tensors as ct
from ...formats.packing import said
from ...formats.uniform import Uniform, uniform
from ...grid import AnyGrid
from .base import (
    Planned,
    Verdict,
    cache,
    degrees,
    experts,
    export_to,
    kept,
    misfits,
    parallel,
    refusal,
    tally,
    unlike,
)

NAME = "vLLM"
_COMMON = (4, 8)  # bits with kernels of their own; the others run on Humming's


def judge(p: Planned) -> Verdict:
    """By the rules of its loader and of `lowbit.export.for_vllm`."""
    shared = (
        kept(p, NAME),
        cache(p, NAME),
        experts(p, NAME),
        unlike(p, NAME),
        parallel(p, _packs_outputs),
    )
    no = refusal(NAME, (*misfits(p, _check), _activations(p), *_rotations(p), *shared))
    if no is not None:
        return no
    return Verdict(
        NAME,
        True,
        ct.NAME,
        tally(map(said, p.grids.values())),
        "" if p.beyond is None else export_to(ct.NAME),
        f"{NAME} {_version(p)} or newer",
        notes=_notes(p),
    )


def _check(grid: AnyGrid, rows: int, columns: int, name: str) -> None:
    uniform(grid, name, NAME)
    if grid.bits == 1:
        raise LowbitError(
            f"'{name}' is {grid}, and {NAME} takes 2 to 8 bits: choose a scheme from W2 on."
        )
    size = grid.group_size
    if size is not None and (size < 8 or size & (size - 1)):
        raise LowbitError(
            f"'{name}' is {grid}, and {NAME} takes groups of a power of two from 8 on: choose g32, "
            "g64 or g128."
        )


def _packs_outputs(grid: Uniform) -> bool:
    """Zero points are packed along the outputs."""
    return not grid.symmetric


def _activations(p: Planned) -> str | None:
    grid = p.recipe.activations
    if grid is None:
        return None
    if not ct.carries([p.grids[n] for n in p.uniform], grid):
        return (
            f"{NAME} takes activations of 4 or 8 bits, symmetric, under symmetric weights: add "
            "'sym' to the scheme, with "
            "--set activations.symmetric=true --set activations.full_range=true --set "
            "activations.clip=1 or the recipe crossquant-deploy."
        )
    if grid.bits < 8 and any(g.bits > 4 for g in p.uniform.values()):
        return (
            f"{NAME} takes {grid.bits}-bit activations with weights of at most 4 bits only: write "
            "A8, or fewer bits of weights."
        )
    return None


def _rotations(p: Planned) -> list[str]:
    if not p.online:
        return []
    out = []
    if any(_heads_meet(p, n) for n in p.online):
        out.append(
            f"{NAME} does not rotate across heads: --set quarot.across_heads=false leaves that "
            "rotation out."
        )
    biased = next((n for n in sorted(p.online) if n in p.biased and not _heads_meet(p, n)), None)
    if biased is not None:
        out.append(
            f"{NAME} rotates no inputs of linears with a bias, as '{p.local(biased)}' has: --set "
            "quarot.online=false leaves the rotation out."
        )
    if p.tensor_parallel > 1:
        out.append(
            f"{NAME} rotates on one device only: serve it without tensor parallelism, or --set "
            "quarot.online=false."
        )
    return out


def _heads_meet(p: Planned, name: str) -> bool:
    """Whether a linear reads all heads of attention side by side."""
    heads = p.graph(name).heads
    return heads is not None and heads.output == p.local(name)


def _version(p: Planned) -> str:
    late = any(not g.symmetric and g.bits not in _COMMON for g in p.uniform.values())
    return "0.33" if late or p.recipe.activations is not None or p.online else "0.25"


def _notes(p: Planned) -> tuple[str, ...]:
    fitting = [1] if p.online else degrees(p, _packs_outputs)
    notes = [f"tensor parallel degrees that fit: {', '.join(map(str, fitting))}"]
    if p.recipe.activations is not None:
        return (*notes, "NVIDIA GPUs from compute capability 8.0 on")
    if all(g.bits in _COMMON for g in p.uniform.values()):
        return (*notes, "CPU and ROCm take 4 and 8 bits too") if not p.online else tuple(notes)
    notes.append(
        "NVIDIA GPUs from compute capability 7.5 on, 8.0 in bfloat16; CPU and ROCm take 4 and 8 "
        "bits only"
    )
    if any(g.group_size == 8 for g in p.uniform.values()):
        notes.append("Hopper's fastest kernels need groups of 16 or more")
    return tuple(notes)
