"""The title of a card and the sentence below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...formats import compressed_tensors as ct
from ...formats import native
from ...grid.names import parse_scheme
from ...names import hub_of
from ...verbatim import code, markdown
from .facts import HUB, grids_of, name_of


def title(report: Mapping[str, Any]) -> str:
    """Return the model's name and scheme, and the format of an export."""
    text = f"{markdown(name_of(report))} {report['recipe']['scheme']}"
    if report["format"] in (ct.NAME, native.NAME):
        return text
    return f"{text}, {report['format']}"


def opening(report: Mapping[str, Any]) -> str:
    """Return the sentence that says what was quantized, to how many bits, and by what."""
    hub = hub_of(report)
    model = f"[{hub}]({HUB}/{hub})" if hub else code(name_of(report))
    scheme = parse_scheme(report["recipe"]["scheme"])
    codebook = report["recipe"].get("codebook")
    kind = f"on a codebook per {codebook}" if codebook else "as integers"
    if scheme.activation_bits:
        kind += f", activations in {scheme.activation_bits} bits"
    if scheme.kv_bits:
        kind += f", keys and values in {scheme.kv_bits} bits"
    widths = ", ".join(str(b) for b in sorted({g.bits for g in grids_of(report)}))
    return (
        f"{model} with the weights of its linear layers in {widths} bits, {kind}: "
        f"quantized with lowbit {report['lowbit']}, format `{report['format']}`."
    )
