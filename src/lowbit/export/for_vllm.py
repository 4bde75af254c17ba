"""compressed-tensors for vLLM, where transformers alone would compute something else: online
rotations as a `transform_config`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from ..artifact.files import PROOF, read_shard, save_shard
from ..artifact.output import Output
from ..artifact.proof import EXACT, Verification, loader_logits
from ..errors import LowbitError, VerificationError
from ..formats import compressed_tensors as ct
from ..formats import native, packing, transforms
from ..formats.by_name import FORMATS
from ..formats.uniform import as_uniform
from .place import place
from .source import Source

_SHARD = "model-transforms.safetensors"


def export(source: Source, output: Output) -> Verification:
    """Write an artifact in the format of lowbit as compressed-tensors.

    The packed weights are copied. Before the directory gets its name, its logits are compared with
    the tuned model's, by transformers with the rotations applied by compressed-tensors from what
    was written; transformers alone (5.23) ignores them. Quantized activations are left out of that
    comparison.

    Args:
        source: the artifact. output: the directory to be made, claimed.

    Raises:
        LowbitError: it holds something that the format or vLLM cannot say. VerificationError: a
            check failed.
    """
    if not source.is_native:
        raise LowbitError(
            f"'{source.folder}' is in the format {ct.NAME} already: it needs no copy."
        )
    described, matrices = _described(source)
    with place(source, output) as made:
        made.report["online_rotations"] = bool(matrices)
        if described["config_groups"]["group_0"]["input_activations"] is not None:
            # The largest value of a token lies between two codes of the full-range grid, so that
            # summing a rotation in another order decides where it goes: weights and rotations are
            # compared without that.
            proof = read_shard(source.folder / PROOF)
            logits = loader_logits(
                source.folder, proof["ids"], proof["logits"].shape[1], exact=True
            )
            save_shard(made.partial / PROOF, {"ids": proof["ids"], "logits": logits})
            made.report["proof"] = EXACT
        made.write("config.json", {**source.config, "quantization_config": described})
        said = json.loads((made.partial / "config.json").read_text())
        for name in source.report["shards"]:
            held = made.take(source, name)
            for linear in packing.packed_linears(held):
                if FORMATS[ct.NAME].look(held, linear, said).grid != source.grids[linear]:
                    raise VerificationError(f"config.json gives '{linear}' another grid.")
        if matrices:
            made.add(_SHARD, matrices)
        made.write_index()
        return made.close(ct.NAME, {}, sys.executable)


def _described(source: Source) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder, own, grids = source.folder, source.own, source.grids
    linears = list(grids)
    other = ct.beyond(grids.values())
    if other is not None or any(native.outliers_of(own, n) for n in linears):
        raise LowbitError(
            f"'{folder}' has weights on {other or 'codebooks'} or kept in floating point: only the "
            "format of lowbit carries them."
        )
    if own["kv"] is not None:
        raise LowbitError(
            f"'{folder}' quantizes keys and values, which vLLM does otherwise: quantize without KV "
            "in the scheme."
        )
    input_quantizers = {n: native.input_quantizer_of(own, n) for n in linears}
    activations = next((r.grid for r in input_quantizers.values()), None)
    if not ct.carries(grids.values(), activations):
        raise LowbitError(
            f"'{folder}' has activations on a grid that compressed-tensors does not carry: it "
            "takes 4 or 8 bits, symmetric weights, and "
            "--set activations.symmetric=true --set activations.full_range=true --set "
            "activations.clip=1."
        )
    dtype = native.dtype_of(own)
    ct.check_mixed(grids.values(), dtype)
    rotations = {n: r.rotation for n, r in input_quantizers.items() if r.rotation is not None}
    odd = next((g for n, g in grids.items() if n in rotations and as_uniform(g) is None), None)
    if odd is not None:
        raise LowbitError(
            f"'{folder}' rotates the inputs of weights on {odd}, which vLLM is not known to take: "
            "quantize with --set quarot.online=false."
        )
    biased = [n for n in rotations if f"{n}.bias" in source.index["weight_map"]]
    if biased:
        raise LowbitError(
            f"'{biased[0]}' has a bias and a rotated input, which vLLM refuses: quantize with "
            "--set quarot.online=false."
        )
    plain = ct.describe(grids, own["ignore"], activations, dtype)
    if not rotations:
        return plain, {}
    entry, matrices = transforms.describe(rotations, dtype)
    return {**plain, "transform_config": entry}, matrices
