"""The reports of `lowbit compare`: JSON, CSV, Markdown and a page."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...verbatim import markdown, plotted
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
_FIGURES = {  # column -> key and form
    "perplexity": ("perplexity", ".4f"),
    "perplexity error": ("perplexity_error", ".2g"),
    "KL": ("kl", ".5f"),
    "KL error": ("kl_error", ".2g"),
    "KL median": ("kl_median", ".4g"),
    "KL 99%": ("kl_p99", ".4g"),
    "KL max": ("kl_max", ".4g"),
    "top-1": ("top1", ".4f"),
    "top-1 error": ("top1_error", ".2g"),
}


def write_comparison(folder: Path, rows: Sequence[Row], title: str) -> None:
    """Write comparison.json, .csv, .md and report.html into a folder.

    Args:
        rows: one per cell, with scheme, recipe and either error or bits, bytes, perplexity, kl,
            top1, seconds, blocks, tasks.
    """
    data = {"title": title, "rows": list(rows)}
    write_whole(folder / "comparison.json", json.dumps(data, indent=1) + "\n")
    tasks = sorted({t for r in rows for t in _tasks_of(r)})
    head = ["scheme", "recipe", "bits/weight", "bytes", *_FIGURES, *tasks]
    if tasks:
        head.append("mean acc")
    head.append("seconds")
    cells = [_failed_cells(r, len(head)) if "error" in r else _cells(r, tasks) for r in rows]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *cells])
    write_whole(folder / "comparison.csv", text.getvalue())
    lines = [markdown(title), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in cells:
        lines.append("| " + " | ".join(markdown(c).replace("|", "\\|") for c in row) + " |")
    write_whole(folder / "comparison.md", "\n".join(lines) + "\n")
    body = [f"<h1>Comparison</h1><p>{html.escape(title)}</p>{table(head, cells)}"]
    body += figures_or_why(_plots([r for r in rows if "error" not in r]))
    body += _failures([r for r in rows if "error" in r])
    write_html(folder / "report.html", "comparison", body)


def _figure(r: Row, key: str, form: str) -> str:
    """Return a figure; nothing where an older version did not measure it."""
    return "" if r.get(key) is None else f"{r[key]:{form}}"


def _tasks_of(r: Row) -> Mapping[str, Any]:
    """Return the results of a row's tasks by name; empty without any."""
    found: Mapping[str, Any] = (r.get("tasks") or {}).get("each", {})
    return found


def _cells(r: Row, tasks: Sequence[str]) -> list[str]:
    """Return the cells of a row that did not fail."""
    found = _tasks_of(r)
    cells = [
        r["scheme"],
        r["recipe"],
        "" if r["bits"] is None else f"{r['bits']:.3f}",
        str(r["bytes"]),
        *(_figure(r, key, form) for key, form in _FIGURES.values()),
    ]
    for task in tasks:
        cells.append(f"{found[task]['acc']:.4f}" if "acc" in found.get(task, {}) else "")
    if tasks:
        mean = (r.get("tasks") or {}).get("mean_acc")
        cells.append("" if mean is None else f"{mean:.4f}")
    return [*cells, f"{r['seconds']:.1f}"]


def _failed_cells(r: Row, width: int) -> list[str]:
    cells = [r["scheme"], r["recipe"], "", "", "failed: " + r["error"]]
    return cells + [""] * (width - len(cells))


def _failures(rows: Sequence[Row]) -> list[str]:
    """Return a list of what failed, as HTML; nothing if all went well."""
    items = []
    for r in rows:
        name, error = html.escape(f"{r['recipe']}, {r['scheme']}"), html.escape(r["error"])
        items.append(f"<li>{name}: {error}</li>")
    return ["<h2>Failures</h2><ul>", *items, "</ul>"] if items else []


def _plots(rows: Sequence[Row]) -> list[Plot]:
    """Return the plots; none without matplotlib or quantized rows."""
    quantized = [r for r in rows if r["bits"] is not None]
    if not quantized or not has_matplotlib():
        return []
    plots = [
        ("Quality against size", _against_size(quantized)),
        ("Quality against bytes", _against_bytes(quantized)),
        ("Quality against time", _against_time(quantized)),
    ]
    for scheme in dict.fromkeys(r["scheme"] for r in quantized):
        losses = _losses([r for r in quantized if r["scheme"] == scheme])
        plots.append((f"Block losses, {scheme}", losses))
    return plots


def _against_size(rows: Sequence[Row]) -> str:
    """Return KL over bits per weight, a line for each recipe."""
    figure, axes = new_axes(7, 4)
    _draw_recipes(axes, rows, "bits", "o-")
    _label_kl(axes, "bits per weight, from bytes")
    return svg(figure)


def _against_bytes(rows: Sequence[Row]) -> str:
    """Return KL over bytes of the artifact, embeddings and head included."""
    figure, axes = new_axes(7, 4)
    _draw_recipes(axes, [{**r, "bytes": r["bytes"] / 1e6} for r in rows], "bytes", "o-")
    _label_kl(axes, "megabytes of all tensors")
    return svg(figure)


def _against_time(rows: Sequence[Row]) -> str:
    """Return KL over seconds of tuning, points for each recipe."""
    figure, axes = new_axes(7, 4)
    _draw_recipes(axes, rows, "seconds", "o")
    axes.set_xscale("log")
    _label_kl(axes, "seconds of tuning")
    return svg(figure)


def _draw_recipes(axes: Any, rows: Sequence[Row], key: str, marks: str) -> None:
    for recipe in dict.fromkeys(r["recipe"] for r in rows):
        points = sorted((r[key], r["kl"]) for r in rows if r["recipe"] == recipe)
        axes.plot(*zip(*points, strict=True), marks, label=plotted(recipe))


def _label_kl(axes: Any, label: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("KL to the original, nats per token")
    axes.legend(fontsize="small")


def _losses(rows: Sequence[Row]) -> str:
    """Return the loss of each block after tuning, a line for each recipe."""
    figure, axes = new_axes(7, 3.2)
    for r in rows:
        losses = [b["after"] for b in r["blocks"]]
        axes.plot(range(1, len(losses) + 1), losses, "o-", label=plotted(r["recipe"]))
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("squared error per token")
    axes.legend(fontsize="small")
    return svg(figure)
