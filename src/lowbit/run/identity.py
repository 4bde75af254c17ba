"""What decides the bytes of a run: an interrupted one is continued by the same only, and ranks
share one if all have the same.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..artifact.files import file_hash
from ..artifact.proof import read_report
from ..errors import LowbitError, VerificationError
from ..model.calibration import Rows
from ..model.carried import SourceFiles, source_files
from ..model.checkpoint import Checkpoint
from ..model.ranks import ALONE, Ranks
from ..model.source import open_source
from ..model.stream import ModelStream
from ..recipe import Recipe


@dataclass(frozen=True)
class Original:
    """The files that decide what a model computes: its config, its weights, its tokenizer and code.

    Attributes:
        name: of the model, for errors. paths: name -> where the file lies. sizes: name -> bytes.
        times: name -> when it was last changed, in nanoseconds. checkpoint: whose files they are;
            some of a GGUF file's lie only as long as it lives.
        hashes: name -> sha256, empty until `hashed`.
    """

    name: str
    paths: Mapping[str, Path]
    sizes: Mapping[str, int]
    times: Mapping[str, int]
    checkpoint: Checkpoint = field(repr=False, compare=False)
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, files: SourceFiles | None = None) -> Original:
        """Of a model, whose ``files`` are listed if they are not given. Raises LowbitError if one
        has gone.
        """
        names = ["config.json", *checkpoint.shards, *(files or source_files(checkpoint)).deciding]
        paths = {name: checkpoint.file(name) for name in names}
        gone = [n for n, p in paths.items() if p is None]
        if gone:
            raise LowbitError(f"'{gone[0]}' is missing from '{checkpoint.name}'.")
        there = {n: p for n, p in paths.items() if p is not None}
        states = {n: p.stat() for n, p in there.items()}
        return cls(
            checkpoint.name,
            there,
            {n: s.st_size for n, s in states.items()},
            {n: s.st_mtime_ns for n, s in states.items()},
            checkpoint,
        )

    def hashed(self, ranks: Ranks = ALONE) -> Original:
        """With the hash of every byte of every file, which rank 0 reads for all."""
        return replace(self, hashes=ranks.broadcast(self._hashes() if ranks.first else None))

    def _hashes(self) -> dict[str, str]:
        with ThreadPoolExecutor() as pool:  # hashing lets other threads work
            return dict(zip(self.paths, pool.map(self._hash, self.paths.values()), strict=True))

    def _hash(self, path: Path) -> str:
        try:
            return file_hash(path)
        except OSError as e:
            raise LowbitError(f"'{path}' cannot be read: {e.strerror or e}.") from e

    def as_dict(self) -> dict[str, Any]:
        """For the report: the hash of each file, and one over all of them."""
        return {"sha256": self.sha256, "files": dict(self.hashes)}

    @property
    def sha256(self) -> str:
        """One hash over the names and hashes of all files."""
        lines = "".join(f"{n} {h}\n" for n, h in sorted(self.hashes.items()))
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()

    def check_unchanged(self) -> None:
        """Raise LowbitError if a file has changed since it was hashed: what is read of it from now
        on is of another model.

        Sizes and times are looked at, bytes only where a time differs.
        """
        for name, path in self.paths.items():
            if not self._is_as_hashed(name, path):
                raise LowbitError(
                    f"'{name}' of '{self.name}' has changed since this command began. Put it back "
                    "and run the same command, or choose another -o "
                    "for the model as it is now."
                )

    def _is_as_hashed(self, name: str, path: Path) -> bool:
        try:
            state = path.stat()
            if (state.st_size, state.st_mtime_ns) == (self.sizes[name], self.times[name]):
                return True
            return state.st_size == self.sizes[name] and self.hashes.get(name) == file_hash(path)
        except OSError:
            return False


def fingerprint(
    stream: ModelStream, original: Original, recipe: Recipe, rows: Rows, seed: int
) -> dict[str, Any]:
    """The model, the recipe with the files it names, the tokens, the seed, the arithmetic, the
    versions, and the ways to compute that add in another order.

    Raises:
        LowbitError: the environment names a way that is not there.
    """
    decisive = [entry.decides(method, stream.device) for _, entry, method in recipe.entries]
    files = [f for d in decisive for f in d.files]
    learns = any(d.gradients for d in decisive)
    return {
        "model": original.sha256,
        # Its tokens count, not their path.
        "recipe": {k: v for k, v in recipe.as_dict().items() if k != "calibration"},
        "files": {f: file_hash(Path(f)) for f in files},
        "calibration": rows.sha256,
        "seed": seed,
        "compute": str(stream.compute),
        "versions": {"lowbit": own_version(), **versions()},
        "bfloat16_steps": any(d.bfloat16_steps for d in decisive),
        "experts": " and ".join(sorted(stream.experts_in_steps() if learns else ())) or None,
        "rounding": next((d.rounding for d in decisive if d.rounding), None),
    }


def check_source(folder: Path, model: str) -> str:
    """Compare every byte of a model's files with what an artifact was made of; a sentence about
    what was compared.

    Raises:
        LowbitError: no artifact, or no model. VerificationError: a file differs, is missing, or was
            not there.
    """
    report = read_report(folder)
    if "original" not in report:
        raise LowbitError(
            f"'{folder}' does not say which files it was made of: it comes from an older version, "
            "or is an export of one."
        )
    then, now = report["original"]["files"], Original.of(open_source(model)).hashed().hashes
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            how = "has other bytes"
            if name not in now or name not in then:
                how = "was not there" if name in now else "is not there"
            raise VerificationError(
                f"'{folder}' was not made of '{model}' as it is now: '{name}' {how}."
            )
    return f"made of '{model}': {len(now)} files have the bytes that were quantized"


def state_of(source: str) -> str | None:
    """What tells a local text from a later state of it: a file's hash, or the names, sizes and
    times of a folder's files.

    None of a source that has a name alone.
    """
    path = Path(source)
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        return None
    found = [
        (p.relative_to(path).as_posix(), p.stat()) for p in sorted(path.rglob("*")) if p.is_file()
    ]
    return hashlib.sha256(
        repr([(n, s.st_size, s.st_mtime_ns) for n, s in found]).encode()
    ).hexdigest()


def own_version() -> str:
    """Of this library."""
    from .. import __version__

    return __version__


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide bytes."""
    return {
        "python": platform.python_version(),
        **{n: version(n) for n in ("torch", "transformers", "safetensors", "compressed-tensors")},
    }


def sources() -> str:
    """sha256 over this library's own modules: a working copy has one version and many states."""
    root = Path(__file__).parent.parent
    files = sorted(p for kind in ("*.py", "*.c", "*.toml") for p in root.rglob(kind))
    return hashlib.sha256(
        "".join(f"{p.relative_to(root)} {file_hash(p)}\n" for p in files).encode()
    ).hexdigest()
