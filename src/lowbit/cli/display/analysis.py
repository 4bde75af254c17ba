"""What `lowbit analyze` shows at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...console import Table


def analysis_tables(data: Mapping[str, Any]) -> list[Table]:
    """Return tables of every input, of the grids, and of the remove-kernel experiment if it ran.

    Args:
        data: as from `lowbit.evaluate.analyze.study`.
    """
    tables = [_inputs(data), _grids(data)]
    removed = [r for r in data["removals"] if r["grid"] is None and r["kind"] != "none"]
    if removed:
        tables.append(_removals(data, removed))
    return tables


def _inputs(data: Mapping[str, Any]) -> Table:
    """Return a row for each input, under the grids of the first width."""
    width = data["grids"][0].split()[0]
    shown = [g for g in data["grids"] if g.startswith(width + " ")]
    heads = [g.removeprefix(width + " ").replace("CrossQuant", "cross") for g in shown]
    outliers = ("largest", "channels", "tokens", ">= 6")
    table = Table("block", "input of", "zero", *heads, *outliers, title=data["title"])
    for site in data["sites"]:
        first, *others = site["linears"]
        block, _, inside = first.partition("layers.")[2].partition(".")
        table.add_row(
            block,
            ", ".join(name.rpartition(".")[2] for name in (inside, *others)),
            f"{site['zeros']:.1%}",
            *(f"{site['kernel'][g]:.2%}" for g in shown),
            f"{site['largest']:.3g}",
            f"{site['channel_spread']:.3g}",
            f"{site['token_spread']:.3g}",
            str(site["outlier_channels"]),
        )
    table.caption = (
        f"at {width}, share of non-zero elements that become zero under each grid; channels, "
        "tokens: the largest maximum over the median one; "
        ">= 6: channels that reach 6"
    )
    return table


def _grids(data: Mapping[str, Any]) -> Table:
    """Return the mean kernel share of each grid, and perplexities if they were measured."""
    cost = {(r["grid"], r["kind"]): f"{r['perplexity']:.4f}" for r in data["removals"] if r["grid"]}
    table = Table(
        "grid", "mean kernel share", "perplexity, weights in 8 bits", "with the kernel restored"
    )
    for name, share in data["mean"].items():
        plain, restored = (cost.get((name, kind), "") for kind in ("quantized", "restored"))
        table.add_row(name, f"{share:.3%}", plain, restored)
    return table


def _removals(data: Mapping[str, Any], removed: Sequence[Mapping[str, Any]]) -> Table:
    """Return the perplexity at every share set to zero, a column for each way to choose them."""
    base = next(r["perplexity"] for r in data["removals"] if r["kind"] == "none")
    found = {(r["kind"], r["share"]): f"{r['perplexity']:.4f}" for r in removed}
    kinds = list(dict.fromkeys(r["kind"] for r in removed))
    shares = list(dict.fromkeys(r["share"] for r in removed))
    table = Table(
        "set to zero",
        *kinds,
        title=f"perplexity with a share of non-zero elements set to zero; {base:.4f} with none",
    )
    for share in shares:
        table.add_row(f"{share:g}", *(found[kind, share] for kind in kinds))
    knees = [data["knees"][kind] for kind in kinds]
    table.add_row("1 % worse at", *("never here" if k is None else f"{k:.3f}" for k in knees))
    return table
