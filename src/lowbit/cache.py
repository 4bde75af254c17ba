"""Where what is made once per machine lies: compiled code, what was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """LOWBIT_CACHE, else this library's part of the user's cache directory."""
    given = os.environ.get("LOWBIT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def processor() -> str:
    """The features of this machine's processor, as its system tells them: a cache may be shared by
    machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
