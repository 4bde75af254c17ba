"""How a reader talks to the process that started it: ids through standard input, logits through
standard output, no file between.

Needs nothing but numpy, since a runtime may come without torch and safetensors: both are written
and read here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MISSING, REFUSED, UNABLE = 3, 4, 5  # exit statuses, see `lowbit.artifact.readers`
_TYPES = {"F32": "<f4", "I64": "<i8"}
# Of a path in its folder; any other error there is the machine's.
_OF_THE_MODEL = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
)

Read = Callable[[Path, Mapping[str, Any], Sequence[str]], Mapping[str, Any]]


def decoded(raw: bytes) -> dict[str, Any]:
    """Bytes of a safetensors file -> name -> array."""
    import numpy as np

    (size,) = struct.unpack("<Q", raw[:8])
    out = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        start, stop = entry["data_offsets"]
        out[name] = np.frombuffer(
            raw[8 + size + start : 8 + size + stop], _TYPES[entry["dtype"]]
        ).reshape(entry["shape"])
    return out


def encoded(tensors: Mapping[str, Any]) -> list[bytes]:
    """Name -> array, float32 or int64 -> the parts of a safetensors file."""
    import numpy as np

    header, at, kinds = {}, 0, {np.dtype(v): k for k, v in _TYPES.items()}
    for name, t in tensors.items():
        header[name] = {
            "dtype": kinds[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [
        struct.pack("<Q", len(text)),
        text,
        *(np.ascontiguousarray(t).tobytes() for t in tensors.values()),
    ]


def run(packages: Sequence[str], read: Read) -> None:
    """Be a reader: check that the packages are there, read, and send what was found.

    Args:
        packages: names of modules that are needed. read: (folder, {"ids": rows}, arguments that
            follow the folder) -> name -> array.
    """
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # libraries print as they like; what they print is not the answer
        try:
            answer = encoded(_found(packages, read))
        except BaseException as e:
            if isinstance(e, _MissingError):
                _leave(out, MISSING, str(e))
            with contextlib.suppress(OSError):
                traceback.print_exc()
            _leave(out, UNABLE if _is_the_machines(e, Path(sys.argv[1])) else REFUSED, _sentence(e))
        for part in answer:
            out.write(part)


def _found(packages: Sequence[str], read: Read) -> Mapping[str, Any]:
    import importlib.util

    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise _MissingError(", ".join(p.replace("_", "-") for p in missing))
    return read(Path(sys.argv[1]), decoded(sys.stdin.buffer.read()), sys.argv[2:])


class _MissingError(Exception):
    pass


def _leave(out: BinaryIO, status: int, sentence: str) -> NoReturn:
    """Send one line and end at once, whatever threads a runtime has left behind."""
    out.write(sentence.encode())
    out.flush()
    os._exit(status)


def _is_the_machines(e: BaseException, folder: Path) -> bool:
    """Whether an exception tells of the machine rather than of the model: memory, space, files,
    modules.
    """
    if isinstance(e, (MemoryError, ImportError, KeyboardInterrupt)):
        return True
    text = str(e)
    if type(e).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return True
    # As Rust's libraries write it into errors of other types.
    inner = re.search(r"\(os error (\d+)\)", text)
    number = (
        int(inner[1]) if inner else getattr(e, "errno", None) if isinstance(e, OSError) else None
    )
    if number is not None:
        named = getattr(e, "filename", None)
        inside = isinstance(named, str) and Path(named).absolute().is_relative_to(folder.absolute())
        return not (number in _OF_THE_MODEL and (inside or inner is not None))
    return e.__cause__ is not None and _is_the_machines(e.__cause__, folder)


def _sentence(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__
