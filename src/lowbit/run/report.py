"""report.json of an artifact, from what a run knows. `record` has the parts of single blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..formats import compressed_tensors as ct
from ..formats import native
from ..model.calibration import Rows
from ..model.carried import SourceFiles
from ..model.stream import ModelStream
from ..model.wrapper import class_for, is_wrapper
from ..plan import Plan
from ..plan.memory import Offload
from .identity import Original, own_version, versions
from .record import sizes

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a report says of a run besides its plan, its model and its shards.

    Attributes:
        command: words of a command that makes the same artifact. source: where the model is from.
        original: its files, hashed. files: those that go along, and those that do not.
        rows: the calibration. seed, ranks, offload: as they were.
        quality: on held-out text, None without any. polish: what is said of it, None without any.
        started: when, in seconds since the epoch.
    """

    command: Sequence[str]
    source: Mapping[str, Any]
    original: Original
    files: SourceFiles
    rows: Rows
    seed: int
    ranks: int
    offload: Offload
    quality: Mapping[str, Any] | None
    polish: Mapping[str, Any] | None
    started: float


def format_of(plan: Plan) -> str:
    """The format in which the artifact is written."""
    return native.NAME if plan.beyond else ct.NAME


def report_of(
    run: str,
    source: ModelStream,
    plan: Plan,
    facts: Facts,
    records: Sequence[Record],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """The report, verification not yet in it.

    Args:
        run: its fingerprint's hash. source: the model as its stages left it.
        records: of the shards, that outside the blocks first.
        hashes: of the artifact's other files that decide what is loaded.
    """
    whole = source.whole_config
    own = ("tensors", "sha256", "bytes", "linears")  # of a record, said elsewhere
    skipped = {source.written.linear(n): why for n, why in source.skipped_linears().items()}
    linears = [e for r in records[1:] for e in r["linears"]]
    shards = {r["shard"]: {k: r[k] for k in ("sha256", "bytes", "tensors")} for r in records}
    digest = hashlib.sha256("".join(s["sha256"] for s in shards.values()).encode()).hexdigest()
    return {
        "lowbit": own_version(),
        "run": run,
        "versions": versions(),
        "model": source.checkpoint.name,
        "source": facts.source,
        "command": list(facts.command),
        "original": facts.original.as_dict(),
        "recipe": plan.recipe.as_dict(),
        "format": format_of(plan),
        **({"class": class_for(whole).__name__} if is_wrapper(whole) else {}),
        "beyond_compressed_tensors": plan.beyond,
        "calibration": _calibration(facts.rows),
        "seed": facts.seed,
        "ranks": facts.ranks,
        "device": str(source.device),
        "compute": str(source.compute),
        "offload": asdict(facts.offload),
        "hash": digest,
        "size": sizes(source.checkpoint.nbytes, source.stored, source.outer.left_out, records),
        "quality": facts.quality,
        **({} if facts.polish is None else {"polish": dict(facts.polish)}),
        "blocks": [{k: v for k, v in r.items() if k not in own} for r in records[1:]],
        "copied": source.copied(),
        "carried": list(facts.files.carried),
        "left_out": {**source.outer.left_out, **facts.files.left_out},
        "remarks": list(source.remarks),
        "files": dict(hashes),
        "linears": linears + [{"name": n, "skipped": why} for n, why in skipped.items()],
        "shards": shards,
    }


def _calibration(rows: Rows) -> dict[str, Any]:
    said = {
        "source": rows.source,
        "samples": len(rows.calibration),
        "length": rows.calibration.shape[1],
        "sha256": rows.sha256,
    }
    return {**said, "conversations": rows.conversations} if rows.conversations else said
