"""What `lowbit quantize` says at its end: sizes, proof, and what to type next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...artifact.card import polished
from ...formats.uniform import as_uniform
from ...grid.names import parse_scheme
from ...run.asked import Result
from ...verbatim import literal, shell
from .units import duration, size

_USUALLY_LEFT = ("README.md", "model.safetensors.index.json")


def summary(result: Result) -> str:
    """Return the closing lines of a run: sizes, proof, and what to type next."""
    report, folder = result.report, result.folder
    s = report["size"]
    lines = [
        "already made by an earlier run of this command; verified again" if result.repeated else "",
        f"{size(s['before'])} -> {size(s['after'])} on disk; {s['bits_per_weight']:.3f} bits per "
        f"quantized weight, {s['model_bits_per_weight']:.3f} over all parameters",
    ]
    lines += [f"note: {remark}" for remark in _remarks(report)]
    kept = report.get("offload")  # older reports have none
    if kept and kept["used"] == "disk":
        lines.append(f"activations were kept on disk, {size(kept['bytes'])} at most")
    if report["quality"]:
        before, after = report["quality"]["float"], report["quality"]["quantized"]
        lines.append(
            f"{report['quality']['text']}, {after['windows']} x {after['length']} tokens: "
            f"perplexity {before['perplexity']:.4g} -> {after['perplexity']:.4g}, "
            f"KL {after['kl']:.4g}, top-1 {after['top1']:.1%}"
        )
    if "polish" in report:
        lines.append(polished(report["polish"]))
    lines += [
        f"verified: {result.verification.summary}",
        f"hash {report['hash'][:16]}, {duration(report['seconds'])}, report in "
        f"{folder / 'report.json'}",
        "",
        *_use(folder, report),
        f"evaluate  lowbit eval {shell(folder)} --text stdlib --reference {shell(report['model'])}",
        f"check     lowbit verify {shell(folder)}",
        f"share     lowbit push {shell(folder)} OWNER/NAME    (with its model card, README.md)",
    ]
    return "\n".join(lines)


def _remarks(report: Mapping[str, Any]) -> list[str]:
    """Return what a person should know of an artifact's source, tensors and files.

    Older reports have none.
    """
    lines = list(report.get("remarks", ()))
    copied = report.get("copied", {})
    if copied:
        lines.append(
            f"{len(copied)} tensors that the model's class does not know were copied as they are: "
            f"{_some(copied)}"
        )
    # A quantized mixture has thousands of scales: the report names them all.
    alike: dict[str, list[str]] = {}
    for name, why in report.get("left_out", {}).items():
        if name not in _USUALLY_LEFT and not name.startswith("."):
            alike.setdefault(re.sub("'.*?'", "", why), []).append(f"{name} ({why})")
    for first, *others in alike.values():
        lines.append(f"left out: {first}" + (f" and {len(others)} alike" if others else ""))
    return lines


def _some(names: Iterable[str], shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    first = ", ".join(listed[:shown])
    return f"{first} and {len(listed) - shown} more" if len(listed) > shown else first


def _use(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """Return the lines on how to load and to serve an artifact."""
    kind = report.get("class", "AutoModelForCausalLM")
    if report["format"] == "lowbit":
        return [
            f"load      import lowbit; {kind}.from_pretrained({literal(folder)})    "
            "(runs in transformers, after import lowbit)",
            "serve     no server reads this format, chosen for "
            f"{report.get('beyond_compressed_tensors', 'what compressed-tensors cannot carry')}",
            "          if vLLM can run it all the same, this makes a copy for it, or says why "
            f"not: lowbit export {shell(folder)} -o DIR",
        ]
    scheme = report["recipe"]["scheme"]
    if as_uniform(parse_scheme(scheme).weights) is None:
        serve = f"no server is known here to run {scheme}, though it may read compressed-tensors"
    else:
        serve = (
            f"vllm serve {shell(folder)}    (which versions: lowbit plan {shell(report['model'])} "
            f"--scheme {scheme})"
        )
    return [
        f"load      {kind}.from_pretrained({literal(folder)})    (plain "
        "transformers with compressed-tensors)",
        f"serve     {serve}",
    ]
