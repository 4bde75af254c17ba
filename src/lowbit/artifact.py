"""The artifact's directory: written shard by shard under a working name, resumed from it, renamed when it is complete."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import LowbitError, VerificationError
from .formats.packing import local_tensors, pack, unpack
from .grid import Grid, QTensor
from .model.block import Block
from .model.checkpoint import Checkpoint
from .model.ranks import ALONE, Ranks

REPORT = "report.json"
CARD = "README.md"
RECIPE = "recipe.toml"
PROOF = Path("proof") / "logits.safetensors"
INDEX = "model.safetensors.index.json"
HASHED = ("config.json", INDEX, RECIPE, PROOF.as_posix())  # files that decide what is loaded or compared, besides the shards
_STATE = "run.json"
NOTES = (_STATE, "shard-*.json", "*.tmp")  # of a run at work; gone from a finished directory, unless it was killed while tidying


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what a file system refuses into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        full = getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e) or "os error 28" in str(e)
        if full:
            raise LowbitError(f"no space left on disk while writing '{path}'. Free some and run the same command: it will continue.") from e
        raise LowbitError(f"cannot write '{path}': {getattr(e, 'strerror', None) or e}.") from e


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it.

    Raises:
        LowbitError: the file system refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with _disk(path):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, then rename it. Raises LowbitError if the file system refuses."""
    temporary = path.with_name(path.name + ".tmp")
    with _disk(path):
        path.parent.mkdir(exist_ok=True)
        try:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            temporary.chmod(0o666 & ~_umask())  # the writer makes files that only their owner can read
            os.replace(temporary, path)
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tensor_hash(t: Tensor) -> str:
    """sha256 over dtype, shape and bytes, the first 32 hex digits."""
    h = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode())
    flat = t.reshape(-1)
    if flat.stride(0) != 1:  # also of a single element, whose stride says nothing
        flat = flat.clone(memory_format=torch.contiguous_format)
    h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()[:32]


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            h.update(chunk)
    return h.hexdigest()


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard.

    Raises:
        VerificationError: the file is missing or not readable.
    """
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise VerificationError(f"'{path}' is missing or not a readable safetensors file: {e}") from e


_DIFFERENCES = {  # of a run's fingerprint, in words
    "bfloat16_steps": "tuning steps in bfloat16: {} there, {} here (by the processor, where tesseraq.precision is auto)",
    "versions": "other versions of its libraries ({} there, {} here)",
    "compute": "arithmetic in {} where this machine's device has {}",
}


class Workplace:
    """The directory of a run in progress: OUT.partial until everything is in it and verified, then OUT.

    Attributes:
        done: OUT holds the finished artifact of this very run already.

    Args:
        out: the final directory.
        fingerprint: everything that decides the bytes; a resume must match it.
        shards: number of shards, the one for the tensors outside the blocks included.
        ranks: the processes that share the run. Rank 0 alone writes; all see the directory, and call what is here alike.

    Raises:
        LowbitError: OUT exists and is not empty, cannot be written, or OUT.partial belongs to another run.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], shards: int, ranks: Ranks = ALONE) -> None:
        self.out, self.shards, self.ranks = out, shards, ranks
        self.partial = out.with_name(out.name + ".partial")
        state = json.dumps(fingerprint, indent=1, sort_keys=True)
        self.run = hashlib.sha256(state.encode()).hexdigest()
        self.done: bool = ranks.told(self._entered(state) if ranks.first else None)

    def _entered(self, state: str) -> bool:
        """Make the directory or find it as this run left it; whether the run is finished."""
        out = self.out
        if self._is_finished():
            with _disk(out):
                self._tidy(out)
            return True
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise LowbitError(f"'{out}' exists and is not empty. Choose another -o, or remove it first.")
        with _disk(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
        found = self.partial / _STATE
        if found.is_file():
            self._must_match(json.loads(found.read_text()), json.loads(state))
        elif any(p.suffix != ".tmp" for p in self.partial.iterdir()):
            raise LowbitError(f"'{self.partial}' holds files that no unfinished run of lowbit left there. Remove it, or choose another -o.")
        else:
            write_atomic(found, state.encode())
        for leftover in self.partial.glob("*.tmp"):
            leftover.unlink()
        return False

    def _is_finished(self) -> bool:
        report = self.out / REPORT
        try:
            found = json.loads(report.read_text()) if report.is_file() else None
            return isinstance(found, dict) and found.get("run") == self.run
        except (OSError, ValueError):
            return False

    def _tidy(self, folder: Path) -> None:
        for number in range(self.shards):
            (folder / self._note(number).name).unlink(missing_ok=True)
        (folder / _STATE).unlink(missing_ok=True)

    def _must_match(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        different = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if different:
            told = [_DIFFERENCES.get(k, f"another {k} than this one").format(old.get(k), new.get(k)) for k in different]
            raise LowbitError(
                f"'{self.partial}' holds an unfinished run with {', and '.join(told)}. Repeat that command, on such a machine, to finish it, "
                "or remove the directory to start anew."
            )

    def shard(self, number: int) -> Path:
        """Path of a shard: 0 is the one outside the blocks, i + 1 belongs to block i."""
        return self.partial / shard_name(number, self.shards)

    def _note(self, number: int) -> Path:
        return self.partial / f"shard-{number:05d}.json"

    def finished(self, number: int) -> dict[str, Any] | None:
        """The record of a shard that an earlier run completed, its bytes checked; None if it has to be made."""
        found: dict[str, Any] | None = self.ranks.told(self._finished(number) if self.ranks.first else None)
        return found

    def _finished(self, number: int) -> dict[str, Any] | None:
        if not self._note(number).is_file() or not self.shard(number).is_file():
            return None
        record: dict[str, Any] = json.loads(self._note(number).read_text())
        return record if file_hash(self.shard(number)) == record["sha256"] else None

    def finish(
        self, number: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], check: Callable[[Mapping[str, Tensor]], None] | None = None
    ) -> dict[str, Any]:
        """Write a shard, read it back, let ``check`` look at what was read, then write its record with the hashes.

        Without its record a shard does not count as finished: a resume makes it again.

        Raises:
            LowbitError: other ranks have other tensors.
        """
        if self.ranks.size > 1:
            made = {name: tensor_hash(t.cpu()) for name, t in tensors.items()}
            self.ranks.agree(f"'{record['name']}' as tuned", made, "Do all have the same kind of device and the same libraries?")
        if not self.ranks.first:
            return dict(record)
        path = self.shard(number)
        save_shard(path, tensors)
        held = read_shard(path)
        if check:
            check(held)
        hashes = {k: tensor_hash(t) for k, t in held.items()}
        full = {**record, "shard": path.name, "sha256": file_hash(path), "bytes": path.stat().st_size, "tensors": hashes}
        write_atomic(self._note(number), json.dumps(full).encode())
        return full

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of the artifact."""
        write_atomic(self.partial / name, (json.dumps(data, indent=1) + "\n").encode())

    def write_proof(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the sample of tokens and logits that `lowbit verify` compares with."""
        save_shard(self.partial / PROOF, tensors)

    def write_card(self, text: str) -> None:
        """Write README.md, unless there is one: somebody else's words, or this text from a run that was stopped at its very end."""
        if not (self.partial / CARD).exists():
            write_atomic(self.partial / CARD, text.encode())

    def carry(self, checkpoint: Checkpoint, names: Iterable[str]) -> None:
        """Copy files of the original model, byte for byte, such as its tokenizer."""
        for name in names:
            path = checkpoint.file(name)
            if path is None:
                raise LowbitError(f"'{name}' of '{checkpoint.name}' has gone while it was quantized. Put it back and run the same command.")
            with _disk(self.partial / name):
                (self.partial / name).parent.mkdir(exist_ok=True)
                data = path.read_bytes()
            write_atomic(self.partial / name, data)

    def complete(self) -> None:
        """Give the directory its final name, then drop the working notes: killed in between, it is finished all the same."""
        with _disk(self.out):
            if self.out.is_dir():
                self.out.rmdir()
            os.replace(self.partial, self.out)
            self._tidy(self.out)


def shard_name(number: int, shards: int) -> str:
    """The usual name of a shard, counted from 0."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def block_tensors(block: Block) -> dict[str, Tensor]:
    """Everything a finished block stores, by full name."""
    out = {}
    for name in block.weights:
        linear = name.removesuffix(".weight")
        if linear in block.coded:
            for key, t in pack(block.coded[linear], block.stored).items():
                out[f"{block.name}.{linear}.{key}"] = t
        else:
            out[f"{block.name}.{name}"] = block.kept(name)
    return out


def compare_block(block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Compare a block with what was read back from disk, code for code and bit for bit.

    Raises:
        VerificationError: naming the first tensor that differs.
    """
    for linear, q in block.coded.items():
        full = f"{block.name}.{linear}"
        read = unpack_linear(tensors, full, q.grid, q.codes.device)
        part = q.same_as(read)
        if part:
            raise VerificationError(f"'{full}': {part} read back from disk differ from what was tuned.")
    for name in block.weights:
        if name.removesuffix(".weight") not in block.coded and not torch.equal(tensors[f"{block.name}.{name}"], block.kept(name).cpu()):
            raise VerificationError(f"'{block.name}.{name}' read back from disk differs from what was tuned.")


def unpack_linear(tensors: Mapping[str, Tensor], full: str, grid: Grid, device: torch.device) -> QTensor:
    """One linear of a shard by its full name, on a device."""
    return unpack(local_tensors(tensors, full), grid, full).to(device)
