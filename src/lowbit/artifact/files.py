"""The files of an artifact: their names, their tensors written and read back, their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import VerificationError
from ..formats.packing import local_tensors, pack, unpack
from ..grid import AnyGrid, Coded
from ..model.block import Block
from .disk import disk
from .lock import LOCK
from .output import INSIDE
from .tree import MOVING
from .tree import REPORT as REPORT

CARD = "README.md"
RECIPE = "recipe.toml"
PROOF = Path("proof") / "logits.safetensors"
INDEX = "model.safetensors.index.json"
# Files that decide what is loaded or compared, besides the shards.
HASHED = (
    "config.json",
    INDEX,
    RECIPE,
    PROOF.as_posix(),
)
STATE = "run.json"
# Of a run at work; gone from a finished directory, unless it was killed while tidying.
NOTES = (STATE, "shard-*.json", "*.tmp", LOCK, MOVING, f"{INSIDE}/*")


def save_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name, then rename it. Raises LowbitError if the
    file system refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk(path):
        path.parent.mkdir(exist_ok=True)
        try:
            save_file(
                {k: v.contiguous().cpu() for k, v in tensors.items()},
                temporary,
                metadata={"format": "pt"},
            )
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
        raise VerificationError(
            f"'{path}' is missing or not a readable safetensors file: {e}"
        ) from e


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
            raise VerificationError(
                f"'{full}': {part} read back from disk differ from what was tuned."
            )
    for name in block.weights:
        if name.removesuffix(".weight") not in block.coded and not torch.equal(
            tensors[f"{block.name}.{name}"], block.kept(name).cpu()
        ):
            raise VerificationError(
                f"'{block.name}.{name}' read back from disk differs from what was tuned."
            )


def unpack_linear(
    tensors: Mapping[str, Tensor], full: str, grid: AnyGrid, device: torch.device
) -> Coded:
    """One linear of a shard by its full name, on a device."""
    return unpack(local_tensors(tensors, full), grid, full).to(device)
