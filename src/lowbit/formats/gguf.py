"""The GGUF container, version 3: typed metadata, a table of tensors, their bytes.

Tensors are written as bytes at places that are known beforehand, so that a model never has to be in
memory as a whole. Source: the GGUF specification of ggml. Dimensions are listed fastest first
there; here shapes are as in torch.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .ggml import BY_NUMBER, BlockType

NAME = "gguf"
# How the name of a tensor ends that scores experts.
ROUTER = "ffn_gate_inp.weight"
_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: as llama.cpp knows it. shape: as in torch. kind: how its rows are held.
    """

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def bytes(self) -> int:
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows * self.kind.row_bytes(self.shape[-1])


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A type number and a value: str, bool, int (32 bits, unsigned), float (32 bits), or a list of
    str, int (signed) or float.
    """
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    kind = {str: _STRING, int: _I32, float: _F32}[type(value[0]) if value else str]
    if kind == _STRING:
        items = b"".join(map(_text, value))
    else:
        items = struct.pack(f"<{len(value)}{'i' if kind == _I32 else 'f'}", *value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items


class Writer:
    """A file being written; a context manager. Tensors come in any order.

    Attributes:
        path: of the file.

    Args:
        path: to be made. metadata: key -> value, see `_value`. entries: every tensor, in the order
            of the file.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], entries: Sequence[Entry]) -> None:
        self.path = path
        self._places: dict[str, tuple[int, Entry]] = {}
        head = [_MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
        head += [_text(key) + _value(value) for key, value in metadata.items()]
        at = 0
        for e in entries:
            head.append(
                _text(e.name)
                + struct.pack(
                    f"<I{len(e.shape)}QIQ", len(e.shape), *reversed(e.shape), e.kind.number, at
                )
            )
            self._places[e.name] = (at, e)
            at += -(-e.bytes // _ALIGNMENT) * _ALIGNMENT
        raw = b"".join(head)
        self._data = -(-len(raw) // _ALIGNMENT) * _ALIGNMENT
        self._file: BufferedRandom = open(path, "w+b")  # noqa: SIM115
        self._file.write(raw)
        self._file.truncate(self._data + at)
        self._bytes = self._data + at
        # Tensors of three dimensions come in parts.
        self._missing: dict[str, set[int | None]] = {
            e.name: set(range(e.shape[0])) if len(e.shape) == 3 else {None} for e in entries
        }

    def add(self, name: str, rows: Tensor, part: int | None = None) -> None:
        """The bytes of one tensor, uint8 of any shape, or those of one part of a tensor of three
        dimensions; on their way to the disk when it returns.
        """
        start, size = self._place(name, part)
        flat = rows.contiguous().cpu().view(-1)
        if flat.dtype != torch.uint8 or len(flat) != size:
            raise ValueError(f"'{name}' takes {size} bytes, got {len(flat)} {flat.dtype}")
        self._file.seek(start)
        self._file.write(flat.numpy().data)
        self._file.flush()
        missing = self._missing.get(name, set())
        missing.discard(part)
        if not missing:
            self._missing.pop(name, None)

    def back(self, name: str, part: int | None = None) -> Tensor:
        """What `add` was given, read back: (bytes,) uint8."""
        start, size = self._place(name, part)
        held = torch.empty(size, dtype=torch.uint8)
        self._file.seek(start)
        if self._file.readinto(held.numpy().data) != size:
            raise OSError(f"{self.path} ends before '{name}' does")
        return held

    def whole(self, name: str) -> tuple[int, tuple[int, int]] | None:
        """Where a tensor begins in the file, and its shape as (rows, bytes of a row); None while a
        part of it is missing.
        """
        if name in self._missing:
            return None
        start, size = self._place(name, None)
        entry = self._places[name][1]
        row = entry.kind.row_bytes(entry.shape[-1])
        return start, (size // row, row)

    @property
    def finished(self) -> int:
        """How many bytes from the start will not be written any more."""
        missing = next(iter(self._missing), None)
        return self._bytes if missing is None else self._place(missing, None)[0]

    def _place(self, name: str, part: int | None) -> tuple[int, int]:
        """First byte and number of bytes of a tensor, or of one part of it."""
        at, entry = self._places[name]
        size = entry.bytes if part is None else entry.bytes // entry.shape[0]
        return self._data + at + size * (part or 0), size

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())
        if kind is None and self._missing:
            raise ValueError(f"'{min(self._missing)}' was never written")


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found if len(found) > 1 else found[0]

    def text(self) -> str:
        length = self.take("<Q")
        if self.at + length > len(self.data):
            raise ValueError("a text is longer than the file")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("<IQ")
            if count > len(self.data):
                raise ValueError("a list is longer than the file")
            return [self.value(inner) for _ in range(count)]
        return self.take(_SCALARS[kind])


class Reader:
    """A file opened for reading, mapped into memory.

    Attributes:
        metadata: key -> value. entries: name -> tensor.

    Raises:
        LowbitError: not such a file, or one that is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self._offsets: dict[str, int] = {}
        try:
            with open(path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            cursor = _Cursor(self._map)
            if self._map[:4] != _MAGIC:
                raise ValueError("it does not begin with GGUF")
            cursor.at = 4
            version, tensors, pairs = cursor.take("<IQQ")
            if version not in (2, 3):
                raise ValueError(f"version {version} is not known")
            for _ in range(pairs):
                key = cursor.text()
                self.metadata[key] = cursor.value(cursor.take("<I"))
            for _ in range(tensors):
                name, dimensions = cursor.text(), cursor.take("<I")
                shape = tuple(cursor.take("<Q") for _ in range(dimensions))[::-1]
                number, offset = cursor.take("<IQ")
                if number not in BY_NUMBER:
                    raise ValueError(f"tensor '{name}' has type {number}, which is not known")
                self.entries[name] = Entry(name, shape, BY_NUMBER[number])
                self._offsets[name] = offset
            self._data = -(-cursor.at // _ALIGNMENT) * _ALIGNMENT
            for name, e in self.entries.items():
                if self._data + self._offsets[name] + e.bytes > len(self._map):
                    raise ValueError(f"it ends before '{name}' does")
        except (OSError, ValueError, KeyError, struct.error) as e:
            raise LowbitError(f"'{path}' is not a readable GGUF file: {e}.") from e

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, (rows, bytes of a row) uint8, copied."""
        e = self.entries[name]
        at = self._data + self._offsets[name]
        return torch.frombuffer(bytearray(self._map[at : at + e.bytes]), dtype=torch.uint8).view(
            -1, e.kind.row_bytes(e.shape[-1])
        )
