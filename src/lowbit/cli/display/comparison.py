"""What `lowbit compare` shows at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...console import Table
from .units import duration, size


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return all cells of a comparison, failures included.

    Args:
        rows: as `lowbit.cli.compare.comparison.Comparison.run` yields them.
    """
    tasks = any(r.get("tasks") for r in rows)
    accuracy = ["mean acc"] if tasks else []
    heads = ["scheme", "recipe", "bits", "size", "perplexity", "KL", "top-1", *accuracy, "time"]
    table = Table(*heads, title=title)
    for r in rows:
        if "error" in r:
            table.add_row(r["scheme"], r["recipe"], "", "", "failed", style="red")
        else:
            table.add_row(*_cells(r, tasks))
    return table


def _cells(r: Mapping[str, Any], tasks: bool) -> list[str]:
    """Return the cells of a row that did not fail."""
    cells = [
        r["scheme"],
        r["recipe"],
        "" if r["bits"] is None else f"{r['bits']:.3f}",
        size(r["bytes"]),
        f"{r['perplexity']:.4g}",
        f"{r['kl']:.4f}",
        f"{r['top1']:.1%}",
    ]
    if tasks:
        mean = r["tasks"]["mean_acc"]
        cells.append("" if mean is None else f"{mean:.3f}")
    return [*cells, duration(r["seconds"]) if r["seconds"] else ""]
