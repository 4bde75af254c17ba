"""Where text comes from: the standard library, a local file or folder, a named corpus, any dataset of the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LowbitError, unknown
from .stdlib import Split, stdlib_files


@dataclass(frozen=True)
class Corpus:
    """A corpus that papers name.

    Attributes:
        repo, config: hub dataset and its configuration.
        split: split name for calibration and for evaluation.
        files: data files for calibration and for evaluation, where only some shards are used.
        joined: rows are joined by blank lines into one document (wikitext2); otherwise each row is a document.
        limit: rows of the evaluation side that are used, joined by spaces into one document.
    """

    repo: str
    config: str | None
    split: dict[str, str]
    files: dict[str, str] | None = None
    joined: bool = False
    limit: int | None = None


CORPORA = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "eval": "test"}, joined=True),
    "c4": Corpus(
        "allenai/c4", None, {"train": "train", "eval": "validation"},
        {"train": "en/c4-train.00000-of-01024.json.gz", "eval": "en/c4-validation.00000-of-00008.json.gz"}, limit=1100,
    ),
    "pile-val": Corpus("mit-han-lab/pile-val-backup", None, {"train": "validation", "eval": "validation"}),
}  # fmt: skip


def documents(source: str, split: Split) -> list[str]:
    """The documents of a source.

    Args:
        source: "stdlib", a name in `CORPORA`, a local .txt, .json or .jsonl file, a local folder or a hub id that
            `datasets.load_dataset` reads (field "text").
        split: "train" to calibrate, "eval" to evaluate; files have only one side.

    Raises:
        LowbitError: nothing there, nothing in it, or not readable; names the file and line.
    """
    if source == "stdlib":
        try:
            return [text for _, text in stdlib_files(split)]
        except FileNotFoundError as e:
            raise LowbitError(str(e)) from e
    if source in CORPORA:
        return named_documents(CORPORA[source], split)
    path = Path(source)
    if path.is_file():
        return _file_documents(path)
    if path.is_dir() or (source.count("/") == 1 and not source.startswith((".", "/", "~")) and not path.suffix):
        return _dataset_documents(source, split)
    if "/" in source or path.suffix:
        raise LowbitError(f"no such text file: '{source}'.")
    raise unknown("text source", source, ("stdlib", *CORPORA))


def named_documents(corpus: Corpus, split: Split, repo: str | None = None) -> list[str]:
    """The documents of a named corpus; ``repo`` replaces its hub repository, by a local copy for instance."""
    files = {"data_files": {corpus.split[split]: corpus.files[split]}} if corpus.files else {}
    rows = _load(repo or corpus.repo, corpus.config, corpus.split[split], **files)["text"]
    if corpus.joined:
        return ["\n\n".join(rows)]
    if corpus.limit and split == "eval":
        return [" ".join(rows[: corpus.limit])]
    return [t for t in rows if t]


def _load(repo: str, config: str | None, split: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise LowbitError(f"reading '{repo}' needs the datasets library: pip install 'lowbit[eval]', or give a local text file.") from e
    try:
        return datasets.load_dataset(repo, config, split=split, **options)
    except Exception as e:  # the library lets errors of a dozen kinds through, network ones among them
        raise LowbitError(f"dataset '{repo}' (split {split}) cannot be loaded: {str(e).splitlines()[0]}. A local text file works too.") from e


def _dataset_documents(source: str, split: Split) -> list[str]:
    tried: list[LowbitError] = []
    for name in ("train",) if split == "train" else ("test", "validation", "train"):
        try:
            data = _load(source, None, name)
        except LowbitError as e:
            tried.append(e)
            continue
        if "text" not in data.column_names:
            raise LowbitError(f"dataset '{source}' has no field 'text' (it has {', '.join(data.column_names)}).")
        return [t for t in data["text"] if t]
    raise tried[0]


def _file_documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise LowbitError(f"'{path}' is not UTF-8 text (byte {e.start}).") from e
    except OSError as e:
        raise LowbitError(f"'{path}' cannot be read: {e.strerror}.") from e
    if path.suffix == ".jsonl":
        found = [_field(_json(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix == ".json":
        items = _json(text, str(path))
        if not isinstance(items, list):
            raise LowbitError(f"'{path}' must hold a list of texts or of objects with a field 'text'.")
        found = [_field(item, f"{path}, item {n}") for n, item in enumerate(items, 1)]
    else:
        found = [text]
    found = [t for t in found if t.strip()]
    if not found:
        raise LowbitError(f"'{path}' holds no text.")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise LowbitError(f"{where} is not valid JSON: {e}") from e


def _field(item: Any, where: str) -> str:
    value = item.get("text") if isinstance(item, dict) else item
    if not isinstance(value, str):
        raise LowbitError(f"{where}: expected a text or an object with a field 'text'.")
    return value
