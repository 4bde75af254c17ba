"""The Python standard library's own sources as text: the calibration and evaluation corpus that is
always at hand.

Files are split by a checksum of their path, so the split is the same on every machine and every
Python version, and the embedded demo model (trained on the "train" side only) never saw the "eval"
side under any release.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "eval"]

_EVAL_ONE_IN = 12
# Not prose a Python programmer would write: vendored wheels, test tables, generated maps, other
# people's packages.
_SKIPPED_PARTS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "encodings",
        "pydoc_data",
        "lib2to3",
    }
)


def is_eval(relative: str) -> bool:
    """Whether the file at this POSIX path, relative to the library's root, belongs to the held-out
    side.
    """
    return zlib.crc32(relative.encode()) % _EVAL_ONE_IN == 0


def stdlib_files(split: Split, *, with_tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yield ``(relative path, source text)`` of the running interpreter's library, in sorted path
    order.

    Raises FileNotFoundError if this interpreter has no readable sources (some embedded builds ship
    bytecode only).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = _SKIPPED_PARTS - {"test", "tests"} if with_tests else _SKIPPED_PARTS
    found = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.intersection(relative.parts):
            continue
        if is_eval(relative.as_posix()) != (split == "eval"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 200:
            continue
        found += 1
        yield relative.as_posix(), text
    if not found:
        raise FileNotFoundError(
            f"no Python sources under {root}: this interpreter ships without its library's source "
            "files. "
            "Give a text file instead (--calib FILE / --text FILE)."
        )
