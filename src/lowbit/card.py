"""The model card: the README.md of an artifact or an export, made from its report alone, so that
equal reports make equal cards.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .formats import LAYOUTS, awq, gptq, mlx, native
from .formats import compressed_tensors as ct
from .formats.uniform import as_uniform
from .grid import AnyGrid
from .names import hub_id, hub_of, model_name
from .proof import EXACT, Verification
from .scheme import parse_scheme
from .verbatim import code, code_block, encodable, markdown

GGUF = "gguf"
_HUB = "https://huggingface.co"
# In whose name the Hub offers the files; else transformers.
_LIBRARY = {
    native.NAME: "lowbit",
    mlx.NAME: "mlx",
    GGUF: "gguf",
}
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_HELD_OUT = " (held out)"
_TERMS = ("license", "license_name", "license_link")


def terms_of(readme: Path | None) -> dict[str, Any]:
    """What the front matter of a model's README.md says of its license; empty if it says nothing,
    or cannot be read.
    """
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(readme) if readme is not None else None
    # Whatever people write there, in whatever encoding: a card is no reason to stop.
    except Exception:
        found = None
    return {
        k: v
        for k in _TERMS
        if isinstance(v := (found or {}).get(k), str)
        or (isinstance(v, list) and all(isinstance(x, str) for x in v))
    }


def model_card(report: Mapping[str, Any]) -> str:
    """README.md for a directory with this report.json.

    Args:
        report: of an artifact or an export, its verification included.
    """
    parts = (
        f"# {_title(report)}",
        _opening(report),
        _making(report),
        _numbers(report),
        _loading(report),
    )
    return encodable(_front_matter(report) + "\n" + "\n\n".join(parts) + "\n")


# --- what the Hub reads ---------------------------------------------------------------------------


def _front_matter(report: Mapping[str, Any]) -> str:
    hub = hub_of(report)
    bits = [f"{b}-bit" for b in sorted({g.bits for g in _grids(report)})]
    served = "vllm" if _for_vllm(report) else _LIBRARY.get(report["format"], "transformers")
    data: dict[str, Any] = {"library_name": served, "pipeline_tag": "text-generation"}
    if hub:
        data |= {"base_model": hub, "base_model_relation": "quantized"}
    data |= _license(report.get("source", {}).get("license", {}), hub)
    methods = report["recipe"]["methods"] or ["rtn"]
    data["tags"] = list(dict.fromkeys(["quantized", "lowbit", *bits, report["format"], *methods]))
    lines = []
    for key, value in data.items():
        lines += (
            [f"{key}:", *(f"- {_yaml(v)}" for v in value)]
            if isinstance(value, list)
            else [f"{key}: {_yaml(value)}"]
        )
    return "\n".join(("---", *lines, "---", ""))


def _license(license_: Mapping[str, Any], hub: str | None) -> dict[str, Any]:
    """The source's own terms; a link into its repository becomes one from anywhere."""
    terms = dict(license_)
    link = terms.get("license_link")
    if isinstance(link, str) and "://" not in link:
        del terms["license_link"]
        if hub:
            terms["license_link"] = (
                f"{_HUB}/{hub}/blob/main/{link.removeprefix('./').removeprefix('/')}"
            )
    return terms


def _yaml(value: str) -> str:
    """A string that YAML reads as this string: words as they are, the rest as JSON, which YAML
    contains.
    """
    word = re.fullmatch(r"([0-9]-)?[A-Za-z][A-Za-z0-9._/-]*", value)
    return (
        value
        if word and value.lower() not in _YAML_WORDS
        else json.dumps(value, ensure_ascii=False)
    )


# --- what people read -----------------------------------------------------------------------------


def _title(report: Mapping[str, Any]) -> str:
    return f"{markdown(_name(report))} {report['recipe']['scheme']}" + (
        "" if report["format"] in (ct.NAME, native.NAME) else f", {report['format']}"
    )


def _name(report: Mapping[str, Any]) -> str:
    return " ".join(model_name(report).split()) or "model"


def _opening(report: Mapping[str, Any]) -> str:
    hub = hub_of(report)
    model = f"[{hub}]({_HUB}/{hub})" if hub else code(_name(report))
    scheme, activations = parse_scheme(report["recipe"]["scheme"]), ""
    for bits, what in (
        (scheme.activation_bits, "activations"),
        (scheme.kv_bits, "keys and values"),
    ):
        activations += f", {what} in {bits} bits" if bits else ""
    codebook = report["recipe"].get("codebook")
    kind = f"on a codebook per {codebook}" if codebook else "as integers"
    widths = ", ".join(str(b) for b in sorted({g.bits for g in _grids(report)}))
    return (
        f"{model} with the weights of its linear layers in {widths} bits, {kind}{activations}: "
        f"quantized with lowbit {report['lowbit']}, format `{report['format']}`."
    )


def _making(report: Mapping[str, Any]) -> str:
    c, recipe, skipped = (
        report["calibration"],
        report["recipe"],
        [e for e in report["linears"] if "skipped" in e],
    )
    kept = (
        "; kept in floating point: " + ", ".join(f"`{e['name']}` ({e['skipped']})" for e in skipped)
        if skipped
        else ""
    )
    schemes = Counter(e["scheme"] for e in report["linears"] if "skipped" not in e)
    linears = ", ".join(f"{n} in `{s}`" for s, n in schemes.items())
    wide = sum((Counter(e.get("columns", {})) for e in report["linears"]), Counter())
    if len(wide) > 1:
        linears += ", columns by their bits: " + ", ".join(
            f"{n} of {b}" for b, n in sorted(wide.items())
        )
    outliers = sum(e.get("outliers", 0) for e in report["linears"])
    if outliers:
        linears += f", {outliers} weights kept in 16 bits"
    chats = (
        f", {c['conversations']} conversations written by the model's chat template"
        if c.get("conversations")
        else ""
    )
    rows = [
        (
            "recipe",
            f"{code(recipe['name'])} (methods: {', '.join(recipe['methods']) or 'none'}); all "
            "settings in `recipe.toml`",
        ),
        ("scheme", f"`{recipe['scheme']}`"),
        ("linears", linears + kept),
        (
            "calibration",
            f"{markdown(_shown(c['source']))}, {c['samples']} rows of {c['length']} tokens, "
            f"sha256 `{c['sha256'][:16]}`{chats}",
        ),
        ("seed", str(report["seed"])),
        ("computed", f"on {report['device']}, in {report['compute'].removeprefix('torch.')}"),
        (
            "versions",
            ", ".join(
                (f"lowbit {report['lowbit']}", *(f"{k} {v}" for k, v in report["versions"].items()))
            ),
        ),
    ]
    lines = ["## How it was made", "", *_table(("", ""), rows)]
    if "command" in report:
        model, hub = report["model"], hub_of(report)
        words = [hub if hub and word == model else word for word in report["command"]]
        lines += ["", code_block("sh", shlex.join(map(_shown, words)), *_exported(report))]
        cut = [_shown(a) for a in words if Path(a).name == _shown(a) != a]
        if cut:
            lines += ["", f"Of paths only the last part is shown: {', '.join(map(code, cut))}."]
    return "\n".join(lines)


def _exported(report: Mapping[str, Any]) -> list[str]:
    return (
        [f"lowbit export OUT -o DIR --to {report['format']}"] if "exported_from" in report else []
    )


def _numbers(report: Mapping[str, Any]) -> str:
    s, q = report["size"], report["quality"]
    rows = [
        ("size", f"{_bytes(s['before'])} -> {_bytes(s['after'])}"),
        (
            "bits per quantized weight",
            f"{s['bits_per_weight']:.3f}, from bytes on disk, with scales and everything else "
            "that decoding needs",
        ),
        ("bits per parameter", f"{s['model_bits_per_weight']:.3f}, over the whole model"),
    ]
    lines = ["## Numbers", "", *_table(("", ""), rows)]
    if q:
        f, t = q["float"], q["quantized"]
        text = q["text"].removesuffix(_HELD_OUT)
        on = (
            f"{markdown(_shown(text))}{q['text'][len(text) :]}, {t['windows']} windows of "
            f"{t['length']} tokens"
        )
        measured = [
            ("perplexity", f"{f['perplexity']:.4g}", f"{t['perplexity']:.4g}"),
            ("mean KL to the float model, nats a token", "", f"{t['kl']:.4g}"),
            ("same most likely next token as the float model", "", f"{t['top1']:.1%}"),
        ]
        lines += ["", *_table((on, "float", "quantized"), measured)]
    if "exported_from" in report:
        lines += ["", _added(report)]
    if "verification" in report:
        how = ", without quantizing activations" if report.get("proof") == EXACT else ""
        lines += [
            "",
            f"Verified after writing{how}: {Verification(**report['verification']).summary}.",
        ]
    lines += [
        "",
        f"Hash `{report['hash']}`; `report.json` has that of every file and tensor, and `lowbit "
        "verify DIR` compares them.",
    ]
    return "\n".join(lines)


def _added(report: Mapping[str, Any]) -> str:
    extra = [e["extra_error"] for e in report["linears"] if e.get("extra_error") is not None]
    text = (
        f"Exported from the artifact with hash `{report['exported_from']}`, on which perplexity "
        "and KL were measured."
    )
    if not extra:
        return text
    moved, remarks = report.get("gguf", {}).get("moved"), report.get("gguf", {}).get("remarks", [])
    text += "".join(f" {r[0].upper()}{r[1:]}." for r in remarks)
    if not any(extra) and moved is None:
        return text + " Its codes and decoded weights are equal to that one's."
    return text + (
        f" The format's rounding adds a mean square error of {sum(extra) / len(extra):.2g} (worst "
        f"linear: {max(extra):.2g}) times scale^2 / 12, "
        "which rounding to the grid costs."
        + ("" if moved is None else f" It moves the logits by {moved:.2g} of their spread.")
    )


# --- how to load it -------------------------------------------------------------------------------


def _loading(report: Mapping[str, Any]) -> str:
    format_ = report["format"]
    if format_ == GGUF:
        ways = _llama_cpp(report["gguf"]["file"])
    elif format_ == mlx.NAME:
        ways = [
            _way(
                "mlx-lm",
                code_block(
                    "sh", "pip install mlx-lm", 'mlx_lm.generate --model MODEL --prompt "Once"'
                ),
            )
        ]
    elif format_ in (gptq.V1, gptq.V2, awq.NAME):
        ways = _gptqmodel(report)
    elif format_ == native.NAME:
        why = report.get("beyond_compressed_tensors")
        text = f"Needs lowbit, for {why}. " if why else "Needs lowbit. "
        text += (
            f"Tried with transformers {report['versions']['transformers']}; without the import it "
            "warns of missing weights and makes them up."
        )
        ways = [
            _way(
                "transformers",
                text,
                code_block(
                    "python", "import lowbit  # before the model is loaded", *_transformers()
                ),
            )
        ]
        if any(LAYOUTS[type(g)].is_gguf for g in _grids(report)):
            ways.append(
                _way(
                    "llama.cpp",
                    "The blocks are those of GGUF; a file for it:",
                    code_block("sh", "lowbit export MODEL --to gguf -o DIR"),
                )
            )
    elif _for_vllm(report):
        ways = [
            *_vllm(report),
            "transformers alone ignores what this export is for, and computes something else.",
        ]
    else:
        install = code_block("sh", "pip install transformers compressed-tensors")
        ways = [
            _way("transformers", _tried(report), install, code_block("python", *_transformers())),
            *_vllm(report),
        ]
    where = (
        ""
        if format_ == GGUF
        else "\n\n`MODEL` stands for this directory, or for its name on the Hub."
    )
    return "\n\n".join((f"## Loading{where}", *ways))


def _tried(report: Mapping[str, Any]) -> str:
    versions = report["versions"]
    oldest = "0.17" if any(g.bits in (3, 5, 6, 7) for g in _grids(report)) else "0.15"
    return (
        f"Weights are decoded at load or at the first use, by compressed-tensors {oldest} or "
        "newer. Tried with transformers "
        f"{versions['transformers']} and compressed-tensors {versions['compressed-tensors']}; "
        "lowbit is not needed."
    )


def _transformers(options: str = "") -> tuple[str, ...]:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")',
        f'model = AutoModelForCausalLM.from_pretrained("MODEL"{options})',
        'ids = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))",
    )


def _llama_cpp(file: str) -> list[str]:
    call = (
        "from llama_cpp import Llama",
        "",
        f"model = Llama({json.dumps(file)})",
        'print(model("Once", max_tokens=32)["choices"][0]["text"])',
    )
    shell = code_block("sh", shlex.join(["llama-cli", "-m", file, "-p", "Once"]))
    return [_way("llama.cpp", shell), _way("llama-cpp-python", code_block("python", *call))]


def _gptqmodel(report: Mapping[str, Any]) -> list[str]:
    load = ("import torch", *_transformers(", dtype=torch.bfloat16"))
    ways = [
        _way(
            "transformers",
            code_block("sh", "pip install transformers optimum gptqmodel"),
            code_block("python", *load),
        )
    ]
    if report["format"] != awq.NAME:
        ways.append(
            _way(
                "GPTQModel",
                code_block(
                    "python",
                    "from gptqmodel import GPTQModel",
                    "",
                    'model = GPTQModel.load("MODEL")',
                ),
            )
        )
    grids = _grids(report)
    if report["format"] == gptq.V1 and all(g.bits in (4, 8) for g in grids):
        ways += _served("any recent version takes 4 and 8 bits in this format")
    if report["format"] == awq.NAME and all(g.group_size in (32, 64, 128) for g in grids):
        ways += _served("any recent version takes these groups in this format")
    return ways


def _vllm(report: Mapping[str, Any]) -> list[str]:
    """vLLM's rules for compressed-tensors, where one grid holds for all linears (fused ones must
    share theirs).
    """
    scheme, grids = parse_scheme(report["recipe"]["scheme"]), _grids(report)
    grid, activations = as_uniform(grids[0]), scheme.activation_bits
    size = grids[0].group_size
    if (
        len(grids) > 1
        or grid is None
        or grid.bits == 1
        or (size is not None and (size < 8 or size & (size - 1)))
        or (activations == 4 and grid.bits > 4)
    ):
        return []
    if _for_vllm(report):
        rotated = (
            ", on one device, since it refuses online rotations under tensor parallelism"
            if report.get("online_rotations", True)
            else ""
        )
        return _served(f"0.33 or newer{rotated}")
    if activations:
        return _served(
            f"0.33 or newer, {activations}-bit activations on compute capability 8.0 or newer"
        )
    if grid.bits in (4, 8):
        return _served("any recent version")
    newest = "0.25" if grid.symmetric and grid.bits == 2 else "0.33"
    return _served(
        f"{newest} or newer for {'symmetric' if grid.symmetric else 'asymmetric'} weights of "
        f"{grid.bits} bits, on NVIDIA GPUs"
    )


def _served(versions: str) -> list[str]:
    return [
        _way("vLLM", f"By its sources, {versions}; not run.", code_block("sh", "vllm serve MODEL"))
    ]


def _for_vllm(report: Mapping[str, Any]) -> bool:
    """Whether it is the copy for vLLM of an artifact that transformers would read otherwise."""
    return report["format"] == ct.NAME and "exported_from" in report


# --- forms ----------------------------------------------------------------------------------------


def _grids(report: Mapping[str, Any]) -> list[AnyGrid]:
    """The different grids of the quantized linears; of codebooks, the uniform ones of as many
    bits.
    """
    return [
        parse_scheme(s).weights
        for s in dict.fromkeys(e["scheme"] for e in report["linears"] if "skipped" not in e)
    ]


def _shown(text: str) -> str:
    """A path as others may see it: of a snapshot in the hub's cache, its repository; of another
    absolute one, the last part.
    """
    return (
        (hub_id(text) or Path(text).name)
        if Path(text).is_absolute() or text.startswith("~")
        else text
    )


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    ]


def _way(name: str, *parts: str) -> str:
    return "\n\n".join((f"### {name}", *parts))
