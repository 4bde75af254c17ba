"""Runtimes in processes of their own: who opens a format, and how far its logits may be from the
proof's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...errors import LowbitError, VerificationError
from ...formats import awq, gguf, gptq, mlx, native
from ...formats import compressed_tensors as ct

Loading = Literal["whole", "blocks"]

_SCRIPTS = Path(__file__).parent.parent / "readers"
# Torchrun's: a reader is no rank of it.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
# Exit statuses of a script, see `lowbit.artifact.readers`.
_MISSING = 3
_REFUSED = 4
_UNABLE = 5


@dataclass(frozen=True)
class Reader:
    """Who opens a format as a user would.

    Attributes:
        script: file in `lowbit.artifact.readers`.
        name: of the runtime, for people.
        within: greatest difference of its logits to the proof's, relative to their standard
            deviation: what its arithmetic may add.
        by_block: whether it can have one block of a model in memory at a time.
    """

    script: str
    name: str
    within: float
    by_block: bool = False


WITHIN = 2e-2  # rounding of the weight to its 16-bit dtype, which a float32 loader does not do
# All in bfloat16: 0.007 to 0.017 with GPTQModel and 0.032 to 0.040 with mlx-lm, on models of 4 and
# 5 blocks, docs/results.md.
_GPTQMODEL = Reader("with_transformers.py", "transformers and GPTQModel", 3e-2)
_MLX = Reader("with_mlx.py", "mlx-lm", 6e-2)
# It rounds activations to 8 bits on CPUs: 0.01 to 0.03, docs/results.md.
_LLAMACPP = Reader("with_llamacpp.py", "llama.cpp", 6e-2)
_TRANSFORMERS = Reader("with_transformers.py", "transformers", WITHIN, by_block=True)
# All of the file but for what llama.cpp computes of it.
GGUF_DECODER = Reader("with_transformers.py", "transformers and gguf", WITHIN, by_block=True)
# Model types that transformers (5.23) makes of such a file and its config.
GGUF_DECODED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "qwen3_moe")
READERS = {
    ct.NAME: _TRANSFORMERS,
    native.NAME: _TRANSFORMERS,
    gptq.V1: _GPTQMODEL,
    gptq.V2: _GPTQMODEL,
    awq.NAME: _GPTQMODEL,
    mlx.NAME: _MLX,
    gguf.NAME: _LLAMACPP,
}


def runtime_logits(
    folder: Path,
    ids: Tensor,
    format_: str,
    last: int,
    *,
    exact: bool = False,
    python: str = sys.executable,
    reader: Reader | None = None,
    loading: Loading = "whole",
) -> dict[str, Tensor] | str:
    """Compute logits with the runtime of a format, in a process of its own.

    Args:
        ids: (n, length) int64.
        last: how many positions of each row are wanted, from its end.
        exact: do not quantize activations.
        python: interpreter that has the runtime.
        reader: None for the format's own.
        loading: "blocks" has one in memory at a time, where the runtime is transformers and the
            model allows it.

    Returns:
        "logits", and from some also "decoded", see `lowbit.artifact.readers`, each (n, last,
            vocab) float32; or the packages that are missing.

    Raises:
        VerificationError: the runtime cannot read the model.
        LowbitError: the runtime could not do its work here, whatever the model is.
    """
    reader = reader or READERS[format_]
    method = "gptq" if format_ in (gptq.V1, gptq.V2) else format_
    how = "exact" if exact else "as stored"
    try:
        done = subprocess.run(
            [python, str(_SCRIPTS / reader.script), str(folder), method, how, str(last), loading],
            input=bytes(save({"ids": ids.contiguous()})),
            capture_output=True,
            env=_environment(),
            check=False,
        )
    except OSError as e:
        raise LowbitError(f"cannot run '{python}': {e.strerror}.") from e
    if done.returncode == 0:
        try:
            logits: dict[str, Tensor] = load(done.stdout)
            return logits
        except SafetensorError as e:
            raise LowbitError(f"{reader.name} under '{python}' sent no logits: {e}.") from e
    said: str = done.stdout.decode(errors="replace").strip()
    if done.returncode == _MISSING:
        return said
    if done.returncode == _REFUSED:
        raise VerificationError(f"{reader.name} cannot load '{folder}': {said}")
    raise LowbitError(
        f"{reader.name} could not be run on '{folder}': {_reason(done)}. Nothing was found out "
        "about the model: mend that and repeat the command."
    )


def _environment() -> dict[str, str]:
    """Return the environment of a reader: quiet, offline, and no rank of torchrun."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHED)}
    return {
        **own,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "GPTQMODEL_CPU_WORKERS": "2",
    }


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return why a reader ended without an answer, in words."""
    if done.returncode == _UNABLE:
        return done.stdout.decode(errors="replace").strip().rstrip(".")
    if done.returncode < 0:
        number = -done.returncode
        # Real-time signals have no names.
        named = next((s.name for s in signal.Signals if s == number), f"signal {number}")
        memory = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
        return f"its process was ended by {named}{memory}"
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    return f"its process ended with status {done.returncode} ({lines[-1].rstrip('.')})"


def loader_logits(folder: Path, ids: Tensor, last: int, *, exact: bool = False) -> Tensor:
    """Compute logits (n, last, vocab) float32 of an artifact's last positions with transformers.

    Raises:
        VerificationError, LowbitError: as `runtime_logits`.
    """
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    found = runtime_logits(folder, ids, method, last, exact=exact)
    assert not isinstance(found, str)
    return found["logits"]


def compare_logits(tuned: Tensor, loaded: Tensor) -> tuple[float, float]:
    """Return the rms difference relative to the tuned logits' standard deviation, and the top-1
    agreement, of logits (n, positions, vocab).
    """
    rms = float((loaded.double() - tuned.double()).pow(2).mean().sqrt() / tuned.double().std())
    return rms, float((loaded.argmax(-1) == tuned.argmax(-1)).double().mean())
