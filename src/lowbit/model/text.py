"""Where text comes from: the standard library, a local file or folder, a named corpus, any dataset of the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LowbitError, unknown
from .stdlib import Split, stdlib_files

# What ends like this and looks like owner/name is meant as a file, not as a repository (whose name may hold a dot: x/pile-v1.5).
_FILE_SUFFIXES = (".txt", ".text", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".py", ".gz", ".xz", ".zst", ".zip")


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
    path = Path(source).expanduser()
    if path.is_file():
        return _file_documents(path)
    if path.is_dir():
        return _dataset_documents(str(path), split, _folder_options(path))
    if _is_hub_id(source):
        return _dataset_documents(source, split, {})
    if "/" in source or path.suffix:
        raise LowbitError(f"no such text file or folder: '{source}'.")
    raise unknown("text source", source, ("stdlib", *CORPORA))


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and source[0] not in ".~" and Path(source).suffix.lower() not in _FILE_SUFFIXES


def _folder_options(folder: Path) -> dict[str, Any]:
    # Left alone, the datasets library makes a document of every line of a .txt file.
    kinds = {p.suffix for p in folder.rglob("*") if p.is_file() and p.stem != "README"}
    return {"sample_by": "document"} if kinds == {".txt"} else {}


def named_documents(corpus: Corpus, split: Split, repo: str | None = None) -> list[str]:
    """The documents of a named corpus; ``repo`` replaces its hub repository, by a local copy for instance.

    Raises:
        LowbitError: the datasets library is missing, or the repository cannot be reached or read.
    """
    where = corpus.split[split]
    # One shard of many: the sizes that the repository announces for the whole split do not hold, so they are not checked.
    files = {"data_files": {where: corpus.files[split]}, "verification_mode": "no_checks"} if corpus.files else {}
    name = repo or corpus.repo
    rows = _texts(name, _load(name, corpus.config, where, files))
    if corpus.joined:
        return ["\n\n".join(rows)]
    if corpus.limit and split == "eval":
        return [" ".join(rows[: corpus.limit])]
    return [t for t in rows if t]


def _load(repo: str, config: str | None, split: str, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise LowbitError(
            f"'{repo}' is read through the datasets library: pip install 'lowbit[eval]', or give a local text file, or stdlib."
        ) from e
    try:
        return datasets.load_dataset(repo, config, split=split, **options)
    except Exception as e:  # the library lets errors of a dozen kinds through, network ones among them
        reason = (next(iter(str(e).splitlines()), "") or type(e).__name__).rstrip(".")
        said = f"dataset '{repo}' (split {split}) cannot be loaded: {reason}. A local text file works too. So does stdlib, offline."
        raise LowbitError(said) from e


def _texts(name: str, data: Any) -> list[str]:
    if "text" not in data.column_names:
        raise LowbitError(f"dataset '{name}' has no field 'text' (it has {', '.join(data.column_names)}).")
    return [t or "" for t in data.select_columns(["text"])[:]["text"]]


def _dataset_documents(source: str, split: Split, options: dict[str, Any]) -> list[str]:
    tried: list[LowbitError] = []
    for name in ("train",) if split == "train" else ("test", "validation", "train"):
        try:
            data = _load(source, None, name, options)
        except LowbitError as e:
            if not isinstance(e.__cause__, ValueError):  # not a split that is missing: the next one fails the same way, slowly
                raise
            tried.append(e)
            continue
        found = [t for t in _texts(source, data) if t.strip()]
        if not found:
            raise LowbitError(f"dataset '{source}' (split {name}) holds no text.")
        return found
    raise tried[-1]


def _file_documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as e:
        raise LowbitError(f"'{path}' is not UTF-8 text (byte {e.start}). Convert it first.") from e
    except OSError as e:
        raise LowbitError(f"'{path}' cannot be read: {e.strerror}.") from e
    kind = path.suffix.lower()
    if kind == ".jsonl":
        # Not splitlines(): it also cuts at U+2028 and others that JSON strings may hold as they are.
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [_field(_json(line, where), where) for where, line in lines]
    elif kind == ".json":
        items = _json(text, str(path)) if text.strip() else []
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
    except (ValueError, RecursionError) as e:
        raise LowbitError(f"{where} is not valid JSON: {e}.") from e


def _field(item: Any, where: str) -> str:
    value = item.get("text") if isinstance(item, dict) else item
    if not isinstance(value, str):
        raise LowbitError(f"{where}: expected a text or an object with a field 'text'.")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise LowbitError(f"{where}: the text holds half of a surrogate pair, which no tokenizer takes. Repair or drop it.") from e
    return value
