"""The whole card: front matter for the Hub, then sections for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...verbatim import encodable
from .front_matter import front_matter
from .loading import loading
from .making import making
from .numbers import numbers
from .opening import opening, title


def model_card(report: Mapping[str, Any]) -> str:
    """Return the README.md of a directory with this report.json.

    Args:
        report: of an artifact or an export, its verification included.
    """
    sections = (
        f"# {title(report)}",
        opening(report),
        making(report),
        numbers(report),
        loading(report),
    )
    return encodable(front_matter(report) + "\n" + "\n\n".join(sections) + "\n")
