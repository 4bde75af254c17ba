"""What a run tells a display while it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockDone:
    """What a progress display is told after each block.

    Attributes:
        index, blocks: number of the block and how many there are.
        record: its part of report.json.
        resumed: finished by an earlier run.
    """

    index: int
    blocks: int
    record: Mapping[str, Any]
    resumed: bool


@dataclass(frozen=True)
class Working:
    """What a progress display is told within a block.

    Attributes:
        index, blocks: number of the block and how many there are.
        what: the step of the method that begins.
    """

    index: int
    blocks: int
    what: str


OnBlock = Callable[[BlockDone], None]
OnStep = Callable[[Working], None]
