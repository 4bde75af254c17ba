"""The command line. Every command is a thin shell around a function of the library."""

from __future__ import annotations

import os
import sys

from . import make, measure, look, share  # isort: skip  # noqa: F401 - the order of --help
from ..console import lose_nothing
from .app import app
from .sentences import err


def main() -> None:
    """Entry point of the `lowbit` command and of `python -m lowbit`."""
    lose_nothing()
    try:
        app()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # torchrun's other processes are interrupted too
            err.print("interrupted.")
        sys.exit(130)
