"""Which files of a folder are texts to read, and on which side, by the rules that the datasets
library has for names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..errors import LowbitError
from .files import is_data
from .stdlib import Split

# The first that there is.
SIDES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("test", "validation", "train"),
}

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
Rule = Callable[[Path, str], int | None]  # how well a word fits a path, 0 best; None: not at all
_APART = r"[-._ 0-9]"
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_ABOUT = ("readme", "license", "licence", "notice", "requirements")  # by their names without suffix
_DESCRIPTIONS = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)


def folder_files(folder: Path, split: Split) -> list[Path]:
    """The files of a folder and those below it that hold a side's texts, in order; none if the
    folder describes itself.

    Folders named train, test or such decide the side, else files named so, else everything is for
    training. Where some are named for tests or validation and none for training, training takes the
    others. Files of the form data/NAME-00000-of-00001 count alone where there are some. Hidden
    files, those about the data and those of other kinds are left out. A folder whose README.md
    lists its files, or that holds kinds which only the datasets library reads, is left to that.

    Raises:
        LowbitError: every file is for tests or validation, and training was asked for; names the
            files.
    """
    if _describes_itself(folder):
        return []
    found = [
        p
        for p in sorted(folder.rglob("*"), key=str)
        if p.is_file() and _is_meant(p.relative_to(folder))
    ]
    shards = [p for p in found if p.parent == folder / "data" and _SHARD.search(p.name)]
    for files, rule in ((shards, _in_name), (found, _in_folders), (found, _in_name)):
        sides = _sides(files, folder, rule)
        if any(sides.values()):
            held = next((sides[s] for s in SIDES[split] if sides[s]), [])
            return held or _others(found, folder)
    return found


def _others(found: list[Path], folder: Path) -> list[Path]:
    """The files that no rule counts as held out."""
    held_out: dict[Path, str] = {}
    for rule in (_in_folders, _in_name):
        sides = _sides(found, folder, rule)
        for side in ("validation", "test"):
            held_out |= dict.fromkeys(sides[side], side)
    others = [p for p in found if p not in held_out]
    if not others:
        shown = [f"'{p.relative_to(folder)}' ({held_out[p]})" for p in found[:6]]
        more = ", ..." if len(found) > len(shown) else ""
        raise LowbitError(
            f"folder '{folder}' has no file to train or calibrate on: by their names, all are held "
            "out, "
            f"{', '.join(shown)}{more}. Give one of them as a file, or rename it."
        )
    return others


def _describes_itself(folder: Path) -> bool:
    card = folder / "README.md"
    if (folder / ".huggingface.yaml").is_file():
        return True
    head = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return head.startswith("---") and "\nconfigs:" in head.split("\n---", 1)[0]


def _is_meant(path: Path) -> bool:
    if any(part.startswith((".", "__")) for part in path.parts) or path.name in _DESCRIPTIONS:
        return False
    return is_data(path) and path.name.split(".")[0].lower() not in _ABOUT


def _sides(files: list[Path], folder: Path, rule: Rule) -> dict[str, list[Path]]:
    return {side: _ordered(files, folder, words, rule) for side, words in _WORDS.items()}


def _ordered(files: list[Path], folder: Path, words: tuple[str, ...], rule: Rule) -> list[Path]:
    """The files that a rule finds one of the words in: by the word and where it stands, then by
    name.
    """
    ranked: list[tuple[int, int, str]] = []
    for path in files:
        hits = [
            (n, at)
            for n, word in enumerate(words)
            if (at := rule(path.relative_to(folder), word)) is not None
        ]
        if hits:
            ranked.append((*min(hits), str(path)))
    return [Path(name) for _, _, name in sorted(ranked)]


def _in_name(path: Path, word: str) -> int | None:
    if re.match(rf"{word}{_APART}", path.name):
        return 0
    return 1 if re.search(rf"{_APART}{word}{_APART}", path.name) else None


def _in_folders(path: Path, word: str) -> int | None:
    forms = (rf"{word}", rf"{word}{_APART}.*", rf".*{_APART}{word}", rf".*{_APART}{word}{_APART}.*")
    for n, form in enumerate(forms):
        if any(re.fullmatch(form, part) for part in path.parts[:-1]):
            return n
    return None
