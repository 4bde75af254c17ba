"""What lies in the directory of an artifact or an export, against its report."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ...errors import LowbitError, VerificationError
from ...formats import gguf
from ...formats.by_name import FORMATS
from ..files import REPORT, file_hash, read_shard, shard_hashes, tensor_hash


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
        raise VerificationError(
            f"'{path}' is not a complete report: damaged, or made by another version of lowbit."
        )
    return data


def check_tensors(folder: Path, report: dict[str, Any]) -> tuple[int, int]:
    """Compare every file and tensor on disk with the hashes in the report, and unpack every linear.

    Returns:
        number of tensors, number of linears.

    Raises:
        VerificationError: naming the tensor that differs, or the file that is missing or
            unreadable.
    """
    for name, digest in report["files"].items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"'{path}' is missing.")
        if file_hash(path) != digest:
            raise VerificationError(f"'{path}' is not what was written: its bytes have changed.")
    if report["format"] == gguf.NAME:
        return _check_gguf(folder, report)
    config, format_ = json.loads((folder / "config.json").read_text()), FORMATS[report["format"]]
    tensors = linears = 0
    for shard, record in report["shards"].items():
        path = folder / shard
        hashes = shard_hashes(path)
        _same_names(path, set(record["tensors"]), set(hashes))
        for name, digest in record["tensors"].items():
            tensors += 1
            if hashes[name] != digest:
                raise VerificationError(
                    f"tensor '{name}' in '{path}' is not what was written: its bytes have changed."
                )
        if file_hash(path) != record["sha256"]:
            raise VerificationError(
                f"the header of '{path}' is not what was written, though its tensors are."
            )
        packed = frozenset(format_.linears(hashes))
        held = read_shard(path, partial(_is_of, packed))
        for linear in sorted(packed):
            linears += 1
            try:
                format_.read(held, linear, config)
            except LowbitError as e:
                raise VerificationError(str(e)) from e
    if linears != sum(1 for entry in report["linears"] if "skipped" not in entry):
        raise VerificationError(
            f"'{folder}' holds {linears} packed linears, its report lists another number."
        )
    return tensors, linears


def numbers_in(folder: Path, report: dict[str, Any]) -> int:
    """How many numbers a runtime makes of an artifact that it decodes.

    Args:
        report: of an artifact whose tensors were checked.
    """
    format_ = FORMATS[report["format"]]
    total = 0
    for entry in report["linears"]:
        if "skipped" not in entry:
            total += math.prod(entry["shape"])
    for shard, record in report["shards"].items():
        packed = frozenset(format_.linears(record["tensors"]))
        with safe_open(folder / shard, "pt") as f:
            for name in record["tensors"]:
                if not _is_of(packed, name):
                    total += math.prod(f.get_slice(name).get_shape())
    return total


def _is_of(linears: Collection[str], tensor: str) -> bool:
    return tensor.rpartition(".")[0] in linears


def _same_names(path: Path, listed: set[str], held: set[str]) -> None:
    for name in sorted(listed ^ held):
        raise VerificationError(
            f"tensor '{name}' is {'missing from' if name in listed else 'unexpected in'} '{path}'."
        )


def _check_gguf(folder: Path, report: dict[str, Any]) -> tuple[int, int]:
    ((name, record),) = report["shards"].items()
    path = folder / name
    try:
        reader = gguf.Reader(path)
    except LowbitError as e:
        raise VerificationError(str(e)) from e
    _same_names(path, set(record["tensors"]), set(reader.entries))
    for tensor, digest in record["tensors"].items():
        if tensor_hash(reader.raw(tensor)) != digest:
            raise VerificationError(
                f"tensor '{tensor}' in '{path}' is not what was written: its bytes have changed."
            )
    if file_hash(path) != record["sha256"]:
        raise VerificationError(
            f"the header of '{path}' is not what was written, though its tensors are."
        )
    packed = [e for e in report["linears"] if "skipped" not in e]
    for entry in packed:
        found = reader.entries.get(entry["tensor"])
        # Those of all experts of a block lie in one tensor.
        if (
            found is None
            or found.kind.name != entry["type"]
            or list(found.shape[-2:]) != entry["shape"]
        ):
            listed = f"the {entry['type']} tensor of shape {entry['shape']} that the report lists"
            raise VerificationError(f"'{entry['tensor']}' in '{path}' is not {listed}.")
    return len(reader.entries), len(packed)
