"""Commands that look at an artifact or a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..console import Table
from ..errors import LowbitError
from .app import Device, Python, app, out, reported
from .numbers import whole


@app.command()
@reported
def inspect(folder: Annotated[Path, typer.Argument(help="Artifact folder.")]) -> None:
    """Show an artifact's recipe, its layers, what was skipped and why, and its hashes."""
    from ..display import duration, size
    from ..proof import read_report

    report = read_report(folder)
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
            table.add_row(e["name"], "skipped", e["skipped"], "", "", "", "")
        else:
            table.add_row(
                e["name"],
                e["scheme"],
                " x ".join(map(str, e["shape"])),
                size(e["bytes"]),
                f"{e['bits_per_weight']:.3f}",
                f"{e['moved']:.1%}",
                f"{e['error_nearest']:.3g} -> {e['error']:.3g}",
            )
    out.print(table)
    for b in report["blocks"]:
        out.print(
            f"{b['name']}: loss {b['loss_before']:.4g} -> {b['loss_after']:.4g}, "
            f"{duration(b['seconds'])}"
        )
    for name, why in report.get("copied", {}).items():
        out.print(f"{name}: {why}")
    for name, why in report.get("left_out", {}).items():
        out.print(f"{name}: left out, {why}")
    for remark in report.get("remarks", ()):
        out.print(f"note: {remark}")
    out.print((folder / "recipe.toml").read_text(encoding="utf-8").strip())
    for name, shard in report["shards"].items():
        out.print(f"{name}  {size(shard['bytes'])}  sha256 {shard['sha256']}")
    out.print(
        f"hash {report['hash']}, made by lowbit {report['lowbit']} from {report['model']}, seed "
        f"{report['seed']}"
    )


@app.command()
@reported
def verify(
    folder: Annotated[Path, typer.Argument(help="Artifact folder, also a copy that was moved.")],
    loader: Annotated[
        bool, typer.Option(help="Also load it with its runtime and compare logits.")
    ] = True,
    source: Annotated[
        Optional[str],
        typer.Option(
            help=(
                "The model it was made of, folder or hub id: also compare every byte of its files "
                "with what was quantized."
            ),
            show_default=False,
        ),
    ] = None,
    python: Python = sys.executable,
) -> None:
    """Compare every tensor and code with what was tuned, and the logits that its runtime computes
    with the tuned model's.
    """
    from ..proof import verify as check
    from ..run.identity import check_source

    if source is not None:
        out.print(check_source(folder, source))
    out.print(f"verified: {check(folder, loader=loader, python=python).summary}")


@app.command()
@reported
def analyze(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for analysis.json and analysis.html.")
    ],
    text: Annotated[
        str,
        typer.Option(
            help=(
                "Text that passes: stdlib (its held-out side), a file, a folder or hub dataset, "
                "wikitext2, c4."
            )
        ),
    ] = "stdlib",
    length: Annotated[
        Optional[int],
        typer.Option(
            help="Window length; default 2048 or the model's context if shorter.", callback=whole(2)
        ),
    ] = None,
    windows: Annotated[
        Optional[int], typer.Option(help="Use only the first so many windows.", callback=whole())
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            help=(
                "Windows that pass together: over them a channel's maximum is taken with "
                "--columns call."
            ),
            callback=whole(),
        ),
    ] = 8,
    bits: Annotated[str, typer.Option(help="Widths of the activation grids, with commas.")] = "8,4",
    exponents: Annotated[
        str, typer.Option(help="CrossQuant's row exponents, with commas.")
    ] = "0.15,0.55",
    columns: Annotated[
        str, typer.Option(help="Channel maxima over a call or a sequence.")
    ] = "call",
    shares: Annotated[
        str,
        typer.Option(
            help="Shares of non-zero elements to set to zero in the remove-kernel experiment."
        ),
    ] = "0.01,0.02,0.05,0.1,0.2,0.3,0.4,0.5",
    remove: Annotated[
        bool, typer.Option(help="Run the remove-kernel experiment; its weights are in 8 bits.")
    ] = True,
    device: Device = "auto",
) -> None:
    """Which activations a quantizer turns into zero, outliers of every linear's input, and what
    zeroing them costs.
    """
    from ..analyze import study, write_analysis
    from ..display import analysis_tables, windows_bar
    from ..machine import pick_device
    from ..output import working

    with working(output, "analyze"), windows_bar(out) as tell, windows_bar(out, "runs") as removing:
        data = study(
            model,
            text,
            length=length,
            windows=windows,
            batch=batch,
            bits=_numbers(bits, int, "--bits"),
            columns=columns,
            exponents=_numbers(exponents, float, "--exponents"),
            shares=_numbers(shares, float, "--shares") if remove else None,
            device=str(pick_device(device)),
            progress=tell,
            removing=removing,
        )
        page = write_analysis(output, data)
    for table in analysis_tables(data):
        out.print(table)
    out.print(f"{page}, analysis.json")


def _numbers(text: str, kind: type[Any], option: str) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as e:
        raise LowbitError(f"{option} takes numbers with commas, got '{text}'.") from e
    if not found and option != "--exponents":
        raise LowbitError(f"{option} is empty.")
    return found
