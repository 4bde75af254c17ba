"""Commands that look at an artifact or a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from ..errors import LowbitError
from . import options
from .app import Device, Python, app, out, reported

Number = TypeVar("Number", int, float)


@app.command()
@reported
def inspect(folder: options.Artifact) -> None:
    """Show an artifact's recipe, its layers, what was skipped and why, and its hashes."""
    from ..artifact.proof import read_report
    from .display import artifact_lines, linears_table

    report = read_report(folder)
    out.print(linears_table(report))
    for line in artifact_lines(report, folder):
        out.print(line)


@app.command()
@reported
def verify(
    folder: options.MovedArtifact,
    loader: options.Loader = True,
    source: options.Source = None,
    python: Python = sys.executable,
    load: options.Load = "auto",
) -> None:
    """Compare every tensor and code with what was tuned, and the logits that its runtime computes
    with the tuned model's.
    """
    from ..artifact.proof import verify as check
    from ..run.identity import check_source

    if source is not None:
        out.print(check_source(folder, source))
    out.print(f"verified: {check(folder, loader=loader, python=python, loading=load).summary}")


@app.command()
@reported
def analyze(
    model: options.Model,
    output: options.AnalysisOutput,
    text: options.AnalysisText = "stdlib",
    length: options.Length = None,
    windows: options.Windows = None,
    bos: options.Bos = "auto",
    batch: options.WindowBatch = 8,
    bits: options.Bits = "8,4",
    exponents: options.Exponents = "0.15,0.55",
    columns: options.Columns = "call",
    shares: options.Shares = "0.01,0.02,0.05,0.1,0.2,0.3,0.4,0.5",
    remove: options.Remove = True,
    device: Device = "auto",
) -> None:
    """Which activations a quantizer turns into zero, outliers of every linear's input, and what
    zeroing them costs.
    """
    from ..artifact.output import working
    from ..evaluate.analyze import StudyOptions, study, write_analysis
    from ..machine import pick_device
    from .display import analysis_tables, progress_bar

    with (
        working(output, "analyze"),
        progress_bar(out) as measuring,
        progress_bar(out, "runs") as removing,
    ):
        given = StudyOptions(
            model=model,
            text=text,
            length=length,
            windows=windows,
            bos=bos,
            batch=batch,
            bits=_numbers(bits, int, "--bits"),
            exponents=_numbers(exponents, float, "--exponents"),
            columns=columns,
            shares=_numbers(shares, float, "--shares") if remove else None,
            device=str(pick_device(device)),
        )
        data = study(given, measuring, removing)
        page = write_analysis(output, data)
    for table in analysis_tables(data):
        out.print(table)
    out.print(f"{page}, analysis.json")


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> tuple[Number, ...]:
    """Return the numbers of an option, in the order given.

    Raises:
        LowbitError: something else stands there, or nothing; --exponents may be empty.
    """
    try:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as e:
        raise LowbitError(f"{option} takes numbers with commas, got '{text}'.") from e
    if not found and option != "--exponents":
        raise LowbitError(f"{option} is empty.")
    return found
