"""What all sections share: the device, sizes, clocks, a block to work on."""

from __future__ import annotations

import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import random_llama
from tuning import first_block

from lowbit.grid import Affine
from lowbit.model.block import Block
from lowbit.model.model import Streams
from lowbit.model.storage import Place, Storage
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

GIB = 1 << 30


@dataclass(frozen=True)
class Bench:
    """Where it is measured, and on what: Llama-3-8B's block, or a tiny one.

    Attributes:
        small: sizes that a CPU works off in seconds.
    """

    device: torch.device
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def hidden(self) -> int:
        return 64 if self.small else 4096

    @property
    def ffn(self) -> int:
        return 128 if self.small else 14336

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        return (2, 1) if self.small else (32, 8)

    @property
    def vocab(self) -> int | None:
        """Words; None for those of the tokenizer."""
        return None if self.small else 128256

    @property
    def batch(self) -> tuple[int, int]:
        """Rows of a step, and tokens of a row."""
        return (4, 32) if self.small else (4, 2048)

    @property
    def samples(self) -> int:
        return 8 if self.small else 128

    def pick(self, small: Any, large: Any) -> Any:
        return small if self.small else large

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def times(self, work: Callable[[], object], count: int = 10, warm: int = 3) -> dict[str, float]:
        """Milliseconds: the median of single calls, the mean of a run of them, and what the host
        alone takes to launch one of that run.
        """
        if self.small:
            count, warm = min(count, 2), min(warm, 1)
        for _ in range(warm):
            work()
        self.sync()
        single = []
        for _ in range(count):
            start = time.perf_counter()
            work()
            self.sync()
            single.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(count):
            work()
        host = (time.perf_counter() - start) / count
        self.sync()
        mean = (time.perf_counter() - start) / count
        return {"single": 1e3 * statistics.median(single), "mean": 1e3 * mean, "host": 1e3 * host}

    def checkpoint(self, folder: Path, layers: int, vocab: int | None) -> Path:
        """A random Llama in bfloat16 with so many layers and words."""
        sizes = (self.hidden, self.ffn, layers, *self.heads)
        return random_llama(folder, *sizes, vocab=vocab, device=self.device)

    def block(self, rows: int = 16, place: Place = "device") -> Block:
        """The first block of such a model, random tokens entering it; streams live in ``place``."""
        length = self.batch[1]
        with tempfile.TemporaryDirectory() as folder:
            model = self.checkpoint(Path(folder), 1, None)
            stream = ModelStream(model, self.device, torch.bfloat16 if self.cuda else None)
            storage = Storage(place, self.device)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, 4000, (rows, length), generator=generator)
            x = stream.embed(ids, storage=storage)
            streams = Streams(x, x, rows, storage=storage)
            made = first_block(stream, Recipe(Affine(2, self.pick(32, 128))), streams, length)
        return made.within(readout=None)


@contextmanager
def put(module: Any, name: str, value: Any) -> Iterator[None]:
    """Something else in a module's place while something is measured."""
    held = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, held)


def tried(work: Callable[[], Any]) -> Any:
    """What it returns, or its traceback: the rest of a section is worth having without it."""
    try:
        return work()
    except Exception:
        return {"failed": traceback.format_exc()[-3000:]}
