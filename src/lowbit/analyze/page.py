"""analysis.json and analysis.html: tables of shares and outliers, and plots of what removing them
costs.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk import disk, write_atomic
from ..report import svg, write_html


def write_analysis(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write both files into a folder, which is made if need be; returns the page's path.

    Args:
        data: title, grids (names), sites (as `Site.as_dict`), mean (grid -> share), removals
            ({kind, share, grid, perplexity}), knees.

    Raises:
        LowbitError: the file system refuses.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "analysis.json", (json.dumps(data, indent=1) + "\n").encode())
    grids: Sequence[str] = data["grids"]
    body = [f"<h1>Activations</h1><p>{html.escape(data['title'])}</p>", _means(data)]
    body += [
        f'<h2>{html.escape(n)}</h2><img alt="{html.escape(n)}" '
        f'src="data:image/svg+xml;base64,{image}">'
        for n, image in _plots(data)
    ]
    head = [
        "linears",
        "zeros",
        *grids,
        "largest",
        "largest / median channel",
        "largest / median token",
        "channels with 6 or more",
    ]
    rows = "".join(_row(s, grids) for s in data["sites"])
    titles = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body.append(f"<h2>Every linear</h2><table><tr>{titles}</tr>{rows}</table>")
    page = folder / "analysis.html"
    with disk(page):
        write_html(page, "activations", body)
    return page


def _means(data: Mapping[str, Any]) -> str:
    plain = {r["grid"]: r["perplexity"] for r in data["removals"] if r["kind"] == "quantized"}
    restored = {r["grid"]: r["perplexity"] for r in data["removals"] if r["kind"] == "restored"}
    lines = (
        "<tr><th>grid</th><th>mean kernel share</th><th>perplexity</th><th>with the kernel "
        "restored</th></tr>"
    )
    for name, share in data["mean"].items():
        cells = (
            name,
            f"{share:.3%}",
            *(f"{t[name]:.4f}" if name in t else "" for t in (plain, restored)),
        )
        lines += "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
    return f"<table>{lines}</table>"


def _row(site: Mapping[str, Any], grids: Sequence[str]) -> str:
    names = site["linears"][0] + "".join(", " + n.rpartition(".")[2] for n in site["linears"][1:])
    cells = [
        names,
        f"{site['zeros']:.2%}",
        *(f"{site['kernel'][g]:.3%}" for g in grids),
        f"{site['largest']:.3g}",
    ]
    cells += [
        f"{site['channel_spread']:.3g}",
        f"{site['token_spread']:.3g}",
        f"{site['outlier_channels']} of {site['channels']}",
    ]
    return "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"


def _plots(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in data["grids"]:
        axes.plot(
            range(len(data["sites"])),
            [100 * s["kernel"][name] for s in data["sites"]],
            ".-",
            label=name,
        )
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xlabel("inputs of linears, in the order of the forward pass")
    axes.set_ylabel("% of non-zero elements that become zero")
    axes.legend(fontsize="small")
    out = [("Kernel share of every input", svg(figure))]
    removed = [r for r in data["removals"] if r["grid"] is None and r["kind"] != "none"]
    if removed:
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        base = next(r["perplexity"] for r in data["removals"] if r["kind"] == "none")
        for kind in dict.fromkeys(r["kind"] for r in removed):
            points = [(r["share"], r["perplexity"]) for r in removed if r["kind"] == kind]
            axes.plot(*zip((0.0, base), *points, strict=True), "o-", label=kind)
        axes.axhline(base * 1.01, color="grey", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xlabel("share of non-zero elements set to zero")
        axes.set_ylabel("perplexity (weights in 8 bits)")
        axes.legend(fontsize="small")
        out.append(("What setting elements to zero costs; the grey line is 1 % more", svg(figure)))
    return out
