"""An artifact in the library's own format rewritten for a runtime that can do the same, codes unchanged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from .artifact import INDEX, PROOF, REPORT, file_hash, read_shard, save_shard, tensor_hash, write_atomic
from .errors import LowbitError
from .formats import compressed_tensors as ct
from .formats import native, transforms
from .grid import Affine
from .proof import EXACT, Verification, loader_logits, read_report, verify

_SHARD = "model-transforms.safetensors"
_NOT_COPIED = {"config.json", INDEX, REPORT}


def export(folder: Path, out: Path) -> Verification:
    """Write an artifact with online rotations as compressed-tensors with a `transform_config`, for vLLM.

    The packed weights are copied. Before the directory gets its name, its logits are compared with the tuned model's, by transformers
    with the rotations applied by compressed-tensors from what was written; transformers alone (5.23) ignores them. Quantized activations
    are left out of that comparison.

    Args:
        folder: an artifact in the format of lowbit. out: a directory that does not exist.

    Raises:
        LowbitError: not an artifact, or it holds something that the format or vLLM cannot say. VerificationError: a check failed.
    """
    report = read_report(folder)
    if out.exists():
        raise LowbitError(f"'{out}' exists. Choose another -o, or remove it first.")
    config = json.loads((folder / "config.json").read_text())
    own = config["quantization_config"]
    if own["quant_method"] != native.NAME:
        raise LowbitError(f"'{folder}' is in the format {own['quant_method']} already: vLLM loads it as it is.")
    native.check(own)
    verify(folder)
    described, matrices = _described(folder, report, own)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise LowbitError(f"'{partial}' exists, left by an export that was interrupted, or not ours. Remove it first.")
    try:
        _copy(folder, partial)
        if described["config_groups"]["group_0"]["input_activations"] is not None:
            # The largest value of a token lies between two codes of the full-range grid, so that summing a rotation in another order
            # decides where it goes: weights and rotations are compared without that.
            proof = read_shard(folder / PROOF)
            logits = loader_logits(folder, proof["ids"], exact=True)[:, -proof["logits"].shape[1] :]
            save_shard(partial / PROOF, {"ids": proof["ids"], "logits": logits})
            report["proof"] = EXACT
        save_shard(partial / _SHARD, matrices)
        held = read_shard(partial / _SHARD)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].update(dict.fromkeys(held, _SHARD))
        index["metadata"]["total_size"] = index["metadata"].get("total_size", 0) + sum(t.nbytes for t in held.values())
        _write_json(partial / INDEX, index)
        _write_json(partial / "config.json", {**config, "quantization_config": described})
        report["format"] = ct.NAME
        hashes = {k: tensor_hash(t) for k, t in held.items()}
        report["shards"][_SHARD] = {"sha256": file_hash(partial / _SHARD), "bytes": (partial / _SHARD).stat().st_size, "tensors": hashes}
        report["files"] = {n: file_hash(partial / n) for n in report["files"]}
        report["exported_from"] = report["hash"]
        report["hash"] = hashlib.sha256("".join(s["sha256"] for s in report["shards"].values()).encode()).hexdigest()
        _write_json(partial / REPORT, report)
        done = verify(partial)
        _write_json(partial / REPORT, {**report, "verification": done.as_dict()})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return done


def _described(folder: Path, report: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    linears = [e["name"] for e in report["linears"] if "skipped" not in e]
    grids = {n: native.grid_of(own, n) for n in linears}
    affine = {n: g for n, g in grids.items() if isinstance(g, Affine)}
    if len(affine) < len(grids) or any(native.outliers_of(own, n) for n in linears):
        raise LowbitError(f"'{folder}' has weights on codebooks or kept in floating point: only the format of lowbit carries them.")
    if own["kv"] is not None:
        raise LowbitError(f"'{folder}' quantizes keys and values, which vLLM does otherwise: quantize without KV in the scheme.")
    readings = {n: native.reading_of(own, n) for n in linears}
    activations = next((r.grid for r in readings.values()), None)
    if not ct.carries(affine.values(), activations):
        raise LowbitError(
            f"'{folder}' has activations on a grid that compressed-tensors does not carry: it takes 4 or 8 bits, symmetric weights, and "
            "--set activations.symmetric=true --set activations.full_range=true --set activations.clip=1."
        )
    rotations = {n: r.rotation for n, r in readings.items() if r.rotation is not None}
    biased = [n for n in rotations if f"{n}.bias" in json.loads((folder / INDEX).read_text())["weight_map"]]
    if biased:
        raise LowbitError(f"'{biased[0]}' has a bias and a rotated input, which vLLM refuses: quantize with --set quarot.online=false.")
    entry, matrices = transforms.describe(rotations, native.dtype_of(own))
    return {**ct.describe(affine, own["ignore"], activations), "transform_config": entry}, matrices


def _copy(folder: Path, partial: Path) -> None:
    try:
        shutil.copytree(folder, partial, ignore=lambda at, names: [n for n in names if Path(at) == folder and n in _NOT_COPIED])
    except (OSError, shutil.Error) as e:
        raise LowbitError(f"cannot write '{partial}': {getattr(e, 'strerror', None) or e}.") from e
    assert (partial / PROOF).is_file()


def _write_json(path: Path, data: Any) -> None:
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
