"""From text to rows of tokens: calibration samples as the papers draw them, and evaluation windows as they cut them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .stdlib import Split
from .text import documents

_PILE_DOCUMENT = 512  # longest document, in tokens, that the AWQ authors keep
_C4_WINDOWS = 256


@dataclass(frozen=True)
class Calibration:
    """Which text to calibrate on; part of a result's name.

    Attributes:
        source: see `lowbit.model.text.documents`.
        samples: rows, exactly as many or an error.
        length: tokens a row.
    """

    source: str = "stdlib"
    samples: int = 128
    length: int = 2048

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise LowbitError(f"calibration needs at least 1 sample of at least 2 tokens, got {self.samples} x {self.length}.")


@dataclass(frozen=True)
class Rows:
    """Calibration tokens.

    Attributes:
        calibration: (samples, length) int64.
        held_out: (m, length) int64 from text that is not calibrated on; m may be 0.
        source: where they come from.
    """

    calibration: Tensor
    held_out: Tensor
    source: str

    @property
    def sha256(self) -> str:
        """Over the bytes of both."""
        h = hashlib.sha256(self.calibration.numpy().tobytes())
        h.update(b"|" + self.held_out.numpy().tobytes())
        return h.hexdigest()


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _joined(tokenizer: Any, texts: list[str]) -> list[int]:
    """All documents as one run of tokens, each with its BOS if the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    out: list[int] = []
    for ids in _tokens(tokenizer, texts):
        out += bos + ids
    return out


def _cut(tokens: list[int], length: int) -> Tensor:
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def draw_rows(calibration: Calibration, tokenizer: Any, seed: int, held_out: int = 16) -> Rows:
    """Exactly ``calibration.samples`` rows, drawn with the seed, and up to ``held_out`` rows of other text.

    wikitext2: random windows of the joined train split. c4: a random window of random documents that are longer than a row.
    pile-val: documents of at most 512 tokens, shuffled and joined, cut into rows. Everything else: documents joined, each
    with its BOS, cut into rows, of which some are drawn.

    Raises:
        LowbitError: the source is missing, unreadable or too short; says how much there was.
    """
    rng = random.Random(seed)
    named: dict[str, Callable[[Calibration, Any, random.Random], Tensor]] = {"wikitext2": _windows, "c4": _documents_windows, "pile-val": _pile}
    source, n, length = calibration.source, calibration.samples, calibration.length
    if source in named:
        rows = named[source](calibration, tokenizer, rng)
        return Rows(rows, evaluation_windows(source, tokenizer, length, held_out), source)
    pool = _cut(_joined(tokenizer, documents(source, "train")), length)
    order = rng.sample(range(len(pool)), len(pool))
    if len(pool) < n:
        raise _too_short(calibration, len(pool))
    spare = evaluation_windows(source, tokenizer, length, held_out) if source == "stdlib" else pool[sorted(order[n : n + held_out])]
    return Rows(pool[order[:n]], spare, source)


def _too_short(c: Calibration, available: int) -> LowbitError:
    return LowbitError(
        f"'{c.source}' yields {available} rows of {c.length} tokens, {c.samples} were asked for. "
        f"Use --samples {available}, a smaller --length, or more text." if available else
        f"'{c.source}' does not hold even one row of {c.length} tokens. Use a smaller --length or more text."
    )  # fmt: skip


def _windows(c: Calibration, tokenizer: Any, rng: random.Random) -> Tensor:
    ids = tokenizer(documents(c.source, "train")[0], verbose=False)["input_ids"]
    if len(ids) <= c.length + 1:
        raise _too_short(c, 0)
    starts = [rng.randint(0, len(ids) - c.length - 1) for _ in range(c.samples)]
    return torch.tensor([ids[s : s + c.length] for s in starts])


def _documents_windows(c: Calibration, tokenizer: Any, rng: random.Random) -> Tensor:
    texts = documents(c.source, "train")
    order = rng.sample(range(len(texts)), len(texts))
    rows: list[list[int]] = []
    for i in order:
        if len(rows) == c.samples:
            break
        ids = tokenizer(texts[i], verbose=False)["input_ids"]
        if len(ids) > c.length:
            start = rng.randint(0, len(ids) - c.length - 1)
            rows.append(ids[start : start + c.length])
    if len(rows) < c.samples:
        raise _too_short(c, len(rows))
    return torch.tensor(rows)


def _pile(c: Calibration, tokenizer: Any, rng: random.Random) -> Tensor:
    texts = documents(c.source, "train")
    rng.shuffle(texts)
    joined: list[int] = []
    for text in texts:
        if len(joined) >= c.samples * c.length:
            break
        ids = tokenizer(text.strip(), verbose=False)["input_ids"]
        if len(ids) <= _PILE_DOCUMENT:
            joined += ids
    rows = _cut(joined, c.length)
    if len(rows) < c.samples:
        raise _too_short(c, len(rows))
    return rows[: c.samples]


def evaluation_windows(source: str, tokenizer: Any, length: int, limit: int | None = None) -> Tensor:
    """Non-overlapping windows (n, length) int64, the tail dropped.

    A single document (wikitext2, c4, a .txt file) is tokenised once, so BOS stands only at its start; several documents are
    joined, each with its BOS.

    Raises:
        LowbitError: the text is missing or shorter than one window.
    """
    side: Split = "eval"
    texts = documents(source, side)
    tokens = list(tokenizer(texts[0], verbose=False)["input_ids"]) if len(texts) == 1 else _joined(tokenizer, texts)
    windows = _cut(tokens, length)
    if not len(windows):
        raise LowbitError(f"'{source}' holds {len(tokens)} tokens, fewer than one window of {length}. Use a smaller --length or more text.")
    if source == "c4":
        windows = windows[:_C4_WINDOWS]
    return windows if limit is None else windows[:limit]
