"""The front matter of a card, which the Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...formats import mlx, native
from ...names import hub_of
from .facts import GGUF, HUB, for_vllm, grids_of

# In whose name the Hub offers the files; else transformers.
_LIBRARY = {native.NAME: "lowbit", mlx.NAME: "mlx", GGUF: "gguf"}
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_TERMS = ("license", "license_name", "license_link")


def terms_of(readme: Path | None) -> dict[str, Any]:
    """Return what the front matter of a model's README.md says of its license.

    Empty if it says nothing, or cannot be read.
    """
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(readme) if readme is not None else None
    # Whatever people write there, in whatever encoding: a card is no reason to stop.
    except Exception:
        found = None
    terms = {key: (found or {}).get(key) for key in _TERMS}
    return {key: value for key, value in terms.items() if _is_text(value)}


def _is_text(value: object) -> bool:
    """Whether it is a string or a list of strings."""
    if isinstance(value, list):
        return all(isinstance(x, str) for x in value)
    return isinstance(value, str)


def front_matter(report: Mapping[str, Any]) -> str:
    """Return the YAML block between its two lines of dashes."""
    hub = hub_of(report)
    library = _LIBRARY.get(report["format"], "transformers")
    data: dict[str, Any] = {
        "library_name": "vllm" if for_vllm(report) else library,
        "pipeline_tag": "text-generation",
    }
    if hub:
        data |= {"base_model": hub, "base_model_relation": "quantized"}
    data |= _license(report.get("source", {}).get("license", {}), hub)
    bits = [f"{b}-bit" for b in sorted({g.bits for g in grids_of(report)})]
    methods = report["recipe"]["methods"] or ["rtn"]
    data["tags"] = list(dict.fromkeys(["quantized", "lowbit", *bits, report["format"], *methods]))
    lines = ["---"]
    for key, value in data.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_yaml(v)}" for v in value)]
        else:
            lines.append(f"{key}: {_yaml(value)}")
    return "\n".join((*lines, "---", ""))


def _license(license_: Mapping[str, Any], hub: str | None) -> dict[str, Any]:
    """Return the source's own terms, with a link into its repository made absolute."""
    terms = dict(license_)
    link = terms.get("license_link")
    if isinstance(link, str) and "://" not in link:
        del terms["license_link"]
        if hub:
            path = link.removeprefix("./").removeprefix("/")
            terms["license_link"] = f"{HUB}/{hub}/blob/main/{path}"
    return terms


def _yaml(value: str) -> str:
    """Return what YAML reads as this string: a plain word, or JSON, which YAML contains."""
    word = re.fullmatch(r"([0-9]-)?[A-Za-z][A-Za-z0-9._/-]*", value)
    if word and value.lower() not in _YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
