"""The directory of a run in progress: written shard by shard, resumed from what is whole in it,
published when complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact.disk import copy_atomic, disk, write_atomic
from ..artifact.files import (
    CARD,
    NOTES,
    POLISHED,
    PROOF,
    REPORT,
    STATE,
    file_hash,
    raw_hash,
    save_shard,
    shard_hashes,
    shard_name,
    tensor_hash,
)
from ..artifact.lock import LOCK
from ..artifact.output import INSIDE, Output
from ..artifact.tree import MOVING, entries
from ..errors import LowbitError
from ..model.checkpoint import Checkpoint
from ..model.ranks import ALONE, Ranks
from ..model.raw import Raw

RESUMES = (STATE, "shard-*.json")  # what tells that a directory is an unfinished run
_DIFFERENCES = {  # of a run's fingerprint, in words
    "bfloat16_steps": "tuning steps in bfloat16: {} there, {} here (by the processor, where "
    "tesseraq.precision is auto)",
    "experts": "experts computed by '{}' in its steps of tuning where this run's are by '{}' "
    "(LOWBIT_EXPERTS says by which)",
    "rounding": "soft rounding by '{}' where this run's is by '{}' (by the machine, where "
    "LOWBIT_ROUNDING does not say which)",
    "versions": "other versions of its libraries ({} there, {} here)",
    "compute": "arithmetic in {} where this run's is in {} (by --dtype, else by the machine)",
}


class Workplace:
    """What a run has written so far.

    Attributes:
        done: the output holds the finished artifact of this very run already.
        partial: the directory meanwhile.

    Args:
        output: the final directory and the one meanwhile, claimed by rank 0.
        fingerprint: everything that decides the bytes; a resume must match it.
        shards: number of shards, the one for the tensors outside the blocks included.
        ranks: the processes that share the run. Rank 0 alone writes; all see the directory, and
            call what is here alike.

    Raises:
        LowbitError: the output holds something else, or another unfinished run; its file system
            refuses.
    """

    def __init__(
        self, output: Output, fingerprint: Mapping[str, Any], shards: int, ranks: Ranks = ALONE
    ) -> None:
        self.output, self.shards, self.ranks = output, shards, ranks
        self.partial = output.partial
        state = json.dumps(fingerprint, indent=1, sort_keys=True)
        self.run = hashlib.sha256(state.encode()).hexdigest()
        self.done: bool
        self.done, self.partial = ranks.broadcast(
            (self._entered(state), output.partial) if ranks.first else None
        )

    # --- found ------------------------------------------------------------------------------------

    def _entered(self, state: str) -> bool:
        """Find the directory as this run left it, or begin; whether the run is finished."""
        output = self.output
        if output.lock is None:
            if not self._is_finished(output.folder):
                raise LowbitError(
                    f"'{output.given}' exists and is not empty. Choose another -o, or remove it "
                    "first."
                )
            self._tidy()
            return True
        if output.is_moving and self._is_finished(self.partial):
            self.complete()
            return True
        path = self.partial / STATE
        old, new = _read(path), json.loads(state)
        if old is None or not _comparable(old, new):
            self._must_be_own(path)
            write_atomic(path, state.encode())
        else:
            self._must_match(old, new)
        with disk(self.partial):
            for leftover in self.partial.glob("*.tmp"):
                leftover.unlink()
        return False

    def _is_finished(self, folder: Path) -> bool:
        report = _read(folder / REPORT)
        return report is not None and report.get("run") == self.run

    def _must_match(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        different = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        # What one of the two does not have at all follows from another difference.
        both = [k for k in different if None not in (old.get(k), new.get(k))]
        if different:
            told = [
                _DIFFERENCES.get(k, f"another {k} than this one").format(old.get(k), new.get(k))
                for k in both or different
            ]
            raise LowbitError(
                f"'{self.partial}' holds an unfinished run with {', and '.join(told)}. Repeat that "
                "command, on such a machine, to finish it, "
                "or remove the directory to start anew."
            )

    def _must_be_own(self, state: Path) -> None:
        """Refuse what was left without a readable fingerprint, unless its records say that this run
        left it.
        """
        notes = [_read(p) for p in sorted(self.partial.glob("shard-*.json"))]
        runs = {note.get("run") for note in notes if note is not None}
        others = [
            n for n in entries(self.partial) if n not in (STATE, MOVING) and not n.endswith(".tmp")
        ]
        if others and runs != {self.run}:
            raise LowbitError(
                f"'{state}' is missing or damaged, and what else is there does not say that this "
                f"run left it. Remove '{self.partial}' to "
                "start anew, or choose another -o."
            )

    # --- shards -----------------------------------------------------------------------------------

    def shard(self, number: int) -> Path:
        """Path of a shard: 0 is the one outside the blocks, i + 1 belongs to block i."""
        return self.partial / shard_name(number, self.shards)

    def _note(self, number: int) -> Path:
        return self.partial / f"shard-{number:05d}.json"

    def finished(self, number: int) -> dict[str, Any] | None:
        """The record of a shard that an earlier run completed, its bytes checked; None if it has to
        be made.
        """
        found: dict[str, Any] | None = self.ranks.broadcast(
            self._finished(number) if self.ranks.first else None
        )
        return found

    def _finished(self, number: int) -> dict[str, Any] | None:
        record = self._noted(number)
        if record is None or not self.shard(number).is_file():
            return None
        with disk(self.shard(number)):
            return record if file_hash(self.shard(number)) == record["sha256"] else None

    def _noted(self, number: int) -> dict[str, Any] | None:
        """The record of a shard as it was written by this run; None if there is none, or it is
        damaged.
        """
        note = _read(self._note(number))
        if (
            note is None
            or note.get("run") != self.run
            or note.get("sha256") != _digest(note.get("record"))
        ):
            return None
        record = note.get("record")
        return record if isinstance(record, dict) else None

    def agree(self, name: str, tensors: Mapping[str, Tensor | Raw]) -> None:
        """Compare what is to be written with what other ranks have.

        Args:
            name: of the block, for the error.

        Raises:
            LowbitError: they have other tensors.
        """
        if self.ranks.size > 1:
            made = {
                name: raw_hash(t) if isinstance(t, Raw) else tensor_hash(t.cpu())
                for name, t in tensors.items()
            }
            self.ranks.agree(
                f"'{name}' as tuned",
                made,
                "Do all have the same kind of device and the same libraries?",
            )

    def finish(
        self,
        number: int,
        tensors: Mapping[str, Tensor | Raw],
        record: Mapping[str, Any],
        check: Callable[[Path], None],
    ) -> dict[str, Any]:
        """Write a shard that ranks agree on, let ``check`` look at the file, then write its record
        with the hashes of what lies there.

        Without its record a shard does not count as finished: a resume makes it again.
        """
        if not self.ranks.first:
            return dict(record)
        path = self.shard(number)
        save_shard(path, tensors)
        check(path)
        full = {
            **record,
            "shard": path.name,
            "sha256": file_hash(path),
            "bytes": path.stat().st_size,
            "tensors": shard_hashes(path),
        }
        self.note(number, full)
        return full

    def note(self, number: int, record: Mapping[str, Any]) -> None:
        """Write the record of a shard that lies there."""
        note = {"run": self.run, "sha256": _digest(record), "record": dict(record)}
        write_atomic(self._note(number), json.dumps(note).encode())

    # --- what was done to all of them -------------------------------------------------------------

    def polished(self) -> dict[str, Any] | None:
        """What was noted of the polish of an earlier run, if all shards are as it left them."""
        found = None
        if self.ranks.first:
            note = _read(self.partial / POLISHED)
            if note is not None and note.get("sha256") == _digest(self._polish_of(note)):
                found = note["record"]
        told: dict[str, Any] | None = self.ranks.broadcast(found)
        return told

    def note_polished(self, record: Mapping[str, Any]) -> None:
        """Note that all shards are polished, once all ranks are done."""
        self.ranks.broadcast(None)
        if self.ranks.first:
            note: dict[str, Any] = {"record": dict(record)}
            note["sha256"] = _digest(self._polish_of(note))
            write_atomic(self.partial / POLISHED, json.dumps(note).encode())

    def _polish_of(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """A note with what it is about."""
        shards = [(self._noted(n) or {}).get("sha256") for n in range(self.shards)]
        return {"run": self.run, "record": note.get("record"), "shards": shards}

    def kept(self) -> str:
        """A sentence on what an interruption leaves, for the user."""
        if self._is_finished(self.output.folder):
            return f"'{self.output.given}' is finished: the same command verifies it."
        count = sum(self._noted(n) is not None for n in range(1, self.shards))
        if not count:
            return "No block is finished yet: the same command starts again."
        blocks = self.shards - 1
        return (
            f"{count} of {blocks} blocks {'is' if count == 1 else 'are'} finished and kept in "
            f"'{self.partial}': the same command continues."
        )

    # --- the rest ---------------------------------------------------------------------------------

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of the artifact."""
        write_atomic(self.partial / name, (json.dumps(data, indent=1) + "\n").encode())

    def write_proof(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the sample of tokens and logits that `lowbit verify` compares with."""
        save_shard(self.partial / PROOF, tensors)

    def write_card(self, text: str) -> None:
        """Write README.md, unless there is one: somebody else's words, or this text from a run that
        was stopped at its very end.
        """
        if not (self.partial / CARD).exists():
            write_atomic(self.partial / CARD, text.encode())

    def carry(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """Copy files of the original model, byte for byte, such as its tokenizer."""
        for name in names:
            path = checkpoint.file(name)
            if path is None:
                raise LowbitError(
                    f"'{name}' of '{checkpoint.name}' has gone while it was quantized. Put it back "
                    "and run the same command."
                )
            with disk(self.partial / name):
                (self.partial / name).parent.mkdir(exist_ok=True)
            copy_atomic(path, self.partial / name)

    def complete(self) -> None:
        """Give the directory its final place, then drop the working notes: killed in between, it is
        finished all the same.
        """
        self.output.publish(NOTES)
        self._tidy()

    def _tidy(self) -> None:
        """Remove from the finished directory what a run notes while it works."""
        folder = self.output.folder
        with disk(folder):
            notes = (self._note(n).name for n in range(self.shards))
            for name in (STATE, MOVING, POLISHED, *notes):
                (folder / name).unlink(missing_ok=True)
            if self.output.lock is None:  # of a run that was killed while it tidied
                (folder / LOCK).unlink(missing_ok=True)
                shutil.rmtree(folder / INSIDE, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is none, or it is damaged.

    Raises:
        LowbitError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as e:
        raise LowbitError(f"cannot read '{path}': {e.strerror or e}.") from e
    return found if isinstance(found, dict) else None


def _comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a fingerprint is whole: another version of this library may have had other keys."""
    return "versions" in old and (set(old) == set(new) or old["versions"] != new["versions"])


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
