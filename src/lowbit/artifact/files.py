"""The files of an artifact: their names, their tensors written and read back, their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import VerificationError
from ..formats.packing import local_tensors, pack, unpack
from ..grid import AnyGrid, Coded
from ..model.block import Block
from ..model.raw import Raw, raw_tensors
from .disk import disk
from .lock import LOCK
from .output import INSIDE
from .safetensors_file import bytes_of, dtype_name, save_file
from .tree import MOVING
from .tree import REPORT as REPORT

CARD = "README.md"
RECIPE = "recipe.toml"
PROOF = Path("proof") / "logits.safetensors"
INDEX = "model.safetensors.index.json"
Named = Callable[[str], str | None]
# Files that decide what is loaded or compared, besides the shards.
HASHED = (
    "config.json",
    INDEX,
    RECIPE,
    PROOF.as_posix(),
)
STATE, POLISHED = "run.json", "polished.json"
# Of a run at work; gone from a finished directory, unless it was killed while tidying.
NOTES = (STATE, "shard-*.json", POLISHED, "polish-*/*", "*.tmp", LOCK, MOVING, f"{INSIDE}/*")


def save_shard(path: Path, tensors: Mapping[str, Tensor | Raw]) -> None:
    """Write a safetensors file under a temporary name, then rename it. What lies in another file is
    copied piece by piece. Raises LowbitError if the file system refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk(path):
        path.parent.mkdir(exist_ok=True)
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            # The writer makes files that only their owner can read.
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU have one dtype, one shape and the same bytes, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return _as_integers(a).equal(_as_integers(b))


def _as_integers(t: Tensor) -> Tensor:
    """The bytes of a tensor in the widest integers that divide them."""
    flat = torch.frombuffer(bytes_of(t), dtype=torch.uint8) if t.numel() else t.new_empty(0)
    words = len(flat) // 8 * 8 == len(flat) and flat.data_ptr() % 8 == 0
    return flat.view(torch.int64) if words else flat


def tensor_hash(t: Tensor) -> str:
    """sha256 over dtype, shape and bytes, the first 32 hex digits."""
    h = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode())
    h.update(bytes_of(t))
    return h.hexdigest()[:32]


def raw_hash(raw: Raw) -> str:
    """The same of a tensor in a file, read piece by piece."""
    h = hashlib.sha256(f"{dtype_name(raw.kind)}{raw.shape}".encode())
    for piece in raw.pieces():
        h.update(piece)
    return h.hexdigest()[:32]


def shard_hashes(path: Path) -> dict[str, str]:
    """The hash of every tensor of a shard, by name.

    Raises:
        VerificationError: the file is missing or not readable.
    """
    with _readable(path):
        return {name: raw_hash(raw) for name, raw in raw_tensors(path).items()}


def shard_names(path: Path) -> set[str]:
    """The names of a shard's tensors.

    Raises:
        VerificationError: the file is missing or not readable.
    """
    with _readable(path):
        return set(raw_tensors(path))


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            h.update(chunk)
    return h.hexdigest()


def read_shard(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a shard, by default all of them.

    Args:
        wanted: told a name, says whether the tensor is read.

    Raises:
        VerificationError: the file is missing or not readable.
    """
    with _readable(path), safe_open(path, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys() if wanted(k)}  # noqa: SIM118


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into one sentence."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as e:
        raise VerificationError(
            f"'{path}' is missing or not a readable safetensors file: {e}"
        ) from e


def shard_name(number: int, shards: int) -> str:
    """The usual name of a shard, counted from 0."""
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def block_tensors(block: Block, named: Named) -> dict[str, Tensor]:
    """Everything a finished block stores, by the names of tensors in files.

    Args:
        named: full name of a parameter, or of a linear -> its name in files; None of one that is
            stored as part of a larger tensor.
    """
    out = {}
    for name in block.weights:
        linear = name.removesuffix(".weight")
        if linear in block.coded:
            full = named(f"{block.name}.{linear}")
            for key, t in pack(block.coded[linear], block.stored).items():
                out[f"{full}.{key}"] = t
        elif (full := named(f"{block.name}.{name}")) is not None:
            out[full] = block.kept(name)
    return out


def compare_block(block: Block, named: Named, path: Path) -> None:
    """Compare a block with what was read back from disk, code for code and bit for bit.

    Args:
        named: as in `block_tensors`. path: of its shard.

    Raises:
        VerificationError: naming the first tensor that differs.
    """
    tensors = read_shard(path)
    for linear, q in block.coded.items():
        full = named(f"{block.name}.{linear}")
        assert full is not None
        read = unpack_linear(tensors, full, q.grid, q.codes.device)
        part = q.same_as(read)
        if part:
            raise VerificationError(
                f"'{full}': {part} read back from disk differ from what was tuned."
            )
    for name in block.weights:
        full = named(f"{block.name}.{name}")
        if name.removesuffix(".weight") in block.coded or full is None:
            continue
        if not torch.equal(tensors[full], block.kept(name).cpu()):
            raise VerificationError(f"'{full}' read back from disk differs from what was tuned.")


def unpack_linear(
    tensors: Mapping[str, Tensor], full: str, grid: AnyGrid, device: torch.device
) -> Coded:
    """One linear of a shard by its full name, on a device."""
    return unpack(local_tensors(tensors, full), grid, full).to(device)
