"""What report.json says of a run: where the model comes from, and each block that has been
quantized.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..artifact.card import terms_of
from ..artifact.files import CARD, Named
from ..errors import LowbitError
from ..formats.packing import counts, local_tensors
from ..grid import Coded, GroupedGrid
from ..grid.names import scheme_name
from ..machine import peak_memory, reserved_memory
from ..model.block import Block
from ..model.checkpoint import Checkpoint, Stored
from ..model.linear_errors import linear_errors
from ..names import hub_id


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the model comes from, as far as a model card tells: its hub id, also of a snapshot in
    the hub's cache, its license if its own card names one, and what its weights were if they were
    no floats.
    """
    try:
        readme = checkpoint.file(CARD)
    except LowbitError:  # the model itself was reached: not worth stopping for
        readme = None
    folder = checkpoint.folder
    hub = (
        checkpoint.name if folder is None else hub_id(folder.absolute()) or hub_id(folder.resolve())
    )
    said = {"weights": list(checkpoint.remarks)} if checkpoint.remarks else {}
    return {"hub": hub, "license": terms_of(readme), **said}


def block_record(block: Block, seconds: float, named: Named) -> dict[str, Any]:
    """What the report says of a finished block and of each of its linears, but for their bytes.

    Args:
        seconds: that it took. named: full name of a linear -> its name in files.
    """
    linears, errors = [], linear_errors(block)
    for name, q in block.coded.items():
        full = named(f"{block.name}.{name}")
        assert full is not None
        error = errors[name]
        linears.append(
            {
                "name": full,
                "scheme": scheme_name(q.grid),
                "shape": list(q.codes.shape),
                "bytes": 0,  # until it is packed
                "bits_per_weight": 0.0,
                "moved": _moved(block, name, q),
                "error_nearest": error.nearest,
                "error": error.tuned,
                **counts(q),
            }
        )
    return {
        "name": block.name,
        "linears": linears,
        "seconds": round(seconds, 3),
        **_peaks(block),
        **block.notes,
    }


def with_bytes(record: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The record of a block with the bytes of its linears.

    Args:
        tensors: as packed, by their names in files.
    """
    linears = []
    for entry in record["linears"]:
        stored = sum(t.nbytes for t in local_tensors(tensors, entry["name"]).values())
        bits = 8 * stored / math.prod(entry["shape"])
        linears.append({**entry, "bytes": stored, "bits_per_weight": bits})
    return {**record, "linears": linears}


def sizes(
    before: int,
    stored: Mapping[str, Stored],
    left_out: Container[str],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Bytes of the model before and after, and bits per weight counted from them.

    Args:
        before: of the original's tensors in its files. stored: these tensors as they are read.
        left_out: names of its tensors that the artifact has no copy of.
        records: of the shards, that outside the blocks first.
    """
    linears = [e for r in records[1:] for e in r["linears"]]
    after = sum(r["bytes"] for r in records)
    kept = [t for n, t in stored.items() if n not in left_out]
    of_linears = sum(e["bytes"] for e in linears)
    return {
        "before": before,
        "after": after,
        "bits_per_weight": 8 * of_linears / sum(math.prod(e["shape"]) for e in linears),
        "model_bits_per_weight": 8 * after / sum(t.numel for t in kept),
    }


def _peaks(block: Block) -> dict[str, int]:
    """Bytes, of the rank that needs most; on an accelerator those of this block, and reserved."""
    found = {"peak_memory": peak_memory(block.device)}
    reserved = reserved_memory(block.device)
    if reserved is not None:
        found["reserved_memory"] = reserved
    most = torch.tensor(list(found.values()), dtype=torch.int64)
    block.ranks.max_(most)
    return dict(zip(found, most.tolist(), strict=True))


def _moved(block: Block, linear: str, q: Coded) -> float:
    """The share of codes that are not the nearest ones to the weight on its range before scales
    were tuned.
    """
    # Only groups have a range: levels have no others to compare with.
    params = block.range_of(linear) if isinstance(q.grid, GroupedGrid) else q.params
    nearest: Tensor = q.grid.encode(block.weight(linear), params)
    return float((q.codes != nearest).double().mean())
