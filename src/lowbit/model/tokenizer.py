"""The tokenizer beside the weights, and which of its files is to blame where there is none."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .checkpoint import Checkpoint
from .decoded import check_fetched

# One of them must be there.
_CHOSEN = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that lies beside the weights.

    Raises:
        LowbitError: there is none, or it cannot be loaded; names the file that is to blame.
    """
    found = [checkpoint.file(n) for n in (*_CHOSEN, *_BESIDE)]  # a hub's are fetched by this
    folder = next((p.parent for p in found[: len(_CHOSEN)] if p), None)
    if folder is None:
        raise LowbitError(
            f"'{checkpoint.name}' has no tokenizer files. Copy tokenizer.json and "
            "tokenizer_config.json into it."
        )
    return tokenizer_at(folder)


def tokenizer_at(folder: Path) -> Any:
    """The tokenizer in a folder, without running any code that comes with it.

    Raises:
        LowbitError: it cannot be loaded, or loads and takes no text; names the file that is to
            blame.
    """
    from transformers import AutoTokenizer

    try:
        for path in _files(folder):
            check_fetched(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some are found to be broken only when they are used
    except LowbitError:
        raise
    except BaseException as e:
        if not _failed(e):
            raise
        raise _refusal(folder, e) from e
    return tokenizer


def _files(folder: Path) -> list[Path]:
    return [folder / n for n in (*_CHOSEN, *_BESIDE) if (folder / n).is_file()]


def _failed(e: BaseException) -> bool:
    """Whether the tokenizer is at fault: a panic of the Rust library is no Exception, nor is
    Ctrl-C.
    """
    return isinstance(e, Exception) or type(e).__name__ == "PanicException"


def _refusal(folder: Path, failure: BaseException) -> LowbitError:
    """Why a folder gave no tokenizer: a file that cannot be read, else what transformers says of
    the likeliest one.
    """
    there = _files(folder)
    for path in there:
        wrong = _unreadable(path)
        if wrong:
            return LowbitError(
                f"'{path}' {wrong}. It may be cut short or overwritten: copy or download it again."
            )
    reason = (next(iter(str(failure).splitlines()), "") or type(failure).__name__).rstrip(". :")
    whole = folder / "tokenizer.json"
    if whole not in there:
        missing = [n for n in ("sentencepiece", "tiktoken") if find_spec(n) is None]
        more = f"; to convert its other files pip install {' '.join(missing)}" if missing else ""
        return LowbitError(
            f"'{folder}' has no tokenizer.json, and transformers cannot make a tokenizer of "
            f"{', '.join(p.name for p in there)} "
            f"({reason}). Copy the tokenizer.json of the same model into it{more}."
        )
    broken = _broken(whole)
    if broken:
        return LowbitError(
            f"'{whole}' is no tokenizer that the installed tokenizers library knows ({broken}). "
            "Download it again; if it is of a "
            "newer kind: pip install -U tokenizers transformers."
        )
    blamed = there[0]  # tokenizer_config.json where there is one
    return LowbitError(
        f"transformers cannot load the tokenizer that '{blamed}' describes: {reason}. Compare it "
        "with the original's."
    )


def _unreadable(path: Path) -> str | None:
    """What is wrong with a file as such; None if nothing is."""
    if path.suffix == ".model":
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and not isinstance(json.loads(text), dict):
            return "does not hold a JSON object"
    except UnicodeDecodeError as e:
        return f"is not UTF-8 text (byte {e.start})"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    except (ValueError, RecursionError) as e:
        return f"is not valid JSON ({e})"
    return None


def _broken(path: Path) -> str | None:
    """What the tokenizers library says of a tokenizer.json; None if it takes it."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path)).encode("a")
    except BaseException as e:
        if not _failed(e):
            raise
        return next(iter(str(e).splitlines()), "") or type(e).__name__
    return None
