"""Strings from outside where something would be read into them: shells, Python, Markdown, plots."""

from __future__ import annotations

import json
import re
import shlex
from os import PathLike


def shell(word: str | PathLike[str]) -> str:
    """A path or another argument as one word of a POSIX shell, never taken for an option."""
    text = str(word)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def literal(text: str | PathLike[str]) -> str:
    """A string in Python's double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def markdown(text: str) -> str:
    """Text of one line in which Markdown and HTML find nothing to format."""
    line = " ".join(text.split())
    return re.sub(r"[\\`*\[\]<>~&#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def code(text: str) -> str:
    """Text of one line as a code span of Markdown."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(language: str, *lines: str) -> str:
    """Lines as a fenced block of Markdown."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def plotted(text: str) -> str:
    """A label for matplotlib: no formula between dollar signs, no leading underscore, which would
    hide it from the legend.
    """
    return re.sub(r"^_", " _", encodable(text).replace("$", r"\$"))


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a path that were no text become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
