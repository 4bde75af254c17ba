"""The page of `lowbit demo`."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...verbatim import plotted
from .page import (
    Plot,
    figures_or_why,
    has_matplotlib,
    new_axes,
    svg,
    table,
    write_html,
    write_whole,
)

Row = Mapping[str, Any]

_HEAD = ("recipe", "scheme", "bits/weight", "MB", "perplexity", "KL", "top-1", "seconds")


def write_page(folder: Path, rows: Sequence[Row], title: str) -> Path:
    """Write report.html (and the same data as demo.json) into a folder.

    Args:
        rows: one per recipe, with recipe, scheme, bits, bytes, perplexity, kl, top1, seconds,
            sample, losses.

    Returns:
        path of the page.
    """
    data = {"title": title, "rows": list(rows)}
    write_whole(folder / "demo.json", json.dumps(data, indent=1) + "\n")
    body = [
        f"<h1>lowbit</h1><p>{html.escape(title)}</p>",
        table(_HEAD, map(_cells, rows)),
        *figures_or_why(_plots(rows)),
        "<h2>Samples</h2>",
    ]
    for r in rows:
        name, sample = html.escape(str(r["recipe"])), html.escape(str(r["sample"]))
        body.append(f"<h3>{name}</h3><pre>{sample}</pre>")
    for r in rows:
        if "verified" in r:
            name, verified = html.escape(str(r["recipe"])), html.escape(str(r["verified"]))
            body.append(f"<p>{name}: {verified}; hash {r['hash'][:16]}</p>")
    page = folder / "report.html"
    write_html(page, "lowbit", body)
    return page


def _cells(r: Row) -> list[str]:
    return [
        str(r["recipe"]),
        str(r["scheme"]),
        f"{r['bits']:.3f}",
        f"{r['bytes'] / 1e6:.2f}",
        f"{r['perplexity']:.3f}",
        "-" if r["kl"] is None else f"{r['kl']:.4f}",
        "-" if r["kl"] is None else f"{r['top1']:.1%}",
        f"{r['seconds']:.1f}",
    ]


def _plots(rows: Sequence[Row]) -> list[Plot]:
    """Return the plots; none without matplotlib."""
    if not has_matplotlib():
        return []
    quantized = [r for r in rows if r["kl"] is not None]
    tuned = [r for r in rows if r["losses"]]
    plots = [
        ("Perplexity", _bars(rows, "perplexity", "perplexity")),
        ("Distance to the original", _bars(quantized, "kl", "mean KL (nats per token)")),
    ]
    if tuned:
        plots.append(("Output error of each block on the quantized prefix", _losses(tuned)))
    return plots


def _bars(rows: Sequence[Row], key: str, label: str) -> str:
    """Return a bar for each recipe."""
    figure, axes = new_axes(7, 3.2)
    bars = axes.bar([str(r["recipe"]) for r in rows], [r[key] for r in rows], color="#3b6ea8")
    axes.bar_label(bars, fmt="%.3g")
    axes.set_yscale("log")
    axes.set_ylabel(label + ", log scale")
    return svg(figure)


def _losses(rows: Sequence[Row]) -> str:
    """Return the loss of each block after tuning, a line for each recipe."""
    figure, axes = new_axes(7, 3.2)
    for r in rows:
        losses = [after for _, after in r["losses"]]
        axes.plot(range(1, len(losses) + 1), losses, "o-", label=plotted(r["recipe"]))
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("squared error per token, log scale")
    axes.legend()
    return svg(figure)
