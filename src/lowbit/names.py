"""What a model is called: by its hub repository, also where that lies in the hub's cache, else by
its folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def hub_id(path: str | Path) -> str | None:
    """The repository of a snapshot in the hub's cache, by its path alone:
    models--OWNER--NAME/snapshots/COMMIT, datasets alike.

    None for any other path.
    """
    *_, repository, snapshots, _ = ("", "", "", *Path(path).parts)
    found = re.fullmatch(r"(models|datasets)--(.+)", repository)
    return found[2].replace("--", "/", 1) if found and snapshots == "snapshots" else None


def hub_of(report: Mapping[str, Any]) -> str | None:
    """The repository that the model of a report.json came from; None if it came from none."""
    return report.get("source", {}).get("hub") or hub_id(report["model"])


def model_name(report: Mapping[str, Any]) -> str:
    """The last part of the model's hub id, or of its path, a GGUF file's without its suffix; empty
    where the path has none, as "." has.

    Args:
        report: report.json of an artifact or an export.
    """
    name = Path(hub_of(report) or report["model"]).name.removesuffix(".gguf")
    return "" if name == ".." else name
