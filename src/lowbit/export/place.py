"""The directory of an export: made beside or inside its final place, published when everything is
in it and verified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact.card import model_card
from ..artifact.disk import copy_atomic, disk, write_atomic
from ..artifact.files import (
    CARD,
    INDEX,
    NOTES,
    PROOF,
    RECIPE,
    REPORT,
    file_hash,
    read_shard,
    same_bytes,
    save_shard,
)
from ..artifact.hashing import Hashing
from ..artifact.output import Output
from ..artifact.proof import Verification, verify
from ..errors import VerificationError
from ..model.checkpoint import Stored
from .source import Source

_RUN = {REPORT, "config.json", INDEX, CARD}  # of the source: written anew, or not


class Place:
    """What is being written.

    Attributes:
        partial: the directory meanwhile. hashing: beside the writing. report: what becomes its
            report.json; that of the source to begin with.
    """

    def __init__(self, partial: Path, source: Source, hashing: Hashing) -> None:
        self.partial, self.hashing = partial, hashing
        # A run is what `quantize` would go on with.
        kept = {k: v for k, v in source.report.items() if k not in ("run", "verification")}
        self.report = {**kept, "shards": {}, "exported_from": source.report["hash"]}
        self._files: list[str] = []
        self._missing = 0  # parameters that are left out
        self._weight_map: dict[str, str] = {}
        self._hashed: _Hashed | None = None  # the last file, while it is

    def take(self, source: Source, name: str) -> dict[str, Tensor]:
        """Take a file of weights over as it is; what is read back from it.

        Raises:
            VerificationError: it is not what the source's report says.
        """
        path, record = self.partial / name, source.report["shards"][name]
        copy_atomic(source.folder / name, path)
        if self.hashing.file(path).result() != record["sha256"]:
            raise VerificationError(f"'{source.folder / name}' is not what was written.")
        source.proved.add(name)
        self._note(name, {k: record[k] for k in ("sha256", "bytes", "tensors")})
        return read_shard(path)

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write a safetensors file; what is read back from it, which was found to be the same.

        Raises:
            VerificationError: it is not, by the disk's fault.
        """
        save_shard(self.partial / name, tensors)
        held = read_shard(self.partial / name)
        for key, t in tensors.items():
            if not same_bytes(t, held[key]):
                raise VerificationError(f"'{key}' read back from disk differs from what was made.")
        self._list(name, list(held))
        return held

    def _list(self, name: str, tensors: Sequence[str]) -> None:
        """Hash a file beside what follows; no more than one is in the queue."""
        self._settled()
        path = self.partial / name
        self._hashed = _Hashed(
            name, path, tensors, self.hashing.file(path), self.hashing.shard(path)
        )

    def _settled(self) -> None:
        """Note the file that is being hashed, once it is."""
        if self._hashed is not None:
            self._note(self._hashed.name, self._hashed.record())
            self._hashed = None

    def _note(self, name: str, record: Mapping[str, Any]) -> None:
        self.report["shards"][name] = record
        self._weight_map.update(dict.fromkeys(record["tensors"], name))

    def add_gguf(self, name: str, record: Mapping[str, Any]) -> None:
        """List a GGUF file that is there already.

        Args:
            record: what the report says of it: "sha256", "bytes", and the hashes of "tensors".
        """
        self.report["shards"][name] = record

    def leave_out(self, tensors: Mapping[str, Stored], why: str) -> None:
        """Say of tensors that the source has a copy of that this export has none; its bits are
        counted without them.
        """
        gone = dict.fromkeys(tensors, why)
        self._missing += sum(t.numel for t in tensors.values())
        self.report["copied"] = {
            n: r for n, r in self.report.get("copied", {}).items() if n not in gone
        }
        self.report["left_out"] = {**self.report.get("left_out", {}), **gone}

    def copy(self, source: Path, name: str) -> None:
        """Take a file over."""
        with disk(self.partial / name):
            (self.partial / name).parent.mkdir(exist_ok=True)
        copy_atomic(source / name, self.partial / name)

    def write(self, name: str, data: Any) -> None:
        """A JSON file."""
        write_atomic(self.partial / name, (json.dumps(data, indent=1) + "\n").encode())
        self._files.append(name)

    def write_index(self) -> None:
        """The index of all safetensors files added."""
        self._settled()
        total = sum(s["bytes"] for s in self.report["shards"].values())
        self.write(INDEX, {"metadata": {"total_size": total}, "weight_map": self._weight_map})

    def close(
        self, format_: str, linears: Mapping[str, Mapping[str, Any]], python: str
    ) -> Verification:
        """Write the report, check the directory's headers against it and what its runtime computes,
        and write the model card.

        Args:
            linears: what is known of each linear in this format, by full name. python: interpreter
                that has the runtime.
        """
        size, before = sum(s["bytes"] for s in self.report["shards"].values()), self.report["size"]
        entries = [{**e, **linears.get(e["name"], {})} for e in self.report["linears"]]
        packed = [e for e in entries if "skipped" not in e]
        parameters = round(8 * before["after"] / before["model_bits_per_weight"]) - self._missing
        digest = hashlib.sha256(
            "".join(s["sha256"] for s in self.report["shards"].values()).encode()
        ).hexdigest()
        self.report |= {
            "format": format_,
            "hash": digest,
            "size": {
                **before,
                "after": size,
                "model_bits_per_weight": 8 * size / parameters,
                "bits_per_weight": 8
                * sum(e["bytes"] for e in packed)
                / sum(e["shape"][0] * e["shape"][1] for e in packed),
            },
            "files": {
                n: file_hash(self.partial / n)
                for n in sorted({*self._files, RECIPE, PROOF.as_posix()})
            },
            "linears": entries,
        }
        self._store()
        done = verify(self.partial, python=python, tensors=False)
        self.report["verification"] = done.as_dict()
        self._store()
        write_atomic(self.partial / CARD, model_card(self.report).encode())
        return done

    def _store(self) -> None:
        write_atomic(self.partial / REPORT, (json.dumps(self.report, indent=1) + "\n").encode())


@dataclass(frozen=True)
class _Hashed:
    """A file while it is hashed."""

    name: str
    path: Path
    tensors: Sequence[str]
    sha256: Future[str]
    hashes: Future[dict[str, str]]

    def record(self) -> dict[str, Any]:
        """What the report says of it."""
        hashes = self.hashes.result()
        return {
            "sha256": self.sha256.result(),
            "bytes": self.path.stat().st_size,
            "tensors": {name: hashes[name] for name in self.tensors},
        }


@contextmanager
def place(source: Source, output: Output, *, carry: bool = True) -> Iterator[Place]:
    """A directory to fill, which gets its name when the block ends.

    Args:
        output: claimed. carry: take over what else lies beside the weights, tokenizer and the like.

    Raises:
        LowbitError: the file system refuses.
    """
    with Hashing() as hashing, disk(output.partial):
        made = Place(output.partial, source, hashing)
        _carried(made, source, carry)
        yield made
    output.publish()


def _carried(made: Place, source: Source, carry: bool) -> None:
    """Copy what is taken over besides weights."""
    made.copy(source.folder, RECIPE)
    made.copy(source.folder, PROOF.as_posix())
    taken = (*_RUN, RECIPE, *source.report["shards"], *NOTES)
    carried = source.report.get("carried", [])
    inside = [n for n in carried if "/" in n and (source.folder / n).is_file()]
    beside = [
        p.name
        for p in source.folder.iterdir()
        if p.is_file() and not any(fnmatch(p.name, n) for n in taken)
    ]
    for name in sorted([*beside, *inside]) if carry else ():
        made.copy(source.folder, name)
    if not carry:
        made.report["carried"] = []
        made.report["left_out"] = {
            **source.report.get("left_out", {}),
            **dict.fromkeys(carried, "no part of this format"),
        }
