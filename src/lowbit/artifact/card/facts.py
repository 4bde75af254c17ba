"""Facts of a report that several sections of its card state, and the Markdown that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...formats import compressed_tensors as ct
from ...grid import AnyGrid
from ...grid.names import parse_scheme
from ...names import hub_id, model_name

GGUF = "gguf"
HUB = "https://huggingface.co"


def name_of(report: Mapping[str, Any]) -> str:
    """Return the model's name on one line."""
    return " ".join(model_name(report).split()) or "model"


def grids_of(report: Mapping[str, Any]) -> list[AnyGrid]:
    """Return the different grids of the quantized linears; for a codebook, the uniform grid of as
    many bits.
    """
    schemes = [e["scheme"] for e in report["linears"] if "skipped" not in e]
    return [parse_scheme(scheme).weights for scheme in dict.fromkeys(schemes)]


def for_vllm(report: Mapping[str, Any]) -> bool:
    """Whether it is the copy for vLLM of an artifact that transformers would read otherwise."""
    return report["format"] == ct.NAME and "exported_from" in report


def shown(text: str) -> str:
    """Return a path as others may see it.

    A snapshot in the hub's cache becomes its repository, another absolute path its last part.
    """
    if Path(text).is_absolute() or text.startswith("~"):
        return hub_id(text) or Path(text).name
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(escaped) + " |"
