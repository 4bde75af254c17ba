"""The proof that comes with an artifact: tokens with the tuned model's logits, and the check that a
runtime reproduces them.

The runtime runs in a process of its own, see `lowbit.artifact.readers`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ...errors import LowbitError, VerificationError, unknown
from ...formats import gguf
from ...machine import fits_whole
from ..files import PROOF, read_shard
from .contents import check_files, check_names, check_tensors, numbers_in, read_report
from .runtimes import (
    GGUF_DECODED,
    GGUF_DECODER,
    READERS,
    WITHIN,
    Loading,
    Reader,
    compare_logits,
    loader_logits,
    runtime_logits,
)

__all__ = [
    "EXACT",
    "GGUF_DECODER",
    "READERS",
    "Reader",
    "Verification",
    "check_files",
    "check_tensors",
    "compare_logits",
    "loader_logits",
    "read_report",
    "runtime_logits",
    "verify",
]
EXACT = "activations not quantized"
_FLOAT32 = 4  # bytes
_WHOLE = "passed; loaded whole: this artifact or transformers cannot do it by blocks"


@dataclass(frozen=True)
class Verification:
    """What was checked, and how it came out.

    Attributes:
        tensors: number of tensors whose bytes were compared with the report.
        linears: number of linears whose codes were unpacked and found in range.
        loader: "passed", or why it was not run.
        logits_rms: root mean square difference of the runtime's logits to the proof's, relative to
            their spread.
        top1: share of proof positions with the same most likely token.
        reader: the runtime.
        reference: whose logits the proof holds.
        loading: whether the runtime had the whole model in memory or one block at a time; None
            where it was not run, or is none that could.
        decoded_rms: as ``logits_rms``, from the weights as the runtime decodes them, in float32;
            None where it computes so anyway, or does not hand them out.
    """

    tensors: int
    linears: int
    loader: str
    logits_rms: float | None = None
    top1: float | None = None
    reader: str = "transformers"
    decoded_rms: float | None = None
    reference: str = "the tuned model's"
    loading: Loading | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.logits_rms is None or self.top1 is None:
            return (
                f"{self.tensors} tensors and {self.linears} linears as tuned; loader check "
                f"{self.loader}"
            )
        decoded = ""
        if self.decoded_rms is not None:
            decoded = f" ({self.decoded_rms:.1e} with its weights in float32)"
        missing = "" if self.loader == "passed" else f" ({self.loader.removeprefix('passed; ')})"
        return (
            f"{self.tensors} tensors and {self.linears} linears as tuned; logits by {self.reader} "
            f"within {self.logits_rms:.1e}{decoded} "
            f"of {self.reference}, top-1 equal at {self.top1:.1%}{missing}"
            f"{', one block in memory at a time' if self.loading == 'blocks' else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    folder: Path,
    *,
    loader: bool = True,
    python: str = sys.executable,
    loading: str = "auto",
    tensors: bool = True,
) -> Verification:
    """Check an artifact or an export against its report: every tensor, every code, and the logits
    that its runtime computes.

    Args:
        loader: run the runtime. python: interpreter that has it; where it has not, that is said and
            is no failure.
        loading: "whole", or "blocks" to have one block of it in memory at a time, where the runtime
            is transformers; "auto" is "whole" where that fits into the memory that is free.
        tensors: hash and unpack them; False where they were compared as they were written, and only
            their names are left to check.

    Raises:
        LowbitError: not an artifact, no such way of loading, or the runtime could not work here,
            for want of memory or the like. VerificationError: something differs; it names the
            tensor.
    """
    if loading not in ("auto", *get_args(Loading)):
        raise unknown("way of loading", loading, ("auto", *get_args(Loading)))
    report = read_report(folder)
    if loading == "blocks" and not _by_block(report):
        raise LowbitError(
            f"--load blocks is for what transformers loads by itself, and '{folder}' is "
            f"in the format {report['format']}: leave it out."
        )
    counts = check_tensors(folder, report) if tensors else check_names(folder, report)
    if not loader:
        return Verification(*counts, "not asked for")
    reader, proof = READERS[report["format"]], read_shard(folder / PROOF)
    last = proof["logits"].shape[1]
    if report["format"] == gguf.NAME:
        given = Verification(*counts, "passed"), proof, python, _loading(folder, report, loading)
        found_gguf = _verify_gguf(folder, report, *given)
        if loading == "blocks" and found_gguf.loading != "blocks":
            return replace(found_gguf, loader=found_gguf.loader.replace("passed", _WHOLE, 1))
        return found_gguf
    found = runtime_logits(
        folder,
        proof["ids"],
        report["format"],
        last,
        exact=report.get("proof") == EXACT,
        python=python,
        loading=_loading(folder, report, loading),
    )
    if isinstance(found, str):
        missing = (
            f"not run: no {found} here (lowbit verify --python names an interpreter that has it)"
        )
        return Verification(*counts, missing, reader=reader.name)
    rms, top1 = _compared(folder, reader, proof["logits"], found["logits"], reader.within)
    decoded = None
    if "decoded" in found:
        decoded, _ = _compared(folder, reader, proof["logits"], found["decoded"], WITHIN)
    way: Loading | None = "whole" if _by_block(report) else None
    if "blocks" in found:
        way = "blocks"
    told = _WHOLE if loading == "blocks" and way == "whole" else "passed"
    return Verification(*counts, told, rms, top1, reader.name, decoded, loading=way)


def _by_block(report: dict[str, Any]) -> bool:
    """Whether a runtime of an artifact can have one block in memory at a time."""
    decoder = GGUF_DECODER if report["format"] == gguf.NAME else READERS[report["format"]]
    return decoder.by_block


def _loading(folder: Path, report: dict[str, Any], asked: str) -> Loading:
    if not _by_block(report) or asked == "whole":
        return "whole"
    if asked == "blocks":
        return "blocks"
    fits = fits_whole(numbers_in(folder, report), _FLOAT32, torch.device("cpu"))
    return "whole" if fits else "blocks"


def _verify_gguf(
    folder: Path,
    report: dict[str, Any],
    done: Verification,
    proof: dict[str, Tensor],
    python: str,
    loading: Loading,
) -> Verification:
    """The file as the gguf package decodes it, computed by transformers in float32, and as
    llama.cpp runs it.
    """
    decoded, top1, last = None, None, proof["logits"].shape[1]
    if report["gguf"]["moved"] is not None:
        done = replace(done, reference="those of the numbers in the file")
    exact: dict[str, Tensor] | str = "no gguf package that knows Q2_0"
    own = json.loads((folder / PROOF.parent / "config.json").read_text())["model_type"]
    if own not in GGUF_DECODED:
        exact = f"no loader of transformers that reads GGUF files of '{own}' models"
    elif "Q2_0" not in report["gguf"]["types"]:  # not known to releases of the package up to 0.19
        exact = runtime_logits(
            folder, proof["ids"], gguf.NAME, last, reader=GGUF_DECODER, loading=loading
        )
    if not isinstance(exact, str):
        decoded, top1 = _compared(
            folder, GGUF_DECODER, proof["logits"], exact["logits"], GGUF_DECODER.within
        )
        done = replace(done, loading="blocks" if "blocks" in exact else "whole")
    found = runtime_logits(folder, proof["ids"], gguf.NAME, last, python=python)
    if isinstance(found, str):
        missing = (
            f"llama.cpp not run: no {found} here (lowbit verify --python names an interpreter that "
            "has it)"
        )
        if decoded is None:
            return replace(
                done,
                loader=f"not run: no {str(exact).removeprefix('no ')} here; {missing}",
                reader=READERS[gguf.NAME].name,
            )
        return replace(
            done,
            loader=f"passed; {missing}",
            logits_rms=decoded,
            top1=top1,
            reader=GGUF_DECODER.name,
        )
    for i, (text, ids) in enumerate(
        json.loads((folder / PROOF.parent / "tokens.json").read_text()).items()
    ):
        if found[f"tokens.{i}"].tolist() != ids:
            raise VerificationError(
                f"llama.cpp cuts the text {text!r} into other tokens than the model's own "
                "tokenizer."
            )
    reader = READERS[gguf.NAME]
    compared = _compared_typical if _has_routers(report) else _compared
    rms, top1 = compared(folder, reader, proof["logits"], found["logits"], reader.within)
    return replace(done, logits_rms=rms, top1=top1, reader=reader.name, decoded_rms=decoded)


def _has_routers(report: dict[str, Any]) -> bool:
    """Whether tokens choose experts."""
    return any(
        name.endswith(gguf.ROUTER) for s in report["shards"].values() for name in s["tensors"]
    )


def _compared_typical(
    folder: Path, reader: Reader, tuned: Tensor, found: Tensor, within: float
) -> tuple[float, float]:
    """As `_compared`, by the median of the positions: a runtime that rounds activations sends some
    tokens to other experts, whose logits then differ by more than rounding.
    """
    each = (found.double() - tuned.double()).pow(2).mean(-1).sqrt() / tuned.double().std()
    rms, top1 = compare_logits(tuned, found)
    middle = float(each.median())
    if not middle <= within:
        raise VerificationError(
            f"'{folder}' loads with {reader.name}, but its logits differ from the tuned model's by "
            f"{middle:.2g} of their spread at half of the positions (at most {within:g} is "
            "rounding)."
        )
    return rms, top1


def _compared(
    folder: Path, reader: Reader, tuned: Tensor, found: Tensor, within: float
) -> tuple[float, float]:
    rms, top1 = compare_logits(tuned, found)
    if not rms <= within:
        raise VerificationError(
            f"'{folder}' loads with {reader.name}, but its logits differ from the tuned model's by "
            f"{rms:.2g} of their spread (at most "
            f"{within:g} is rounding)."
        )
    return rms, top1
