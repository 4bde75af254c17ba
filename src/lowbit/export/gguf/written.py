"""A GGUF file compared as it is written, and hashed as far as it is finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from ...artifact.files import same_bytes
from ...artifact.hashing import Hashing
from ...errors import VerificationError
from ...formats.gguf import Writer
from ...model.raw import Raw
from .model import Spot


class Written:
    """What has been written of a file.

    Args:
        file: being written. hashing: beside it.
    """

    def __init__(self, file: Writer, hashing: Hashing) -> None:
        self._file, self._hashing = file, hashing
        self._whole = hashing.growing(file.path)
        self._tensors: dict[str, Future[str]] = {}

    def add(self, spot: Spot, rows: Tensor) -> None:
        """Write a parameter, and compare it with what is read back.

        Args:
            rows: uint8 of any shape.

        Raises:
            VerificationError: something else is read back.
        """
        self._file.add(spot.tensor, rows, spot.part)
        if not same_bytes(self._file.back(spot.tensor, spot.part), rows.reshape(-1)):
            raise VerificationError(
                f"'{spot.tensor}' read back from disk differs from what was made."
            )
        whole = self._file.whole(spot.tensor)
        if whole is not None:
            start, shape = whole
            raw = Raw(self._file.path, "U8", shape, start, math.prod(shape))
            self._tensors[spot.tensor] = self._hashing.tensor(raw)
        self._whole.up_to(self._file.finished)

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """What the report says of the file, now finished.

        Args:
            names: of its tensors, in their order.
        """
        return {
            "sha256": self._whole.digest(),
            "bytes": self._file.path.stat().st_size,
            "tensors": {name: self._tensors[name].result() for name in names},
        }
