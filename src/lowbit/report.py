"""One self-contained HTML page with tables and plots. Knows nothing of models: it is given rows of
plain data.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .verbatim import encodable, markdown, plotted

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.3rem .8rem;border-bottom:1px solid #d8dee6;text-align:right}
th:first-child,td:first-child{text-align:left}pre{background:#f4f6f9;padding:.8rem;overflow:auto}
img{max-width:100%}@media(prefers-color-scheme:dark){body{background:#12161c;color:#dfe6ee}
pre{background:#1b212a}th,td{border-color:#333c48}img{background:#fff}}
"""


def write_page(folder: Path, rows: Sequence[Mapping[str, Any]], title: str) -> Path:
    """Write report.html (and the same data as demo.json) into a folder.

    Args:
        rows: one per recipe, with recipe, scheme, bits, bytes, perplexity, kl, top1, seconds,
            sample, losses.

    Returns:
        path of the page.
    """
    _write(folder / "demo.json", json.dumps({"title": title, "rows": list(rows)}, indent=1) + "\n")
    plots = _plots(rows)
    body = [f"<h1>lowbit</h1><p>{html.escape(title)}</p>", _table(rows)]
    body += [
        f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" '
        f'src="data:image/svg+xml;base64,{data}">'
        for name, data in plots
    ]
    if not plots:
        body.append("<p>Plots need matplotlib: <code>pip install 'lowbit[report]'</code>.</p>")
    body.append("<h2>Samples</h2>")
    body += [
        f"<h3>{html.escape(str(r['recipe']))}</h3><pre>{html.escape(str(r['sample']))}</pre>"
        for r in rows
    ]
    body += [
        f"<p>{html.escape(str(r['recipe']))}: {html.escape(str(r['verified']))}; hash "
        f"{r['hash'][:16]}</p>"
        for r in rows
        if "verified" in r
    ]
    page = folder / "report.html"
    write_html(page, "lowbit", body)
    return page


def write_html(path: Path, title: str, body: Sequence[str]) -> None:
    """A self-contained page from pieces of its body, which are HTML already."""
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>"
    )
    _write(path, head + "\n".join(body) + "</html>\n")


def _write(path: Path, text: str) -> None:
    """A file that has its name when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(encodable(text).encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_comparison(folder: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write comparison.json, .csv, .md and report.html into a folder.

    Args:
        rows: one per cell, with scheme, recipe and either error or bits, bytes, perplexity, kl,
            top1, seconds, blocks, tasks.
    """
    _write(
        folder / "comparison.json",
        json.dumps({"title": title, "rows": list(rows)}, indent=1) + "\n",
    )
    names = sorted({t for r in rows for t in (r.get("tasks") or {}).get("each", {})})
    head = [
        "scheme",
        "recipe",
        "bits/weight",
        "bytes",
        "perplexity",
        "KL",
        "top-1",
        *names,
        *(["mean acc"] if names else []),
        "seconds",
    ]
    cells = [_cells(r, names) for r in rows]
    table_ = io.StringIO(newline="")
    csv.writer(table_).writerows([head, *cells])
    _write(folder / "comparison.csv", table_.getvalue())
    lines = [markdown(title), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(markdown(c).replace("|", "\\|") for c in row) + " |" for row in cells
    ]
    _write(folder / "comparison.md", "\n".join(lines) + "\n")
    table = "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"
    table += "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells
    )
    body = [f"<h1>Comparison</h1><p>{html.escape(title)}</p><table>{table}</table>"]
    plots = _comparison_plots([r for r in rows if "error" not in r])
    body += [
        f'<h2>{html.escape(n)}</h2><img alt="{html.escape(n)}" '
        f'src="data:image/svg+xml;base64,{data}">'
        for n, data in plots
    ]
    if not plots:
        body.append("<p>Plots need matplotlib: <code>pip install 'lowbit[report]'</code>.</p>")
    failed = [
        f"<li>{html.escape(r['recipe'])}, {html.escape(r['scheme'])}: "
        f"{html.escape(r['error'])}</li>"
        for r in rows
        if "error" in r
    ]
    body += ["<h2>Failures</h2><ul>", *failed, "</ul>"] if failed else []
    write_html(folder / "report.html", "comparison", body)


def _cells(r: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    if "error" in r:
        return [
            r["scheme"],
            r["recipe"],
            "",
            "",
            "failed: " + r["error"],
            "",
            "",
            *[""] * (len(tasks) + bool(tasks)),
            "",
        ]
    found = (r.get("tasks") or {}).get("each", {})
    accuracies = [f"{found[t]['acc']:.4f}" if "acc" in found.get(t, {}) else "" for t in tasks]
    mean = (r.get("tasks") or {}).get("mean_acc")
    return [
        r["scheme"],
        r["recipe"],
        "" if r["bits"] is None else f"{r['bits']:.3f}",
        str(r["bytes"]),
        f"{r['perplexity']:.4f}",
        f"{r['kl']:.5f}",
        f"{r['top1']:.4f}",
        *accuracies,
        *([f"{mean:.4f}" if mean is not None else ""] if tasks else []),
        f"{r['seconds']:.1f}",
    ]


def _comparison_plots(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    quantized = [r for r in rows if r["bits"] is not None]
    out: list[tuple[str, str]] = []
    if not quantized:
        return out
    axes_of = (
        ("Quality against size", "bits", "bits per weight, from bytes"),
        ("Quality against time", "seconds", "seconds of tuning"),
    )
    for name, key, label in axes_of:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for recipe in dict.fromkeys(r["recipe"] for r in quantized):
            points = [(r[key], r["kl"]) for r in quantized if r["recipe"] == recipe]
            axes.plot(
                *zip(*sorted(points), strict=True),
                "o-" if key == "bits" else "o",
                label=plotted(recipe),
            )
        if key == "seconds":
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("KL to the original, nats per token")
        axes.legend(fontsize="small")
        out.append((name, svg(figure)))
    for scheme in dict.fromkeys(r["scheme"] for r in quantized):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for r in quantized:
            if r["scheme"] == scheme:
                axes.plot(
                    range(1, len(r["blocks"]) + 1),
                    [b["after"] for b in r["blocks"]],
                    "o-",
                    label=plotted(r["recipe"]),
                )
        axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel("squared error per token")
        axes.legend(fontsize="small")
        out.append((f"Block losses, {scheme}", svg(figure)))
    return out


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(
        f"<th>{h}</th>"
        for h in ("recipe", "scheme", "bits/weight", "MB", "perplexity", "KL", "top-1", "seconds")
    )
    lines = []
    for r in rows:
        kl, top = ("-", "-") if r["kl"] is None else (f"{r['kl']:.4f}", f"{r['top1']:.1%}")
        cells = (
            r["recipe"],
            r["scheme"],
            f"{r['bits']:.3f}",
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['perplexity']:.3f}",
            kl,
            top,
            f"{r['seconds']:.1f}",
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _plots(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    out = []
    quantized = [r for r in rows if r["kl"] is not None]
    for name, key, label in (
        ("Perplexity", "perplexity", "perplexity"),
        ("Distance to the original", "kl", "mean KL (nats per token)"),
    ):
        shown = rows if key == "perplexity" else quantized
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        bars = axes.bar([str(r["recipe"]) for r in shown], [r[key] for r in shown], color="#3b6ea8")
        axes.bar_label(bars, fmt="%.3g")
        axes.set_yscale("log")
        axes.set_ylabel(label + ", log scale")
        out.append((name, svg(figure)))
    tuned = [r for r in rows if r["losses"]]
    if tuned:
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for r in tuned:
            numbers = range(1, len(r["losses"]) + 1)
            axes.plot(
                numbers, [after for _, after in r["losses"]], "o-", label=plotted(r["recipe"])
            )
        axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel("squared error per token, log scale")
        axes.legend()
        out.append(("Output error of each block on the quantized prefix", svg(figure)))
    return out


def svg(figure: Any) -> str:
    """A matplotlib figure as base64 of its SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()
