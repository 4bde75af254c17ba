"""A GGUF file, or all parts of one: its tensors by the gguf package, no data read before it is
asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from .skeleton import reason_of

MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFFile:
    """A file that is open for reading.

    Args:
        path: of the file, or of any part of a split one.

    Raises:
        LowbitError: it is no GGUF, cannot be read, or a part is missing; or the gguf package is
            not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = _parts(path)
        self._readers = [_reader(part) for part in self.parts]
        self._check_whole()

    @property
    def first(self) -> Path:
        """The part that holds the metadata."""
        return self.parts[0]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        found = self.field("general.architecture")
        if not isinstance(found, str):
            raise LowbitError(
                f"'{self.path}' does not say which architecture it is of (general.architecture): "
                "is it a model?"
            )
        return found

    def field(self, name: str) -> Any:
        """A value of the metadata, None if there is none."""
        field = self._readers[0].get_field(name)
        return None if field is None else field.contents()

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all values of the metadata."""
        return tuple(self._readers[0].fields)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """Name -> tensor of the gguf package, its data mapped and not read."""
        return {t.name: t for reader in self._readers for t in reader.tensors}

    def _check_whole(self) -> None:
        count = self.field("split.count") or 1
        if count > 1 and len(self.parts) != count:
            raise LowbitError(
                f"'{self.path}' is one of the {count} parts of a split file, and its name does not "
                f"say so: name them ...-00001-of-{count:05}.gguf and so on, as they were."
            )
        wanted = self.field("split.tensors.count")
        if count > 1 and wanted and wanted != len(self.tensors):
            raise LowbitError(
                f"the {count} parts of '{self.path}' hold {len(self.tensors)} of {wanted} tensors: "
                "download them again."
            )


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def package() -> Any:
    """The gguf package.

    Raises:
        LowbitError: it is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise LowbitError(
            "GGUF files are read through the gguf package: pip install 'lowbit[llamacpp]'."
        ) from e
    return gguf


def _parts(path: Path) -> Sequence[Path]:
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    parts = [
        path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise LowbitError(
                f"'{path}' is one of {count} parts, of which '{part.name}' is missing: put all "
                "parts into one folder."
            )
    return parts or [path]


def _reader(path: Path) -> Any:
    gguf = package()
    if not is_gguf(path):
        raise LowbitError(
            f"'{path}' is not a GGUF file (it does not begin with 'GGUF'). Download it again."
        )
    try:
        return gguf.GGUFReader(path)
    except Exception as e:  # what damage does to the parser depends on where it is
        reason = reason_of(e)
        if "GGMLQuantizationType" in reason:
            raise LowbitError(
                f"'{path}' holds a tensor of a type that the installed gguf package does not know "
                f"({reason}): pip install -U gguf, or give a file of another type."
            ) from e
        raise LowbitError(
            f"'{path}' cannot be read as a GGUF file (truncated download?): {reason}"
        ) from e
