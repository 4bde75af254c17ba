"""Safetensors files written tensor by tensor, those that lie in other files piece by piece.

The bytes are those of safetensors' own writer, which holds all tensors in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.raw import PIECE, Raw

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
_NAMES = {kind: str(dtype) for dtype, kind in _KINDS.items()}
# The order of tensors in a file.
_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2"),
    *("I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)


def dtype_name(kind: str) -> str:
    """torch's name of a dtype that safetensors names; that itself if torch has none."""
    return _NAMES.get(kind, kind)


def bytes_of(t: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy if its elements follow each other."""
    flat = t.detach().reshape(-1)
    if flat.stride(0) != 1:  # also of a single element, whose stride says nothing
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def save_file(tensors: Mapping[str, Tensor | Raw], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file.

    Args:
        metadata: what its header says besides the tensors.

    Raises:
        OSError: the file system refuses, or a file that is copied from cannot be read.
    """
    names = sorted(tensors, key=lambda n: (_place(_kind(tensors[n])), n.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        t = tensors[name]
        stop = at + t.nbytes
        header[name] = {
            "dtype": _kind(t),
            "shape": list(t.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for name in names:
            for piece in _pieces(tensors[name]):
                f.write(piece)


def _kind(t: Tensor | Raw) -> str:
    return t.kind if isinstance(t, Raw) else _KINDS[t.dtype]


def _place(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _pieces(t: Tensor | Raw) -> Iterator[bytes | memoryview]:
    if isinstance(t, Raw):
        yield from t.pieces()
        return
    held = bytes_of(t.cpu())
    for at in range(0, len(held), PIECE):
        yield held[at : at + PIECE]
