"""The proof that comes with an artifact: tokens with the tuned model's logits, and the check that a loader reproduces them.

The loader runs in a process of its own that never imports this library: plain transformers, as a user would.
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
from .formats import native
from .formats.packing import local_tensors, packed_linears, unpack

_LOADER = """
import json, sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids, out, needs, exact = sys.argv[1:]
needs_lowbit = needs == "lowbit"
if needs_lowbit:
    import lowbit
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
assert ("lowbit" in sys.modules) == needs_lowbit
with torch.no_grad():
    model(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)  # some loaders decode their weights at the first pass
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.weights = None  # decoded by now; rounding them again would be in another dtype
            if exact == "exact":
                module.quantization_scheme.input_activations = None
        if exact == "exact" and hasattr(module, "reading"):
            module.reading = module.reading.exact()
    torch.nn.Module.float(model)  # weights as users get them, arithmetic as in tuning
    transforms = json.loads(Path(folder, "config.json").read_text())["quantization_config"].get("transform_config")
    if transforms is not None:  # transformers ignores them; vLLM applies the online ones, with matrices from the files
        from compressed_tensors.transform import TransformConfig, apply_transform_config
        online = TransformConfig.model_validate(transforms)
        for scheme in online.config_groups.values():
            scheme.apply, scheme.precision = [a for a in scheme.apply if a.is_online()], torch.float32
        apply_transform_config(model, online)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        files = json.loads(Path(folder, "model.safetensors.index.json").read_text())["weight_map"]
        stored = {k: f for k, f in files.items() if k.endswith("_input.weight")}
        assert len(stored) == len(online.config_groups)
        for key, file in stored.items():
            with safe_open(Path(folder, file), "pt") as f:
                parameters[key].copy_(f.get_tensor(key))
    logits = torch.cat([model(row[None], use_cache=False).logits.float() for row in load_file(ids)["ids"]])
save_file({"logits": logits.contiguous()}, out)
"""

EXACT = "activations not quantized"
_WITHIN = 2e-2  # rounding of the weight to its 16-bit dtype, which a float32 loader does not do


@dataclass(frozen=True)
class Verification:
    """What was checked, and how it came out.

    Attributes:
        tensors: number of tensors whose bytes were compared with the report.
        linears: number of linears whose codes were unpacked and found in range.
        loader: "passed", or why it was not run.
        logits_rms: root mean square difference of the loader's logits to the tuned model's, relative to their spread.
        top1: share of proof positions with the same most likely token.
    """

    tensors: int
    linears: int
    loader: str
    logits_rms: float | None = None
    top1: float | None = None

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.logits_rms is None or self.top1 is None:
            return f"{self.tensors} tensors and {self.linears} linears as tuned; loader check {self.loader}"
        return (
            f"{self.tensors} tensors and {self.linears} linears as tuned; transformers' logits within {self.logits_rms:.1e} "
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
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
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
        for linear in packed_linears(held):
            linears += 1
            _unpack(held, linear, config)
    if linears != sum(1 for entry in report["linears"] if "skipped" not in entry):
        raise VerificationError(f"'{folder}' holds {linears} packed linears, its report lists another number.")
    return tensors, linears


def _same_names(path: Path, listed: set[str], held: set[str]) -> None:
    for name in sorted(listed ^ held):
        raise VerificationError(f"tensor '{name}' is {'missing from' if name in listed else 'unexpected in'} '{path}'.")


def _unpack(held: dict[str, Tensor], name: str, config: dict[str, Any]) -> None:
    grid = native.grid_of(config, name)
    if grid is None:
        raise VerificationError(f"'{name}' is packed, but config.json gives it no scheme.")
    try:
        unpack(local_tensors(held, name), grid, name)
    except LowbitError as e:
        raise VerificationError(str(e)) from e


def loader_logits(folder: Path, ids: Tensor, *, exact: bool = False) -> Tensor:
    """Logits (n, length, vocab) float32 that transformers computes from the artifact, in a process of its own.

    That process imports lowbit only for artifacts in its own format, as their user has to. With ``exact`` activations are not quantized.

    Raises:
        VerificationError: the loader fails.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "ids.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids.contiguous()}, given)
        method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        arguments = [str(folder), str(given), str(out), method, "exact" if exact else "as stored"]
        done = subprocess.run([sys.executable, "-c", _LOADER, *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"transformers cannot load '{folder}': {last}")
        logits: Tensor = load_file(out)["logits"]
        return logits


def compare_logits(tuned: Tensor, loaded: Tensor) -> tuple[float, float]:
    """(rms difference relative to the tuned logits' standard deviation, top-1 agreement)."""
    rms = float((loaded.double() - tuned.double()).pow(2).mean().sqrt() / tuned.double().std())
    return rms, float((loaded.argmax(-1) == tuned.argmax(-1)).double().mean())


def verify(folder: Path, *, loader: bool = True) -> Verification:
    """Check an artifact against its report: every tensor, every code, and the logits that plain transformers computes.

    Raises:
        LowbitError: not an artifact. VerificationError: something differs; it names the tensor.
    """
    report = read_report(folder)
    tensors, linears = check_tensors(folder, report)
    if not loader:
        return Verification(tensors, linears, "not asked for")
    proof = read_shard(folder / PROOF)
    logits = loader_logits(folder, proof["ids"], exact=report.get("proof") == EXACT)[:, -proof["logits"].shape[1] :]
    rms, top1 = compare_logits(proof["logits"], logits)
    if not rms <= _WITHIN:
        raise VerificationError(
            f"'{folder}' loads, but its logits differ from the tuned model's by {rms:.2g} of their spread (at most {_WITHIN:g} is rounding)."
        )
    return Verification(tensors, linears, "passed", rms, top1)
