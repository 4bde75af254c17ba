"""The terminal as the library writes to it: every string as it is, every table whole."""

from __future__ import annotations

import codecs
import io
import sys
from typing import Any

from rich import console, table

_UNBOUNDED = 1 << 20  # columns, where no terminal has a width


class Console(console.Console):
    """Prints strings as they are: no markup, no emoji codes, no highlighting, no line breaks of its own.

    Where the output is not a terminal, a table is as wide as its cells, whatever COLUMNS says.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    @property
    def size(self) -> console.ConsoleDimensions:
        """Columns and lines."""
        found = console.Console.size.fget(self)  # type: ignore[attr-defined]
        return console.ConsoleDimensions(found.width if self.file.isatty() else _UNBOUNDED, found.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        console.Console.size.fset(self, new_size)  # type: ignore[attr-defined]


class Table(table.Table):
    """Folds a cell that is too wide for the terminal, where rich would cut it."""

    def add_column(self, *args: Any, **options: Any) -> None:
        """As rich has it; ``overflow`` is "fold" if nothing else is said."""
        super().add_column(*args, **{"overflow": "fold", **options})


def lose_nothing() -> None:
    """Let the standard streams write what their encoding has no character for as an escape, where Python would raise."""
    codecs.register_error("lowbit", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="lowbit")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a path that were no text to begin with are written as these bytes."""
    assert isinstance(error, UnicodeEncodeError)
    first = error.object[error.start]
    if "\udc80" <= first <= "\udcff":
        return bytes([ord(first) - 0xDC00]), error.start + 1
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.backslashreplace_errors(one)
