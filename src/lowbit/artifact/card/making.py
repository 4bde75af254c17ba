"""The section "How it was made": recipe, calibration, versions, and the command."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...names import hub_of
from ...verbatim import code, code_block, markdown
from .facts import shown, table


def making(report: Mapping[str, Any]) -> str:
    """Return the section."""
    recipe = report["recipe"]
    methods = ", ".join(recipe["methods"]) or "none"
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    rows = [
        (
            "recipe",
            f"{code(recipe['name'])} (methods: {methods}); all settings in `recipe.toml`",
        ),
        ("scheme", f"`{recipe['scheme']}`"),
        ("linears", _linears(report["linears"])),
        ("calibration", _calibration(report["calibration"])),
        ("seed", str(report["seed"])),
        ("computed", f"on {report['device']}, in {report['compute'].removeprefix('torch.')}"),
        ("versions", ", ".join((f"lowbit {report['lowbit']}", *versions))),
    ]
    weights = "; ".join(markdown(remark) for remark in report.get("source", {}).get("weights", ()))
    if weights:
        rows.insert(0, ("source", weights))
    lines = ["## How it was made", "", *table(("", ""), rows)]
    if "command" in report:
        lines += _command(report)
    return "\n".join(lines)


def _linears(linears: list[Mapping[str, Any]]) -> str:
    """Return how many linears have which scheme, and which were left in floating point."""
    schemes = Counter(e["scheme"] for e in linears if "skipped" not in e)
    text = ", ".join(f"{n} in `{s}`" for s, n in schemes.items())
    widths = sum((Counter(e.get("columns", {})) for e in linears), Counter())
    if len(widths) > 1:
        counts = ", ".join(f"{n} of {bits}" for bits, n in sorted(widths.items()))
        text += f", columns by their bits: {counts}"
    outliers = sum(e.get("outliers", 0) for e in linears)
    if outliers:
        text += f", {outliers} weights kept in 16 bits"
    skipped = ", ".join(f"`{e['name']}` ({e['skipped']})" for e in linears if "skipped" in e)
    if skipped:
        text += f"; kept in floating point: {skipped}"
    return text


def _calibration(calibration: Mapping[str, Any]) -> str:
    """Return the text, its size and its hash."""
    text = (
        f"{markdown(shown(calibration['source']))}, {calibration['samples']} rows of "
        f"{calibration['length']} tokens, sha256 `{calibration['sha256'][:16]}`"
    )
    chats = calibration.get("conversations")
    if chats:
        text += f", {chats} conversations written by the model's chat template"
    return text


def _command(report: Mapping[str, Any]) -> list[str]:
    """Return the lines that repeat the command, with the paths of its author cut."""
    model, hub = report["model"], hub_of(report)
    words = [hub if hub and word == model else word for word in report["command"]]
    commands = [shlex.join(map(shown, words))]
    if "exported_from" in report:
        commands.append(f"lowbit export OUT -o DIR --to {report['format']}")
    lines = ["", code_block("sh", *commands)]
    cut = [shown(word) for word in words if Path(word).name == shown(word) != word]
    if cut:
        lines += ["", f"Of paths only the last part is shown: {', '.join(map(code, cut))}."]
    return lines
