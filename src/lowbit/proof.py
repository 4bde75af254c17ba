"""The proof that comes with an artifact: tokens with the tuned model's logits, and the check that a runtime reproduces them.

The runtime runs in a process of its own, see `lowbit.readers`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .artifact import PROOF, REPORT, file_hash, read_shard, tensor_hash
from .errors import LowbitError, VerificationError
from .formats import awq, gptq, mlx, native
from .formats import compressed_tensors as ct
from .formats.layouts import LAYOUTS

_SCRIPTS = Path(__file__).parent / "readers"
_MISSING = 3  # exit status of a script whose runtime is not installed
EXACT = "activations not quantized"


@dataclass(frozen=True)
class Reader:
    """Who opens a format as a user would.

    Attributes:
        script: file in `lowbit.readers`. name: of the runtime, for people.
        within: greatest difference of its logits to the proof's, relative to their spread: what its arithmetic may add.
    """

    script: str
    name: str
    within: float


_WITHIN = 2e-2  # rounding of the weight to its 16-bit dtype, which a float32 loader does not do
_GPTQMODEL, _MLX = 3e-2, 6e-2  # all in bfloat16: 0.007 to 0.017 and 0.032 to 0.040 on models of 4 and 5 blocks, docs/results.md
READERS = {
    **{name: Reader("with_transformers.py", "transformers", _WITHIN) for name in (ct.NAME, native.NAME)},
    **{name: Reader("with_transformers.py", "transformers and GPTQModel", _GPTQMODEL) for name in (gptq.V1, gptq.V2, awq.NAME)},
    mlx.NAME: Reader("with_mlx.py", "mlx-lm", _MLX),
}


@dataclass(frozen=True)
class Verification:
    """What was checked, and how it came out.

    Attributes:
        tensors: number of tensors whose bytes were compared with the report.
        linears: number of linears whose codes were unpacked and found in range.
        loader: "passed", or why it was not run.
        logits_rms: root mean square difference of the runtime's logits to the proof's, relative to their spread.
        top1: share of proof positions with the same most likely token.
        reader: the runtime.
        decoded_rms: as ``logits_rms``, from the weights as the runtime decodes them, in float32; None where it computes so anyway, or
            does not hand them out.
    """

    tensors: int
    linears: int
    loader: str
    logits_rms: float | None = None
    top1: float | None = None
    reader: str = "transformers"
    decoded_rms: float | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.logits_rms is None or self.top1 is None:
            return f"{self.tensors} tensors and {self.linears} linears as tuned; loader check {self.loader}"
        decoded = "" if self.decoded_rms is None else f" ({self.decoded_rms:.1e} with its weights in float32)"
        return (
            f"{self.tensors} tensors and {self.linears} linears as tuned; logits by {self.reader} within {self.logits_rms:.1e}{decoded} "
            f"of the tuned model's, top-1 equal at {self.top1:.1%}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of an artifact.

    Raises:
        LowbitError: no such folder, or no report in it.
    """
    path = folder / REPORT
    if not folder.is_dir():
        raise LowbitError(f"no such folder: '{folder}'.")
    if not path.is_file():
        raise LowbitError(f"'{folder}' has no {REPORT}: it is not an artifact of lowbit.")
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except ValueError as e:
        raise VerificationError(f"'{path}' is not readable JSON: {e}") from e
    if not isinstance(data, dict) or not {"files", "shards", "linears", "blocks"} <= set(data):
        raise VerificationError(f"'{path}' is not a complete report: damaged, or made by another version of lowbit.")
    return data


def check_tensors(folder: Path, report: dict[str, Any]) -> tuple[int, int]:
    """Compare every file and tensor on disk with the hashes in the report, and unpack every linear.

    Returns:
        number of tensors, number of linears.

    Raises:
        VerificationError: naming the tensor that differs, or the file that is missing or unreadable.
    """
    for name, digest in report["files"].items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"'{path}' is missing.")
        if file_hash(path) != digest:
            raise VerificationError(f"'{path}' is not what was written: its bytes have changed.")
    config, layout = json.loads((folder / "config.json").read_text()), LAYOUTS[report["format"]]
    tensors = linears = 0
    for shard, record in report["shards"].items():
        path = folder / shard
        held = read_shard(path)
        _same_names(path, set(record["tensors"]), set(held))
        for name, digest in record["tensors"].items():
            tensors += 1
            if tensor_hash(held[name]) != digest:
                raise VerificationError(f"tensor '{name}' in '{path}' is not what was written: its bytes have changed.")
        if file_hash(path) != record["sha256"]:
            raise VerificationError(f"the header of '{path}' is not what was written, though its tensors are.")
        for linear in layout.linears(held):
            linears += 1
            try:
                layout.read(held, linear, config)
            except LowbitError as e:
                raise VerificationError(str(e)) from e
    if linears != sum(1 for entry in report["linears"] if "skipped" not in entry):
        raise VerificationError(f"'{folder}' holds {linears} packed linears, its report lists another number.")
    return tensors, linears


def _same_names(path: Path, listed: set[str], held: set[str]) -> None:
    for name in sorted(listed ^ held):
        raise VerificationError(f"tensor '{name}' is {'missing from' if name in listed else 'unexpected in'} '{path}'.")


def runtime_logits(folder: Path, ids: Tensor, format_: str, *, exact: bool = False, python: str = sys.executable) -> dict[str, Tensor] | str:
    """What the runtime of a format computes from a model, in a process of its own.

    Args:
        ids: (n, length) int64. exact: do not quantize activations. python: interpreter that has the runtime.

    Returns:
        "logits", and from some also "decoded", see `lowbit.readers`, each (n, length, vocab) float32; or the packages that are missing.

    Raises:
        VerificationError: the runtime fails.
    """
    from safetensors.torch import save_file

    reader = READERS[format_]
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids.contiguous()}, given)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                       "GPTQMODEL_CPU_WORKERS": "2"}  # fmt: skip
        method = "gptq" if format_ in (gptq.V1, gptq.V2) else format_
        command = [python, str(_SCRIPTS / reader.script), str(folder), str(given), str(out), method, "exact" if exact else "as stored"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        except OSError as e:
            raise LowbitError(f"cannot run '{python}': {e.strerror}.") from e
        if done.returncode == _MISSING:
            return done.stdout.strip().splitlines()[-1]
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"{reader.name} cannot load '{folder}': {last}")
        logits: dict[str, Tensor] = load_file(out)
        return logits


def loader_logits(folder: Path, ids: Tensor, *, exact: bool = False) -> Tensor:
    """Logits (n, length, vocab) float32 that transformers computes from an artifact. Raises VerificationError if it fails."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    found = runtime_logits(folder, ids, method, exact=exact)
    assert not isinstance(found, str)
    return found["logits"]


def compare_logits(tuned: Tensor, loaded: Tensor) -> tuple[float, float]:
    """(rms difference relative to the tuned logits' standard deviation, top-1 agreement)."""
    rms = float((loaded.double() - tuned.double()).pow(2).mean().sqrt() / tuned.double().std())
    return rms, float((loaded.argmax(-1) == tuned.argmax(-1)).double().mean())


def verify(folder: Path, *, loader: bool = True, python: str = sys.executable) -> Verification:
    """Check an artifact or an export against its report: every tensor, every code, and the logits that its runtime computes.

    Args:
        loader: run the runtime. python: interpreter that has it; where it has not, that is said and is no failure.

    Raises:
        LowbitError: not an artifact. VerificationError: something differs; it names the tensor.
    """
    report = read_report(folder)
    tensors, linears = check_tensors(folder, report)
    if not loader:
        return Verification(tensors, linears, "not asked for")
    reader, proof = READERS[report["format"]], read_shard(folder / PROOF)
    found = runtime_logits(folder, proof["ids"], report["format"], exact=report.get("proof") == EXACT, python=python)
    if isinstance(found, str):
        missing = f"not run: no {found} here (lowbit verify --python names an interpreter that has it)"
        return Verification(tensors, linears, missing, reader=reader.name)
    rms, top1 = _compared(folder, reader, proof["logits"], found["logits"], reader.within)
    decoded = _compared(folder, reader, proof["logits"], found["decoded"], _WITHIN)[0] if "decoded" in found else None
    return Verification(tensors, linears, "passed", rms, top1, reader.name, decoded)


def _compared(folder: Path, reader: Reader, tuned: Tensor, found: Tensor, within: float) -> tuple[float, float]:
    rms, top1 = compare_logits(tuned, found[:, -tuned.shape[1] :])
    if not rms <= within:
        raise VerificationError(
            f"'{folder}' loads with {reader.name}, but its logits differ from the tuned model's by {rms:.2g} of their spread (at most "
            f"{within:g} is rounding)."
        )
    return rms, top1
