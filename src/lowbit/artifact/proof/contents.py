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
from ..files import REPORT, file_hash, read_shard, shard_hashes, shard_names, tensor_hash


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
    check_files(folder, report)
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
                format_.look(held, linear, config)
            except LowbitError as e:
                raise VerificationError(str(e)) from e
    _same_number(folder, report, linears)
    return tensors, linears


def check_files(folder: Path, report: dict[str, Any]) -> None:
    """Compare every file but those of weights with the hashes in the report.

    Raises:
        VerificationError: naming the file that differs or is missing.
    """
    for name, digest in report["files"].items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"'{path}' is missing.")
        if file_hash(path) != digest:
            raise VerificationError(f"'{path}' is not what was written: its bytes have changed.")


def check_names(folder: Path, report: dict[str, Any]) -> tuple[int, int]:
    """Compare the headers of files with the report, where all tensors were compared as they were
    written: names, and types and shapes in GGUF.

    Returns:
        number of tensors, number of linears.

    Raises:
        VerificationError: naming what differs.
    """
    if report["format"] == gguf.NAME:
        _, reader = _same_entries(folder, report)
        return len(reader.entries), sum("skipped" not in e for e in report["linears"])
    format_ = FORMATS[report["format"]]
    tensors = linears = 0
    for shard, record in report["shards"].items():
        names = shard_names(folder / shard)
        _same_names(folder / shard, set(record["tensors"]), names)
        tensors, linears = tensors + len(names), linears + len(format_.linears(names))
    _same_number(folder, report, linears)
    return tensors, linears


def _same_number(folder: Path, report: dict[str, Any], linears: int) -> None:
    if linears != sum(1 for entry in report["linears"] if "skipped" not in entry):
        raise VerificationError(
            f"'{folder}' holds {linears} packed linears, its report lists another number."
        )


def numbers_in(folder: Path, report: dict[str, Any]) -> int:
    """How many numbers a runtime makes of an artifact that it decodes.

    Args:
        report: of an artifact whose tensors were checked.
    """
    if report["format"] == gguf.NAME:
        entries = gguf.Reader(folder / report["gguf"]["file"]).entries.values()
        return sum(math.prod(e.shape) for e in entries)
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
    (record,) = report["shards"].values()
    path, reader = _same_entries(folder, report)
    for tensor, digest in record["tensors"].items():
        if tensor_hash(reader.raw(tensor)) != digest:
            raise VerificationError(
                f"tensor '{tensor}' in '{path}' is not what was written: its bytes have changed."
            )
    if file_hash(path) != record["sha256"]:
        raise VerificationError(
            f"the header of '{path}' is not what was written, though its tensors are."
        )
    return len(reader.entries), sum("skipped" not in e for e in report["linears"])


def _same_entries(folder: Path, report: dict[str, Any]) -> tuple[Path, gguf.Reader]:
    """The GGUF file of an export, opened, its table found to be the one that the report has."""
    ((name, record),) = report["shards"].items()
    path = folder / name
    try:
        reader = gguf.Reader(path)
    except LowbitError as e:
        raise VerificationError(str(e)) from e
    _same_names(path, set(record["tensors"]), set(reader.entries))
    for entry in report["linears"]:
        if "skipped" in entry:
            continue
        found = reader.entries.get(entry["tensor"])
        # Those of all experts of a block lie in one tensor.
        if (
            found is None
            or found.kind.name != entry["type"]
            or list(found.shape[-2:]) != entry["shape"]
        ):
            listed = f"the {entry['type']} tensor of shape {entry['shape']} that the report lists"
            raise VerificationError(f"'{entry['tensor']}' in '{path}' is not {listed}.")
    return path, reader
