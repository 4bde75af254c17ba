"""The end of a run: quality on held-out text, the artifact's other files, its proof, its check."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.card import model_card
from ..artifact.disk import write_atomic
from ..artifact.files import HASHED, INDEX, RECIPE, REPORT, file_hash
from ..artifact.proof import Verification, verify
from ..evaluate import Tally
from ..formats import compressed_tensors as ct
from ..formats import native
from ..grid import KVGrid
from ..model.calibration import Rows
from ..model.context import TOKENS_PER_PASS, token_parts
from ..model.model import Model
from ..plan import Plan
from ..recipe.widths import CHOICE, choice
from .patterns import attention_patterns, input_patterns
from .report import Facts, format_of, report_of
from .workplace import Workplace

Record = Mapping[str, Any]

_PROOF_ROWS, _PROOF_TOKENS, _PROOF_POSITIONS = 2, 256, 8


def proof_ids(rows: Rows) -> Tensor:
    """(n, length) int64, the tokens on which the artifact's logits are compared."""
    held_out = len(rows.held_out) >= _PROOF_ROWS
    source = rows.held_out if held_out else rows.calibration
    return source[:_PROOF_ROWS, : min(_PROOF_TOKENS, source.shape[1])]


@torch.no_grad()
def quality(model: Model, rows: Rows) -> dict[str, Any] | None:
    """Perplexity of the float and of the quantized model on the held-out rows, and the divergence
    between them; None without such rows, and on all ranks but the first.
    """
    ids, streams, ranks = rows.held_out, model.streams, model.ranks
    if not len(ids):
        return None
    assert streams is not None  # the blocks are done
    floating, tuned = Tally(), Tally()
    head, length, vocab = model.source.head, ids.shape[1], model.source.config.vocab_size
    for at, i in enumerate(ranks.mine(len(ids)), ranks.count(streams.tuned_rows)):
        floating.count_windows((1, length), referenced=False)
        tuned.count_windows((1, length), referenced=True)
        for part in token_parts(length - 1, vocab):
            target = ids[i, 1:][part].to(model.source.device)
            expected, found = (head(t[at : at + 1, part])[0] for t in (streams.x, streams.xq))
            floating.add_tokens(expected, target)
            tuned.add_tokens(found, target, expected)
    floating.merge(ranks)
    tuned.merge(ranks)
    if not ranks.first:
        return None
    # As `Block.run` passes them, held-out rows last.
    together = min(len(streams.xq), max(1, TOKENS_PER_PASS // ids.shape[1]))
    return {
        "text": f"{rows.source} (held out)",
        "float": floating.result(together).as_dict(),
        "quantized": tuned.result(together).as_dict(),
    }


def verified(folder: Path) -> Verification:
    """What a finished directory is found to be."""
    return verify(folder)


def close(
    place: Workplace, model: Model, plan: Plan, facts: Facts, records: Sequence[Record]
) -> Verification:
    """Write everything but the shards, verify the directory, and give it its final place.

    Raises:
        VerificationError: the artifact is not what was tuned.
    """
    source = model.source
    described = _described(model, plan, records)
    place.write_json("config.json", {**source.artifact_config(), "quantization_config": described})
    place.carry(source.checkpoint, facts.files.carried)
    total = sum(r["bytes"] for r in records)
    weight_map = {t: r["shard"] for r in records for t in r["tensors"]}
    place.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_atomic(place.partial / RECIPE, plan.recipe.to_toml().encode())
    chosen = choice(plan.recipe, list(source.linear_shapes()))
    if chosen is not None:
        place.write_json(CHOICE, chosen)
    _write_proof(place, model, facts.rows)
    hashes = {n: file_hash(place.partial / n) for n in map(str, HASHED)}
    report = report_of(place.run, source, plan, facts, records, hashes)
    place.write_json(REPORT, report)
    source.release()
    verification = verify(place.partial)
    report["verification"] = verification.as_dict()
    report["seconds"] = round(time.time() - facts.started, 1)
    place.write_json(REPORT, report)
    place.write_card(model_card(report))
    place.complete()
    return verification


def _described(model: Model, plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """`quantization_config` for config.json."""
    source = model.source
    written, skipped = source.written, list(source.skipped_linears())
    of_skeleton = {n: plan.recipe.grid_of(n) for n in source.linear_shapes()}
    if format_of(plan) == ct.NAME:
        grids = {n: g for full, g in of_skeleton.items() for n in written.spellings(full)}
        kept = list(dict.fromkeys(n for full in skipped for n in written.spellings(full)))
        return ct.describe(grids, kept, plan.recipe.activations, source.dtype)
    grids = {written.linear(full): g for full, g in of_skeleton.items()}
    skipped = [written.linear(full) for full in skipped]
    kv = None
    if model.kv is not None:
        kv = KVGrid(model.kv, model.key_rotation), attention_patterns(model)
    counts = {e["name"]: e for r in records[1:] for e in r["linears"]}
    return native.describe(
        grids, skipped, source.dtype, input_patterns(model), kv, counts, written.experts
    )


@torch.no_grad()
def _write_proof(place: Workplace, model: Model, rows: Rows) -> None:
    """Logits of the last positions, never rounded between blocks."""
    assert model.streams is not None and model.streams.proof is not None
    hidden = model.streams.proof[:, -_PROOF_POSITIONS:]  # (rows, positions, hidden)
    logits = model.source.in_float32().head(hidden)
    place.write_proof({"ids": proof_ids(rows).contiguous(), "logits": logits.cpu()})
