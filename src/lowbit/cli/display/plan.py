"""What `lowbit plan` says of memory and of runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...console import Table
from ...errors import LowbitError
from ...machine import free_memory
from ...plan import Plan
from ...plan.memory import FreeMemory
from ...plan.speed import Speed
from ...plan.targets import Verdict
from .units import duration


def plan_rows(
    p: Plan, speed: Speed | None, offload: str, folder: Path, free: FreeMemory | None = None
) -> list[tuple[str, str]]:
    """What a run needs, in words.

    Args:
        speed: of the device; None says nothing of the time.
        offload, folder, free: as `lowbit.plan.memory.Needs.placed`.
    """
    gib, model_type = 2**30, p.outline.config.model_type
    around = ""
    if p.outline.around:
        around = f" ({p.outline.around / 1e9:.3g} B are around the text model and copied)"
    took = "not said of a GPU that is not here"
    if speed is not None:
        ranks, besides = p.setting.ranks, "packing and the closing check"
        if ranks > 1:
            besides = f"each of {ranks} processes on a device like this; what they send, {besides}"
        took = (
            f"about {duration(p.seconds(speed))} with recipe '{p.recipe.name}' at this machine's "
            f"measured speed (an estimate; {besides} come on top)"
        )
    return [
        (
            "model",
            f"{model_type}, {p.outline.blocks} blocks, {p.parameters / 1e9:.3g} B parameters, "
            f"{p.quantized / p.parameters:.1%} of them quantized{around}",
        ),
        (
            "size",
            f"{p.original / gib:.3g} -> {p.artifact / gib:.3g} GiB ({p.original / 1e9:.3g} -> "
            f"{p.artifact / 1e9:.3g} GB)",
        ),
        (
            "bits per weight",
            f"{p.bits_per_weight:.3f} in quantized linears, {p.model_bits_per_weight:.3f} over "
            "all parameters",
        ),
        *memory_rows(p, p.setting.device, offload, folder, free),
        (
            "disk",
            f"{p.artifact / gib:.3g} GiB, besides activations that are kept there"
            + (f", and up to {p.scratch / gib:.3g} while it is polished" if p.scratch else ""),
        ),
        ("time", took),
        *(("note", remark) for remark in p.outline.remarks),
    ]


def memory_rows(
    plan: Plan, device: torch.device, offload: str, folder: Path, room: FreeMemory | None = None
) -> tuple[tuple[str, str], ...]:
    """Return what a plan says of memory, as (what, how much).

    Args:
        offload: where activations go, "auto" for the first place that has the room.
        folder: where files of activations would lie.
        room: the free memory of a device in bytes; None asks the device.
    """
    m, gib = plan.memory, 2**30
    free = (room or free_memory)(device)
    steps = ", ".join(f"{name} {most / gib:.3g}" for name, most in m.steps.items())
    try:
        used = m.placed(offload, device, folder, room).used
        placed = f"--offload {offload} puts them here on the {used}"
    except LowbitError as e:
        placed = str(e)
    peak = (
        f"{m.peak / gib:.3g} GiB: a block {m.block / gib:.3g}, embeddings and head "
        f"{m.outer / gib:.3g}, activations {m.streams / gib:.3g}"
    )
    if m.process:
        peak += f", libraries {m.process / gib:.2g}"
    beside = f" and {m.beside / gib:.3g} beside them" if m.beside else ""
    if free is not None:
        peak += f"; {free / gib:.3g} are free there"
    return (
        ("peak memory" if m.processes == 1 else f"peak memory of each of {m.processes}", peak),
        ("of a block", f"GiB by step: {steps}; below {m.least / gib:.3g} it cannot be done"),
        ("activations", f"{m.copies} x {m.stream / gib:.3g} GiB{beside}; {placed}"),
        (
            "closing check",
            f"about {plan.check_memory / gib:.3g} GiB, in a process of its own that loads the "
            f"whole model, or {plan.check_memory_by_block / gib:.3g} one block at a time",
        ),
    )


def runtimes_table(verdicts: Sequence[Verdict]) -> Table:
    """Return what every runtime says to a plan, a row each."""
    table = Table("runtime", "verdict", "format", "how, or why not", show_lines=True)
    for v in verdicts:
        if v.accepts:
            how = (f"{v.weights} - {v.requires}", _made(v), *v.notes)
            table.add_row(v.runtime, "loads", v.format, "\n".join(how))
        else:
            table.add_row(v.runtime, "refuses", v.format, "\n".join(v.reasons))
    return table


def runtime_table(v: Verdict) -> Table:
    """Return what one runtime says that accepts a plan."""
    table = Table(show_header=False)
    rows = [
        ("runtime", v.runtime),
        ("needs", v.requires),
        ("format", v.format),
        ("weights", v.weights),
        ("export", _made(v)),
    ]
    for row in [*rows, *(("note", n) for n in v.notes)]:
        table.add_row(*row)
    return table


def _made(v: Verdict) -> str:
    return v.export or "as quantized, no export"
