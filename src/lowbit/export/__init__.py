"""A finished artifact rewritten for another runtime, codes unchanged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..artifact.files import REPORT
from ..artifact.output import Output, claimed
from ..artifact.proof import Verification, check_files
from ..errors import DiskFull, Interrupted, LowbitError
from ..formats import compressed_tensors as ct
from ..formats import gguf as container
from . import folders, for_vllm, gguf
from .source import Source

TARGETS = (ct.NAME, *folders.TARGETS, container.NAME)


def export(
    folder: Path,
    out: Path,
    to: str = ct.NAME,
    *,
    embeddings: str | None = None,
    python: str = sys.executable,
) -> Verification:
    """Rewrite an artifact for a runtime, and prove what was written.

    Args:
        folder: an artifact, verified as it is read. out: a directory that does not exist, or is
            empty. to: one of `TARGETS`; "gguf:TYPE" asks for a block type.
        embeddings: type of embeddings and head in GGUF; None keeps their numbers.
        python: interpreter that has the runtime, for the proof.

    Returns:
        what was checked; its ``loader`` says so where the runtime is not there.

    Raises:
        LowbitError: not an artifact, or it holds something that the format cannot say; ``out``
            holds something, or another process works in it. VerificationError: a check failed.
            Interrupted: a KeyboardInterrupt. Nothing is left in either case.
    """
    target, colon, kind = to.partition(":")
    if target not in TARGETS or (colon and target != container.NAME):
        raise LowbitError(
            f"cannot export to '{to}': choose one of {', '.join(TARGETS)}, or gguf:TYPE."
        )
    if embeddings is not None and target != container.NAME:
        raise LowbitError(
            "--embeddings is for --to gguf: other formats keep embeddings and head as they are."
        )
    with claimed(out, "export") as output, _nothing_kept(output):
        source = Source.open(folder)
        check_files(folder, source.report)
        try:
            if to == ct.NAME:
                return for_vllm.export(source, output)
            if target == container.NAME:
                return gguf.export(source, output, python, kind if colon else None, embeddings)
            return folders.export(source, to, output, python)
        except DiskFull:
            raise
        except Exception:
            source.check()  # damage is what is said, whatever came of it
            raise


@contextmanager
def _nothing_kept(output: Output) -> Iterator[None]:
    """Leave nothing of an export that fails, and say so where a user might expect otherwise."""
    start_anew = "Nothing of the export is kept: the same command starts anew."
    try:
        yield
    except BaseException as e:
        if (
            isinstance(e, KeyboardInterrupt)
            and (output.folder / REPORT).is_file()
            and not output.is_moving
        ):
            raise Interrupted(f"The export is finished all the same: '{output.given}'.") from e
        with suppress(LowbitError):
            output.clear()
        if isinstance(e, KeyboardInterrupt):
            raise Interrupted(start_anew) from e
        if isinstance(e, DiskFull):
            raise DiskFull(f"{e} {start_anew}") from e
        raise
