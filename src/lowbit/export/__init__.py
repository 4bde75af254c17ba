"""A finished artifact rewritten for another runtime, codes unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import LowbitError
from ..formats import compressed_tensors as ct
from ..proof import Verification, verify
from . import folders, for_vllm
from .source import Source

TARGETS = (ct.NAME, *folders.TARGETS)


def export(folder: Path, out: Path, to: str = ct.NAME, *, python: str = sys.executable) -> Verification:
    """Rewrite an artifact for a runtime, and prove what was written.

    Args:
        folder: an artifact, verified first. out: a directory that does not exist, or is empty. to: one of `TARGETS`.
        python: interpreter that has the runtime, for the proof.

    Returns:
        what was checked; its ``loader`` says so where the runtime is not there.

    Raises:
        LowbitError: not an artifact, or it holds something that the format cannot say. VerificationError: a check failed.
    """
    if to not in TARGETS:
        raise LowbitError(f"cannot export to '{to}': choose one of {', '.join(TARGETS)}.")
    source = Source.open(folder)
    verify(folder, loader=False)
    if to == ct.NAME:
        return for_vllm.export(source, out)
    return folders.export(source, to, out, python)
