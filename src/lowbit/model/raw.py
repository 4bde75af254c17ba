"""Tensors of safetensors files as bytes: whatever their dtype, and piece by piece, so that memory
stays flat whatever their size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE = 1 << 24  # bytes that are held at a time


@dataclass(frozen=True)
class Raw:
    """A tensor as it lies in a file.

    Attributes:
        path: of the file. kind: dtype as safetensors names it, such as "BF16". shape: its sizes.
        start: where its first byte is in the file. nbytes: how many follow.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, at most ``PIECE`` at a time.

        Raises:
            OSError: the file cannot be read, or has become shorter.
        """
        left = self.nbytes
        with open(self.path, "rb") as f:
            f.seek(self.start)
            while left:
                piece = f.read(min(PIECE, left))
                if not piece:
                    raise OSError(f"{self.path} ends before its tensors do")
                left -= len(piece)
                yield piece


def raw_tensors(path: Path) -> dict[str, Raw]:
    """Every tensor of a safetensors file by its name; headers are read, data is not.

    Raises:
        OSError: the file cannot be read. ValueError: it has no readable header.
    """
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:
            raise ValueError("its header is longer than the file")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    return {
        name: Raw(
            path,
            said["dtype"],
            tuple(said["shape"]),
            8 + size + said["data_offsets"][0],
            said["data_offsets"][1] - said["data_offsets"][0],
        )
        for name, said in header.items()
    }
