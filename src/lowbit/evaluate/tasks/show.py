"""What a person sees of tasks: a table and notes."""

from __future__ import annotations

from ...console import Table
from .score import TaskResult, TaskResults


def table(results: TaskResults) -> Table:
    """Return a row for each task, the mean last.

    Accuracies are in percent. Each metric has its standard error where there is one.
    """
    metrics = sorted({m for r in results.each for m in r.metrics})  # acc and acc_norm come first
    shown = Table("task")
    for name in (*metrics, "examples", "shots"):
        shown.add_column(name, justify="right", no_wrap=name.startswith("acc"))
    for r in results.each:
        shown.add_row(r.name, *(_value(r, m) for m in metrics), str(r.examples), str(r.shots))
    if results.mean_acc is not None and len(results.averaged) > 1:
        shown.add_section()
        shown.add_row(
            f"mean of {len(results.averaged)}",
            *(f"{100 * results.mean_acc:.2f}" if m == "acc" else "" for m in metrics),
        )
    return shown


def notes(results: TaskResults) -> list[str]:
    """Return what a reader of the table must know: the data, prompts that were cut, that not all
    examples were asked.
    """
    found = [f"{r.name}: {_data(r)}" for r in results.each]
    if len(results.averaged) > 1:
        found.append(f"mean: acc, every task counted once, over {', '.join(results.averaged)}")
    found += [
        f"{r.name}: {r.cut} of {r.examples} prompts lost their beginning to fit into the model's "
        "context"
        for r in results.each
        if r.cut
    ]
    if results.limit is not None:
        found.append(
            f"only the first {results.limit} examples of each task, of each subject in a group: "
            "not what papers report"
        )
    return found


def _value(r: TaskResult, metric: str) -> str:
    """Return a metric with its standard error."""
    if metric not in r.metrics:
        return ""
    value, error = r.metrics[metric], r.stderr.get(metric)
    if metric.startswith("acc"):
        shown, spread = f"{100 * value:.2f}", f"{100 * (error or 0):.2f}"
    else:
        shown, spread = f"{value:.4g}", f"{error or 0:.2g}"
    return shown if error is None else f"{shown} +- {spread}"


def _data(r: TaskResult) -> str:
    """Return the names and hashes of the data."""
    source = r.source
    files = [(source.data, source.sha256)]
    if source.shots:
        files.append((f"shots {source.shots}", source.shots_sha256))
    return "; ".join(
        f"{name}, sha256 {digest[:16]}" if digest else name for name, digest in files if name
    )
