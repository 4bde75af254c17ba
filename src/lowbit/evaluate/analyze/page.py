"""analysis.json and analysis.html: tables of shares and outliers, and plots of what removing them
costs.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...artifact.disk import disk, write_atomic
from ..pages.page import Plot, figures, has_matplotlib, new_axes, svg, table, write_html


def write_analysis(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write both files into a folder, which is made if need be; return the page's path.

    Args:
        data: title, grids (names), sites (as `Site.as_dict`), mean (grid -> share), removals
            ({kind, share, grid, perplexity}), knees.

    Raises:
        LowbitError: the file system refuses.
    """
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "analysis.json", (json.dumps(data, indent=1) + "\n").encode())
    body = [
        f"<h1>Activations</h1><p>{html.escape(data['title'])}</p>",
        _means(data),
        *figures(_plots(data)),
        f"<h2>Every linear</h2>{_linears(data)}",
    ]
    page = folder / "analysis.html"
    with disk(page):
        write_html(page, "activations", body)
    return page


def _means(data: Mapping[str, Any]) -> str:
    """Return the table of grids."""
    cost = {(r["grid"], r["kind"]): f"{r['perplexity']:.4f}" for r in data["removals"]}
    rows = [
        (name, f"{share:.3%}", cost.get((name, "quantized"), ""), cost.get((name, "restored"), ""))
        for name, share in data["mean"].items()
    ]
    head = ("grid", "mean kernel share", "perplexity", "with the kernel restored")
    return table(head, rows)


def _linears(data: Mapping[str, Any]) -> str:
    """Return the table of inputs."""
    grids: Sequence[str] = data["grids"]
    head = [
        "linears",
        "zeros",
        *grids,
        "largest",
        "largest / median channel",
        "largest / median token",
        "channels with 6 or more",
    ]
    return table(head, [_cells(site, grids) for site in data["sites"]])


def _cells(site: Mapping[str, Any], grids: Sequence[str]) -> list[str]:
    first, *others = site["linears"]
    return [
        ", ".join((first, *(name.rpartition(".")[2] for name in others))),
        f"{site['zeros']:.2%}",
        *(f"{site['kernel'][g]:.3%}" for g in grids),
        f"{site['largest']:.3g}",
        f"{site['channel_spread']:.3g}",
        f"{site['token_spread']:.3g}",
        f"{site['outlier_channels']} of {site['channels']}",
    ]


def _plots(data: Mapping[str, Any]) -> list[Plot]:
    """Return the plots; none without matplotlib."""
    if not has_matplotlib():
        return []
    plots = [("Kernel share of every input", _shares(data))]
    removed = [r for r in data["removals"] if r["grid"] is None and r["kind"] != "none"]
    if removed:
        base = next(r["perplexity"] for r in data["removals"] if r["kind"] == "none")
        name = "What setting elements to zero costs; the grey line is 1 % more"
        plots.append((name, _costs(removed, base)))
    return plots


def _shares(data: Mapping[str, Any]) -> str:
    """Return the kernel share of every input, a line for each grid."""
    figure, axes = new_axes(8, 4)
    for name in data["grids"]:
        shares = [100 * site["kernel"][name] for site in data["sites"]]
        axes.plot(range(len(shares)), shares, ".-", label=name)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xlabel("inputs of linears, in the order of the forward pass")
    axes.set_ylabel("% of non-zero elements that become zero")
    axes.legend(fontsize="small")
    return svg(figure)


def _costs(removed: Sequence[Mapping[str, Any]], base: float) -> str:
    """Return perplexity over the share set to zero, a line for each kind; ``base`` is at none."""
    figure, axes = new_axes(8, 4)
    for kind in dict.fromkeys(r["kind"] for r in removed):
        points = [(r["share"], r["perplexity"]) for r in removed if r["kind"] == kind]
        axes.plot(*zip((0.0, base), *points, strict=True), "o-", label=kind)
    axes.axhline(base * 1.01, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("share of non-zero elements set to zero")
    axes.set_ylabel("perplexity (weights in 8 bits)")
    axes.legend(fontsize="small")
    return svg(figure)
