"""A tokenizer.json as GGUF says it: byte-level BPE by one of the splitting rules that llama.cpp
has, or SentencePiece's BPE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LowbitError
from ...model.bos import adds_bos
from ...model.tokenizer import tokenizer_at

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (expression that splits text before byte-level merges, whole words before merges) -> llama.cpp's
# name of the rule
_RULES = {
    ("", False): "gpt-2",
    (_LETTERS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_LETTERS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (_LETTERS + r"\p{N}" + _REST, False): "qwen2",
    (_TEKKEN, True): "tekken",
    ("digits", False): "smollm",
}
SAMPLES = (
    "Once upon a time, there was a little girl named Lily.",
    "def f(x, y=12345):\n    return x ** 2 # 3.14159\n",
    "It's 10:45 and we'll see: naïve café, Größe, Привет, 你好, 🙂!",
)
# Where runs of spaces are squeezed.
_PLAIN_SAMPLES = (
    SAMPLES[0],
    "It's 10:45 and we'll see: naïve café, Größe, Привет, 你好, 🙂!",
)


@dataclass(frozen=True)
class Tokens:
    """A tokenizer for a file.

    Attributes:
        metadata: keys of tokenizer.*. samples: text -> ids, as the model's own tokenizer cuts it.
            remarks: where the two part ways.
    """

    metadata: dict[str, Any]
    samples: dict[str, list[int]]
    remarks: tuple[str, ...]


def read(folder: Path, vocab_size: int) -> Tokens:
    """The tokenizer of a model's folder.

    Raises:
        LowbitError: there is none, or GGUF cannot say what it does.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LowbitError(
            f"'{folder}' has no tokenizer.json, and a GGUF file carries its tokenizer."
        )
    own: Any = tokenizer_at(folder)
    try:
        # Some families replace what tokenizer.json says by rules of their own.
        said = json.loads(own.backend_tokenizer.to_str())
    except Exception as e:  # a tokenizer that is none of the tokenizers library, for instance
        raise LowbitError(
            f"'{path}' cannot be read as a tokenizer: "
            f"{(str(e) or type(e).__name__).splitlines()[0]}"
        ) from e
    model = said["model"]
    if model.get("type") != "BPE" or "merges" not in model:
        raise LowbitError(
            f"'{path}' is a tokenizer of type {model.get('type')}, which GGUF export does not "
            "know: it takes BPE."
        )
    sentence = bool(model.get("byte_fallback"))
    remarks: list[str] = []
    metadata = _sentencepiece(said, path, remarks) if sentence else _byte_level(said, path, remarks)
    tokens, types = _vocabulary(said, vocab_size, path, sentence)
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if sentence:
        metadata["tokenizer.ggml.scores"] = _scores(merges, tokens)
    else:
        metadata["tokenizer.ggml.merges"] = merges
    for key in ("bos", "eos", "unk", "pad"):
        found = getattr(own, f"{key}_token_id", None)
        if found is not None:
            metadata[
                f"tokenizer.ggml.{ {'unk': 'unknown', 'pad': 'padding'}.get(key, key) }_token_id"
            ] = found
    ids = own("a").input_ids
    metadata["tokenizer.ggml.add_bos_token"] = adds_bos(own)
    metadata["tokenizer.ggml.add_eos_token"] = (
        bool(ids) and own.eos_token_id is not None and ids[-1] == own.eos_token_id
    )
    metadata |= _templates(own.chat_template)
    texts = _PLAIN_SAMPLES if remarks else SAMPLES
    return Tokens(metadata, {t: own(t).input_ids for t in texts}, tuple(remarks))


def _templates(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Chat templates under the keys that llama.cpp reads: the default one, and each that has a name
    under its own.
    """
    if template is None or isinstance(template, str):
        return {} if template is None else {"tokenizer.chat_template": template}
    others = {name: text for name, text in template.items() if name != "default"}
    named = {re.sub("[^a-zA-Z0-9]", "_", name): text for name, text in others.items()}
    found: dict[str, Any] = {}
    if "default" in template:
        found["tokenizer.chat_template"] = template["default"]
    if named:
        found["tokenizer.chat_templates"] = sorted(named)
    return found | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def _vocabulary(
    said: Mapping[str, Any], vocab_size: int, path: Path, sentence: bool
) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    added = {t["id"]: t for t in said.get("added_tokens", ())}
    base = {i: text for text, i in said["model"]["vocab"].items()}
    top = max(*base, *added) if added else max(base)
    if top >= vocab_size:
        raise LowbitError(
            f"'{path}' has a token with id {top}, the model's vocabulary ends at {vocab_size - 1}."
        )
    for i, text in base.items():
        tokens[i] = text
        byte = sentence and len(text) == 6 and text.startswith("<0x")
        types[i] = (
            _BYTE if byte else _UNKNOWN if text == said["model"].get("unk_token") else _NORMAL
        )
    for i, token in added.items():
        tokens[i] = token["content"]
        if types[i] != _UNKNOWN:
            types[i] = _CONTROL if token["special"] else _USER
    return tokens, types


def _scores(merges: list[str], tokens: list[str]) -> list[float]:
    """SentencePiece joins the pair whose result has the highest score; here that is the earliest
    merge.
    """
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    last = len(merges)
    return [-float(rank.get(t, last)) for t in tokens]


def _sentencepiece(said: Mapping[str, Any], path: Path, remarks: list[str]) -> dict[str, Any]:
    prefix = replaced = False
    for step in _steps(said.get("normalizer"), "normalizers"):
        pattern, content = step.get("pattern", {}), step.get("content")
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and pattern == {"String": " "} and content == _SPACE:
            replaced = True
        elif step["type"] == "Replace" and " " in pattern.get("Regex", "") and content in ("", " "):
            remarks.append(
                "the model's tokenizer squeezes runs of spaces and llama.cpp does not: text with "
                "them gets other tokens"
            )
        else:
            raise LowbitError(f"'{path}' normalizes text by {_shown(step)}, which GGUF cannot say.")
    for step in _steps(said.get("pre_tokenizer"), "pretokenizers"):
        if replaced and step["type"] == "Split" and step["pattern"] == {"String": " "}:
            continue  # no space is left by then
        if (
            step["type"] != "Metaspace"
            or step.get("replacement", _SPACE) != _SPACE
            or step.get("split", False)
        ):
            raise LowbitError(f"'{path}' splits text by {_shown(step)}, which GGUF cannot say.")
        prefix, replaced = step.get("prepend_scheme", "always") != "never", True
    if not replaced:
        raise LowbitError(
            f"'{path}' keeps spaces as they are, which llama.cpp's SentencePiece does not."
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _byte_level(said: Mapping[str, Any], path: Path, remarks: list[str]) -> dict[str, Any]:
    for step in _steps(said.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise LowbitError(f"'{path}' normalizes text by {_shown(step)}, which GGUF cannot say.")
        remarks.append(
            "the model's tokenizer composes accents (NFC) and llama.cpp does not: text with "
            "combining ones gets other tokens"
        )
    split, bytes_ = "", False
    for step in _steps(said.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            bytes_ = True
            if step.get("use_regex", True) == bool(split and split != "digits"):
                split = "unknown"  # splits twice, or not at all
        elif (
            step["type"] == "Split"
            and not step.get("invert")
            and step.get("behavior") == "Isolated"
            and not split
        ):
            split = step["pattern"].get("Regex", "unknown")
        elif step["type"] == "Digits" and step.get("individual_digits") and not split:
            split = "digits"
        else:
            raise LowbitError(f"'{path}' splits text by {_shown(step)}, which GGUF cannot say.")
    rule = _RULES.get((split, bool(said["model"].get("ignore_merges"))))
    if not bytes_ or rule is None:
        raise LowbitError(
            f"'{path}' splits text by a rule that is not among those of llama.cpp known here: "
            f"{', '.join(_RULES.values())}."
        )
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule}


def _steps(stage: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if stage is None:
        return []
    return list(stage[key]) if stage["type"] == "Sequence" else [stage]


def _shown(step: Mapping[str, Any]) -> str:
    return json.dumps(step, ensure_ascii=False)[:120]
