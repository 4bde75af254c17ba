"""The section "Numbers": size, quality, what an export's rounding adds, and the proof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...verbatim import markdown
from ..proof import EXACT, Verification
from .facts import shown, table

_HELD_OUT = " (held out)"


def numbers(report: Mapping[str, Any]) -> str:
    """Return the section."""
    size = report["size"]
    rows = [
        ("size", f"{_bytes(size['before'])} -> {_bytes(size['after'])}"),
        (
            "bits per quantized weight",
            f"{size['bits_per_weight']:.3f}, from bytes on disk, with scales and everything else "
            "that decoding needs",
        ),
        ("bits per parameter", f"{size['model_bits_per_weight']:.3f}, over the whole model"),
    ]
    lines = ["## Numbers", "", *table(("", ""), rows)]
    if report["quality"]:
        lines += ["", *_quality(report["quality"])]
    if "polish" in report:
        lines += ["", f"The artifact was {polished(report['polish'])}."]
    if "exported_from" in report:
        lines += ["", _added(report)]
    if "verification" in report:
        how = ", without quantizing activations" if report.get("proof") == EXACT else ""
        found = Verification(**report["verification"]).summary
        lines += ["", f"Verified after writing{how}: {found}."]
    lines += [
        "",
        f"Hash `{report['hash']}`; `report.json` has that of every file and tensor, and `lowbit "
        "verify DIR` compares them.",
    ]
    return "\n".join(lines)


def polished(said: Mapping[str, Any]) -> str:
    """What became of the polish, from a report's entry."""
    apart = f"on {said['checked_rows']} rows that were looked at meanwhile"
    if not said["kept_step"]:
        return f"polished on {said['tokens']:,} tokens without gain, and left as it was"
    kl = f"KL {said['kl_before']:.4g} -> {said['kl']:.4g}"
    return f"polished on {said['tokens']:,} tokens: {kl} {apart}"


def _quality(quality: Mapping[str, Any]) -> list[str]:
    """Return the table of perplexity, KL and top-1."""
    before, after = quality["float"], quality["quantized"]
    text = quality["text"].removesuffix(_HELD_OUT)
    side = quality["text"][len(text) :]
    on = f"{markdown(shown(text))}{side}, {after['windows']} windows of {after['length']} tokens"
    rows = [
        ("perplexity", f"{before['perplexity']:.4g}", f"{after['perplexity']:.4g}"),
        ("mean KL to the float model, nats a token", "", f"{after['kl']:.4g}"),
        ("same most likely next token as the float model", "", f"{after['top1']:.1%}"),
    ]
    return table((on, "float", "quantized"), rows)


def _added(report: Mapping[str, Any]) -> str:
    """Return what an export's own rounding adds to the artifact's error."""
    text = (
        f"Exported from the artifact with hash `{report['exported_from']}`, on which perplexity "
        "and KL were measured."
    )
    extra = [e["extra_error"] for e in report["linears"] if e.get("extra_error") is not None]
    if not extra:
        return text
    gguf = report.get("gguf", {})
    moved = gguf.get("moved")
    for remark in gguf.get("remarks", []):
        text += f" {remark[0].upper()}{remark[1:]}."
    if not any(extra) and moved is None:
        return text + " Its codes and decoded weights are equal to that one's."
    text += (
        f" The format's rounding adds a mean square error of {sum(extra) / len(extra):.2g} (worst "
        f"linear: {max(extra):.2g}) times scale^2 / 12, which rounding to the grid costs."
    )
    if moved is not None:
        text += f" It moves the logits by {moved:.2g} of their spread."
    return text


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
