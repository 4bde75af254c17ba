"""The sections of `benchmarks/gpu.py`: each a function of a `Bench` and of a dict, into which it
puts what it finds as soon as it has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .agreement import agreement
from .bench import Bench
from .columns import columns
from .copies import copies
from .machine import machine
from .packed import packed
from .runs import runs
from .steps import hardening, repeats, step
from .tiles import tiles


class Section(NamedTuple):
    """``seconds``: after which it is cut short, and which must be left for it to be begun."""

    run: Callable[[Bench, dict[str, Any]], None]
    seconds: int


# Those first that the others are read by. Together no more than 480 seconds.
SECTIONS = {
    "machine": Section(machine, 20),
    "agreement": Section(agreement, 40),
    "step": Section(step, 50),
    "hardening": Section(hardening, 20),
    "columns": Section(columns, 40),
    "runs": Section(runs, 230),
    "repeats": Section(repeats, 20),
    "copies": Section(copies, 20),
    "packed": Section(packed, 20),
    "tiles": Section(tiles, 20),
}
