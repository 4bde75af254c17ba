"""What `lowbit inspect` shows of an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...console import Table
from .units import duration, size


def linears_table(report: Mapping[str, Any]) -> Table:
    """Return a row for each linear, skipped ones included."""
    table = Table(
        "linear",
        "scheme",
        "shape",
        "bytes",
        "bits/weight",
        "codes not nearest",
        "error, nearest -> tuned",
    )
    for e in report["linears"]:
        if "skipped" in e:
            table.add_row(e["name"], "skipped", e["skipped"])
            continue
        table.add_row(
            e["name"],
            e["scheme"],
            " x ".join(map(str, e["shape"])),
            size(e["bytes"]),
            f"{e['bits_per_weight']:.3f}",
            f"{e['moved']:.1%}",
            f"{e['error_nearest']:.3g} -> {e['error']:.3g}",
        )
    return table


def artifact_lines(report: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield what follows the table: blocks, files, remarks, recipe and hashes.

    Args:
        folder: of the artifact, for its recipe.
    """
    for b in report["blocks"]:
        losses = f"loss {b['loss_before']:.4g} -> {b['loss_after']:.4g}"
        yield f"{b['name']}: {losses}, {duration(b['seconds'])}"
    for name, why in report.get("copied", {}).items():
        yield f"{name}: {why}"
    for name, why in report.get("left_out", {}).items():
        yield f"{name}: left out, {why}"
    for remark in report.get("remarks", ()):
        yield f"note: {remark}"
    yield (folder / "recipe.toml").read_text(encoding="utf-8").strip()
    for name, shard in report["shards"].items():
        yield f"{name}  {size(shard['bytes'])}  sha256 {shard['sha256']}"
    yield (
        f"hash {report['hash']}, made by lowbit {report['lowbit']} from {report['model']}, seed "
        f"{report['seed']}"
    )
