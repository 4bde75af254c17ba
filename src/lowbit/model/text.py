"""Where text comes from: the standard library, a local file or folder, a named corpus, any dataset
of the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LowbitError, unknown
from .files import SUFFIXES, read_records
from .folders import SIDES, folder_files
from .records import Document, columns_of, document, filled
from .stdlib import Split, stdlib_files


@dataclass(frozen=True)
class Corpus:
    """A corpus that papers name.

    Attributes:
        repo, config: hub dataset and its configuration.
        split: split name for calibration and for evaluation.
        files: data files for calibration and for evaluation, where only some shards are used.
        joined: rows are joined by blank lines into one document (wikitext2); otherwise each row is
            a document.
        limit: rows of the evaluation side that are used, joined by spaces into one document.
    """

    repo: str
    config: str | None
    split: dict[str, str]
    files: dict[str, str] | None = None
    joined: bool = False
    limit: int | None = None


CORPORA = {
    "wikitext2": Corpus(
        "Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "eval": "test"}, joined=True
    ),
    "c4": Corpus(
        "allenai/c4",
        None,
        {"train": "train", "eval": "validation"},
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "eval": "en/c4-validation.00000-of-00008.json.gz",
        },
        limit=1100,
    ),
    "pile-val": Corpus(
        "mit-han-lab/pile-val-backup", None, {"train": "validation", "eval": "validation"}
    ),
}


def documents(source: str, split: Split) -> list[Document]:
    """All that `iter_documents` gives."""
    return list(iter_documents(source, split))


def iter_documents(source: str, split: Split) -> Iterator[Document]:
    """The documents of a source: texts, and conversations where records hold those
    (`lowbit.model.records.document`).

    Local files are read as the documents are asked for: they may be larger than the memory.

    Args:
        source: "stdlib", a name in `CORPORA`, a local file (`lowbit.model.files.read_records`), a
            local folder of such files, or a folder or hub id that `datasets.load_dataset` reads;
            ":SPLIT" after a hub id names its split.
        split: "train" to calibrate, "eval" to evaluate; files have only one side.

    Raises:
        LowbitError: nothing there, nothing in it, or not readable; names the file and its line,
            item or row.
    """
    if source == "stdlib":
        try:
            return iter([text for _, text in stdlib_files(split)])
        except FileNotFoundError as e:
            raise LowbitError(str(e)) from e
    if source in CORPORA:
        return iter(named_documents(CORPORA[source], split))
    path, kind = _local(source)
    if kind == "file":
        return _file_documents([path], f"'{path}'")
    if kind == "folder":
        files = folder_files(path, split)
        if files:
            return _file_documents(files, f"folder '{path}'")
        return iter(_dataset_documents(str(path), SIDES[split], _folder_options(path)))
    repo, _, side = source.partition(":")
    if _is_hub_id(repo):
        return iter(_hub_documents(repo, (side,) if side else SIDES[split]))
    if "/" in source or path.suffix:
        raise LowbitError(f"no such text file or folder: '{source}'.")
    raise unknown("text source", source, ("stdlib", *CORPORA))


def _local(source: str) -> tuple[Path, str]:
    """The path that a source may be, and what is there: "file", "folder", or "" for nothing."""
    path = Path(source)
    try:
        path = path.expanduser()
    except RuntimeError:  # no such user
        return path, ""
    try:
        return path, "file" if path.is_file() else "folder" if path.is_dir() else ""
    except OSError as e:  # too long for a name, or behind a folder that may not be searched
        raise LowbitError(f"text source '{source}' cannot be looked up: {e.strerror}.") from e


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return (
        len(parts) == 2
        and all(parts)
        and source[0] not in ".~"
        and Path(source).suffix.lower() not in SUFFIXES
    )


def _folder_options(folder: Path) -> dict[str, Any]:
    # Left alone, the datasets library makes a document of every line of a .txt file.
    kinds = {p.suffix for p in folder.rglob("*") if p.is_file() and p.stem != "README"}
    return {"sample_by": "document"} if kinds == {".txt"} else {}


def named_documents(corpus: Corpus, split: Split, repo: str | None = None) -> list[str]:
    """The documents of a named corpus; ``repo`` replaces its hub repository, by a local copy for
    instance.

    Raises:
        LowbitError: the datasets library is missing, or the repository cannot be reached or read.
    """
    where = corpus.split[split]
    # One shard of many: the sizes that the repository announces for the whole split do not hold, so
    # they are not checked.
    files: dict[str, Any] = {}
    if corpus.files:
        files = {"data_files": {where: corpus.files[split]}, "verification_mode": "no_checks"}
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
            f"'{repo}' is read through the datasets library: pip install 'lowbit[eval]', or give a "
            "local text file, or stdlib."
        ) from e
    try:
        return datasets.load_dataset(repo, config, split=split, **options)
    except (
        Exception
    ) as e:  # the library lets errors of a dozen kinds through, network ones among them
        reason = (next(iter(str(e).splitlines()), "") or type(e).__name__).rstrip(".")
        said = (
            f"dataset '{repo}' (split {split}) cannot be loaded: {reason}. A local text file works "
            "too. So does stdlib, offline."
        )
        raise LowbitError(said) from e


def _texts(name: str, data: Any) -> list[str]:
    if "text" not in data.column_names:
        raise LowbitError(
            f"dataset '{name}' has no field 'text' (it has {', '.join(data.column_names)})."
        )
    return [t or "" for t in data.select_columns(["text"])[:]["text"]]


def _rows(name: str, data: Any) -> list[Document]:
    columns = columns_of(data.column_names, name)
    held = data.select_columns(columns)[:]
    found = (
        dict(zip(columns, row, strict=True))
        for row in zip(*(held[c] for c in columns), strict=True)
    )
    return [document(row, f"{name}, row {n}") for n, row in enumerate(found, 1)]


def _hub_documents(repo: str, sides: Sequence[str]) -> list[Document]:
    """The documents of the first of these splits that a repository has."""
    try:
        return _dataset_documents(repo, sides, {})
    except LowbitError as e:
        if not isinstance(e.__cause__, ValueError):
            raise
        raise LowbitError(
            f"{e} A split of another name is given after a colon: {repo}:SPLIT."
        ) from e


def _dataset_documents(
    source: str, sides: Sequence[str], options: dict[str, Any]
) -> list[Document]:
    tried: list[LowbitError] = []
    for side in sides:
        try:
            data = _load(source, None, side, options)
        except LowbitError as e:
            # Not a split that is missing: the next one fails the same way, slowly.
            if not isinstance(e.__cause__, ValueError):
                raise
            tried.append(e)
            continue
        name = f"dataset '{source}' (split {side})"
        found = [d for d in _rows(name, data) if filled(d)]
        if not found:
            raise LowbitError(f"{name} holds no text.")
        return found
    raise tried[-1]


def _file_documents(files: list[Path], name: str) -> Iterator[Document]:
    empty = True
    for path in files:
        for record, where in read_records(path):
            found = document(record, where)
            if filled(found):
                empty = False
                yield found
    if empty:
        raise LowbitError(f"{name} holds no text.")
