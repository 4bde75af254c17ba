"""The errors a user can meet. They carry one or two sentences: what is wrong, where, and what to do
next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    """Bad input or an environment that cannot do what was asked. The command line prints it and
    exits with code 2.
    """


class VerificationError(LowbitError):
    """An artifact that is not what its report says it is. The command line prints it and exits with
    code 1.
    """


class DiskFull(LowbitError):
    """No space is left where something was to be written. Who knows what is kept adds a
    sentence.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a request to end, with a sentence on what is kept."""


class ToldElsewhere(LowbitError):
    """An error of which another rank of the run tells the user. The command line prints nothing and
    exits with code 2.
    """


def unknown(kind: str, given: str, known: Iterable[str]) -> LowbitError:
    """A LowbitError for a name that does not exist, with the nearest one that does, or the whole
    list.
    """
    names = sorted(known)
    near = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}."
    return LowbitError(f"unknown {kind} '{given}': {hint}")


def in_bytes(count: int) -> str:
    """A number of bytes for a sentence: in units of 1024, three digits or four."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
