"""The small JSON files in which a comparison keeps its state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...artifact.disk import write_atomic


def read_state(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a JSON object.

    Raises:
        LowbitError: the file system refuses.
    """
    write_atomic(path, (json.dumps(state, indent=1) + "\n").encode())
