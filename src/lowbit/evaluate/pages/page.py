"""A self-contained HTML page, its tables and its plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...verbatim import encodable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Heading and picture, as base64 of an SVG.
Plot = tuple[str, str]

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.3rem .8rem;border-bottom:1px solid #d8dee6;text-align:right}
th:first-child,td:first-child{text-align:left}pre{background:#f4f6f9;padding:.8rem;overflow:auto}
img{max-width:100%}@media(prefers-color-scheme:dark){body{background:#12161c;color:#dfe6ee}
pre{background:#1b212a}th,td{border-color:#333c48}img{background:#fff}}
"""


def write_html(path: Path, title: str, body: Sequence[str]) -> None:
    """Write a page from pieces of its body, which are HTML already."""
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>"
    )
    write_whole(path, head + "\n".join(body) + "</html>\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that has its name only when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(encodable(text).encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of plain text as HTML."""
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{titles}</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def figures(plots: Iterable[Plot]) -> list[str]:
    """Return plots as HTML, each below its heading."""
    return [
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" '
        f'src="data:image/svg+xml;base64,{image}">'
        for name, image in plots
    ]


def figures_or_why(plots: Sequence[Plot]) -> list[str]:
    """Return plots as HTML, or a sentence on how to get them."""
    if not plots:
        return ["<p>Plots need matplotlib: <code>pip install 'lowbit[report]'</code>.</p>"]
    return figures(plots)


def new_axes(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of a size in inches, and its axes.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def has_matplotlib() -> bool:
    """Whether plots can be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def svg(figure: Figure) -> str:
    """Return a matplotlib figure as base64 of its SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()
