"""The directory of an export: OUT.partial until everything is in it and verified, then OUT."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact import CARD, INDEX, PROOF, RECIPE, REPORT, file_hash, read_shard, save_shard, tensor_hash, write_atomic
from ..card import model_card
from ..errors import LowbitError
from ..formats.gguf import Reader
from ..proof import Verification, verify
from .source import Source

_RUN = {REPORT, "config.json", INDEX, CARD}  # of the source: written anew, or not


class Place:
    """What is being written.

    Attributes:
        partial: the directory meanwhile. report: what becomes its report.json; that of the source to begin with.
    """

    def __init__(self, partial: Path, source: Source) -> None:
        self.partial = partial
        kept = {k: v for k, v in source.report.items() if k not in ("run", "verification")}  # a run is what `quantize` would go on with
        self.report = {**kept, "shards": {}, "exported_from": source.report["hash"]}
        self._files: list[str] = []
        self._weight_map: dict[str, str] = {}

    def take(self, source: Source, name: str) -> None:
        """Take a file of weights over as it is."""
        shutil.copyfile(source.folder / name, self.partial / name)
        self._list(name, source.report["shards"][name]["tensors"])

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a safetensors file; what is read back from it."""
        save_shard(self.partial / name, tensors)
        held = read_shard(self.partial / name)
        self._list(name, {k: tensor_hash(t) for k, t in held.items()})
        return held

    def add_gguf(self, name: str) -> None:
        """List a GGUF file that is there already, by what is read back from it."""
        path = self.partial / name
        reader = Reader(path)
        hashes = {k: tensor_hash(reader.raw(k)) for k in reader.entries}
        self.report["shards"][name] = {"sha256": file_hash(path), "bytes": path.stat().st_size, "tensors": hashes}

    def _list(self, name: str, hashes: Mapping[str, str]) -> None:
        path = self.partial / name
        self.report["shards"][name] = {"sha256": file_hash(path), "bytes": path.stat().st_size, "tensors": dict(hashes)}
        self._weight_map.update(dict.fromkeys(hashes, name))

    def leave_out(self, names: Iterable[str], why: str) -> None:
        """Say of tensors that the source has a copy of that this export has none."""
        gone = dict.fromkeys(names, why)
        self.report["copied"] = {n: r for n, r in self.report.get("copied", {}).items() if n not in gone}
        self.report["left_out"] = {**self.report.get("left_out", {}), **gone}

    def copy(self, source: Path, name: str) -> None:
        """Take a file over."""
        (self.partial / name).parent.mkdir(exist_ok=True)
        write_atomic(self.partial / name, (source / name).read_bytes())

    def write(self, name: str, data: Any) -> None:
        """A JSON file."""
        write_atomic(self.partial / name, (json.dumps(data, indent=1) + "\n").encode())
        self._files.append(name)

    def write_index(self) -> None:
        """The index of all safetensors files added."""
        total = sum(s["bytes"] for s in self.report["shards"].values())
        self.write(INDEX, {"metadata": {"total_size": total}, "weight_map": self._weight_map})

    def close(self, format_: str, linears: Mapping[str, Mapping[str, Any]], python: str) -> Verification:
        """Write the report, check the directory against it, and write the model card.

        Args:
            linears: what is known of each linear in this format, by full name. python: interpreter that has the runtime.
        """
        size, before = sum(s["bytes"] for s in self.report["shards"].values()), self.report["size"]
        entries = [{**e, **linears.get(e["name"], {})} for e in self.report["linears"]]
        packed = [e for e in entries if "skipped" not in e]
        digest = hashlib.sha256("".join(s["sha256"] for s in self.report["shards"].values()).encode()).hexdigest()
        self.report |= {
            "format": format_, "hash": digest,
            "size": {**before, "after": size, "model_bits_per_weight": before["model_bits_per_weight"] * size / before["after"],
                     "bits_per_weight": 8 * sum(e["bytes"] for e in packed) / sum(e["shape"][0] * e["shape"][1] for e in packed)},
            "files": {n: file_hash(self.partial / n) for n in sorted({*self._files, RECIPE, PROOF.as_posix()})},
            "linears": entries,
        }  # fmt: skip
        self._store()
        done = verify(self.partial, python=python)
        self.report["verification"] = done.as_dict()
        self._store()
        write_atomic(self.partial / CARD, model_card(self.report).encode())
        return done

    def _store(self) -> None:
        write_atomic(self.partial / REPORT, (json.dumps(self.report, indent=1) + "\n").encode())


@contextmanager
def place(source: Source, out: Path, *, carry: bool = True) -> Iterator[Place]:
    """A directory to fill, which gets its name when the block ends and vanishes if it does not.

    Args:
        carry: take over what else lies beside the weights, tokenizer and the like.

    Raises:
        LowbitError: OUT exists and is not empty, OUT.partial is there, or the file system refuses.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LowbitError(f"'{out}' exists and is not empty. Choose another -o, or remove it first.")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise LowbitError(f"'{partial}' exists, left by an export that was interrupted, or not ours. Remove it first.")
    try:
        partial.mkdir(parents=True)
        made = Place(partial, source)
        made.copy(source.folder, RECIPE)
        made.copy(source.folder, PROOF.as_posix())
        taken = {*_RUN, RECIPE, *source.report["shards"]}
        for path in sorted(p for p in source.folder.iterdir() if carry and p.is_file() and p.name not in taken):
            made.copy(source.folder, path.name)
        yield made
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise LowbitError(f"cannot write '{partial}': {e.strerror or e}.") from e
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
