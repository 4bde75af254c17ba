"""Hashes of files that are being written, computed in threads beside what writes them: hashlib lets
other threads run meanwhile.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ..model.raw import Raw
from .files import file_hash, raw_hash, shard_hashes


class Hashing:
    """Three threads: for files that are read, files that are written, and tensors of these; a
    context manager.

    What is asked for is read from the files, a piece at a time, in the order in which it is asked
    for. Errors are raised where results are.
    """

    def __init__(self) -> None:
        self._sources = ThreadPoolExecutor(1, "lowbit-hash-source")
        self._files = ThreadPoolExecutor(1, "lowbit-hash-file")
        self._tensors = ThreadPoolExecutor(1, "lowbit-hash-tensors")

    def __enter__(self) -> Hashing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._sources, self._files, self._tensors):
            pool.shutdown(wait=True, cancel_futures=True)

    def source(self, path: Path) -> Future[str]:
        """`file_hash` of a file that is read."""
        return self._sources.submit(file_hash, path)

    def file(self, path: Path) -> Future[str]:
        """`file_hash` of a file that was written."""
        return self._files.submit(file_hash, path)

    def shard(self, path: Path) -> Future[dict[str, str]]:
        """`shard_hashes` of a file that was written."""
        return self._tensors.submit(shard_hashes, path)

    def tensor(self, raw: Raw) -> Future[str]:
        """`raw_hash` of a tensor."""
        return self._tensors.submit(raw_hash, raw)

    def growing(self, path: Path) -> Growing:
        """The hash of a file whose beginning is finished before the rest."""
        return Growing(path, self._files)


class Growing:
    """sha256 of a file that is read as far as it is finished.

    Args:
        path: of the file. pool: with one thread.
    """

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._path, self._pool, self._read = path, pool, 0
        self._hash = hashlib.sha256()
        self._jobs: list[Future[None]] = []

    def up_to(self, stop: int) -> None:
        """Go on to a place in the file, before which nothing will be written any more."""
        if stop > self._read:
            part = Raw(self._path, "U8", (stop - self._read,), self._read, stop - self._read)
            self._jobs.append(self._pool.submit(self._take, part))
            self._read = stop

    def _take(self, part: Raw) -> None:
        for piece in part.pieces():
            self._hash.update(piece)

    def digest(self) -> str:
        """The hash of what was finished, in hexadecimal.

        Raises:
            OSError: the file cannot be read.
        """
        for job in self._jobs:
            job.result()
        return self._hash.hexdigest()
