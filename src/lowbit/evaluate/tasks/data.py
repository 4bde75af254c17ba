"""Task data from local files: one JSONL form for all tasks, brought to the documents that lm-eval's
own prompts are made of.

A line holds ``contexts`` (one text per choice), ``choices`` and ``gold``, the index of the right
choice; for mmlu also ``subject``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import LowbitError, unknown

Doc = dict[str, Any]


def _as_it_is(context: str) -> str:
    return context


def _asked(context: str) -> str:
    """Return a question up to where its answer begins.

    The file may or may not have the word "Answer:" on a line of its own.
    """
    question = context.removesuffix("Answer:").removesuffix("\n")
    return f"{question}\nAnswer:"


@dataclass(frozen=True)
class Form:
    """How a task is prompted and scored; lm-eval 0.4.13's definitions are the source, tests compare
    with them.

    Attributes:
        kind: "choice", the likeliest continuation of one context; "ending", one continuation under
            several contexts, the likeliest wins (winogrande's partial scoring); "word", is the only
            continuation the greedy one (lambada).
        normalized: acc_norm is reported too: log-likelihood over the number of characters of a
            choice.
        prompt: makes lm-eval's context of the one in the file.
        spaced: choices keep their leading space though the prompt's delimiter is one as well
            (copa).
        subjects: rows belong to subjects, which are tasks of their own with a description and are
            averaged by size.
    """

    kind: Literal["choice", "ending", "word"] = "choice"
    normalized: bool = False
    prompt: Callable[[str], str] = _as_it_is
    spaced: bool = False
    subjects: bool = False


FORMS = {
    "arc_challenge": Form(normalized=True, prompt=_asked),
    "arc_easy": Form(normalized=True, prompt=_asked),
    "boolq": Form(),
    "copa": Form(spaced=True),
    "hellaswag": Form(normalized=True),
    "lambada_openai": Form("word"),
    "lambada_standard": Form("word"),
    "mmlu": Form(subjects=True),
    "openbookqa": Form(normalized=True),
    "piqa": Form(normalized=True, prompt=_asked),
    "winogrande": Form("ending"),
}


@dataclass(frozen=True)
class DataFile:
    """A file that was read.

    Attributes:
        name: file name without its folder.
        sha256: of its bytes, in hexadecimal.
        docs: one per line: ``line`` and ``gold``, then by the form's kind ``context`` and
            ``choices``, ``contexts`` and ``ending``, or ``context`` and ``word``; with subjects
            also ``subject``.
    """

    name: str
    sha256: str
    docs: tuple[Doc, ...]


@dataclass(frozen=True)
class LocalTask:
    """A task whose data lie in a folder.

    Attributes:
        shots: the few-shot examples; None takes them from ``data`` itself.
    """

    name: str
    form: Form
    data: DataFile
    shots: DataFile | None


def read_task(name: str, folder: Path) -> LocalTask:
    """Find and read a task's files.

    They are ``<name>.jsonl``, else the only ``<name>_*.jsonl``; and ``<name>.shots.jsonl`` if there
    is one.

    Raises:
        LowbitError: no such task, folder or file, more than one candidate, or a line that is not of
            the form.
    """
    if name not in FORMS:
        raise unknown("task", name, FORMS)
    if not folder.is_dir():
        raise LowbitError(f"--task-data '{folder}' is not a folder.")
    form = FORMS[name]
    data = _read(_find(name, folder), form)
    path = folder / f"{name}.shots.jsonl"
    shots = _read(path, form) if path.is_file() else None
    return LocalTask(name, form, data, shots)


def _find(name: str, folder: Path) -> Path:
    exact = folder / f"{name}.jsonl"
    if exact.is_file():
        return exact
    found = sorted(folder.glob(f"{name}_*.jsonl"))
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise LowbitError(
            f"--task-data '{folder}' has several files for task '{name}': {names}. Rename the one "
            f"to use to '{exact.name}'."
        )
    if not found:
        held = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise LowbitError(
            f"--task-data '{folder}' has neither '{exact.name}' nor '{name}_*.jsonl' for task "
            f"'{name}'; it holds {held}."
        )
    return found[0]


def _read(path: Path, form: Form) -> DataFile:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise LowbitError(f"'{path}' is not UTF-8 text (byte {e.start}). Convert it first.") from e
    except OSError as e:
        raise LowbitError(f"'{path}' cannot be read: {e.strerror}.") from e
    # Not splitlines(): it also cuts at U+2028 and others that JSON strings may hold as they are.
    docs = tuple(
        _doc(line, n, path, form) for n, line in enumerate(text.split("\n"), 1) if line.strip()
    )
    if not docs:
        raise LowbitError(f"'{path}' holds no examples.")
    return DataFile(path.name, hashlib.sha256(raw).hexdigest(), docs)


def _doc(line: str, number: int, path: Path, form: Form) -> Doc:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise LowbitError(f"{where} is not valid JSON: {e}.") from e
    wrong = _wrong(row, form)
    if wrong:
        raise LowbitError(f"{where}: {wrong}.")
    contexts, choices = row["contexts"], row["choices"]
    # The line makes equal rows differ, or all of them would leave the few-shot pool.
    doc: Doc = {"line": number, "gold": row["gold"]}
    if form.subjects:
        doc["subject"] = row["subject"]
    if form.kind == "ending":
        return doc | {"contexts": contexts, "ending": choices[0].strip()}
    if form.kind == "word":
        return doc | {"context": contexts[0], "word": choices[0]}
    if not form.spaced:
        choices = [choice.removeprefix(" ") for choice in choices]
    return doc | {"context": form.prompt(contexts[0]), "choices": choices}


def _texts(value: object) -> bool:
    """Whether it is a list of texts, at least one, none of them empty."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(v, str) and v.strip() for v in value)


def _wrong(row: Any, form: Form) -> str | None:
    """Return what keeps a row from being of the form; None if nothing does."""
    if not isinstance(row, dict):
        return "expected an object with the fields contexts, choices and gold"
    for key in ("contexts", "choices"):
        if not _texts(row.get(key)):
            return f"field '{key}' must be a list of texts, none of them empty"
    contexts, choices, gold = row["contexts"], row["choices"], row.get("gold")
    if len(contexts) != len(choices):
        return f"{len(contexts)} contexts for {len(choices)} choices; there must be one for each"
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"field 'gold' must be the index of a choice, 0 to {len(choices) - 1}, not {gold!r}"
    if (form.kind == "word") != (len(choices) == 1):
        wanted = "exactly one" if form.kind == "word" else "at least two"
        return f"{len(choices)} choices; this task has {wanted}"
    same = "choices" if form.kind == "ending" else "contexts"
    if len(set(row[same])) > 1:
        return f"the {same} of this task must all be the same"
    if form.subjects and not (isinstance(row.get("subject"), str) and row["subject"].strip()):
        return "field 'subject' must name the subject"
    return None
