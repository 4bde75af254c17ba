"""The terminal as the library writes to it: every string as it is, every table whole."""

from __future__ import annotations

import codecs
import io
import re
import sys
from typing import Any

from rich import console, table
from rich.segment import Segment, Segments
from rich.text import Text

_UNBOUNDED = 1 << 20  # columns, where no terminal has a width
# What a terminal would obey instead of showing it.
_DRIVES = re.compile(r"(?!\r\n)[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What has no width: rich drops, expands or passes on what it finds in a cell.
_MOVES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Console(console.Console):
    """Prints strings as they are: no markup, no emoji codes, no highlighting, no line breaks, no
    tabs expanded.

    On a terminal, control characters of a string are written as escapes (``\\x1b``), so that a name
    from outside cannot drive it; line ends and tabs stay. In the cells of a table they are escapes
    everywhere. Where the output is not a terminal, a table is as wide as its cells, whatever
    COLUMNS says.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def print(self, *objects: Any, sep: str = " ", end: str = "\n", **options: Any) -> None:
        """As rich has it, but for strings."""
        if objects and all(isinstance(o, str) for o in objects):
            text = sep.join(objects)
            # FORCE_COLOR makes a pipe a terminal for rich, TTY_COMPATIBLE=0 a terminal a pipe.
            shown = _DRIVES.sub(_escape, text) if self.is_terminal or self.file.isatty() else text
            objects = (Segments([Segment(shown + end)]),)
        super().print(*objects, sep=sep, end=end, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich has it: the strings of tables."""
        return super().render_str(_MOVES.sub(_escape, text), **options)

    @property
    def size(self) -> console.ConsoleDimensions:
        """Columns and lines."""
        found = console.Console.size.fget(self)  # type: ignore[attr-defined]
        return console.ConsoleDimensions(
            found.width if self.file.isatty() else _UNBOUNDED, found.height
        )

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        console.Console.size.fset(self, new_size)  # type: ignore[attr-defined]


class Table(table.Table):
    """Folds a cell that is too wide for the terminal, where rich would cut it."""

    def add_column(self, *args: Any, **options: Any) -> None:
        """As rich has it; ``overflow`` is "fold" if nothing else is said."""
        super().add_column(*args, **{"overflow": "fold", **options})


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def lose_nothing() -> None:
    """Let the standard streams write what their encoding has no character for as an escape, where
    Python would raise.
    """
    codecs.register_error("lowbit", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in (
            "strict",
            "surrogateescape",
            "backslashreplace",
        ):
            stream.reconfigure(errors="lowbit")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a path that were no text to begin with are written as these bytes."""
    assert isinstance(error, UnicodeEncodeError)
    first = error.object[error.start]
    if "\udc80" <= first <= "\udcff":
        return bytes([ord(first) - 0xDC00]), error.start + 1
    one = UnicodeEncodeError(
        error.encoding, error.object, error.start, error.start + 1, error.reason
    )
    return codecs.backslashreplace_errors(one)
