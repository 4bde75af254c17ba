"""From text to rows of tokens: calibration samples as the papers draw them, and evaluation windows as they cut them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .text import documents

_PILE_DOCUMENT = 512  # longest document, in tokens, that the AWQ authors keep
_C4_WINDOWS = 256
_AT_ONCE = 64  # documents a tokenizer call: enough to keep its threads busy, few enough to stop early


@dataclass(frozen=True)
class Calibration:
    """Which text to calibrate on; part of a result's name.

    Attributes:
        source: see `lowbit.model.text.documents`.
        samples: rows, exactly as many or an error.
        length: tokens a row; in a recipe, the model's context if that is shorter.

    Raises:
        LowbitError: fewer than one sample or two tokens, or no source.
    """

    source: str = "stdlib"
    samples: int = 128
    length: int = 2048

    def __post_init__(self) -> None:
        if not self.source:
            raise LowbitError("calibration needs a text source (--calib): stdlib, a file, or a named corpus.")
        if self.samples < 1 or self.length < 2:
            raise LowbitError(f"calibration needs at least 1 sample of at least 2 tokens, got {self.samples} x {self.length}.")


@dataclass(frozen=True)
class Rows:
    """Calibration tokens.

    Attributes:
        calibration: (samples, length) int64.
        held_out: (m, length) int64 from text that is not calibrated on; m may be 0.
        source: where they come from.
        tokens_available: tokens found on the calibration side: all of them, except for c4 and pile-val, whose documents are
            read until there are rows enough (of pile-val only those that are short enough to be used).
    """

    calibration: Tensor
    held_out: Tensor
    source: str
    tokens_available: int

    @property
    def sha256(self) -> str:
        """Over the bytes of both."""
        h = hashlib.sha256(self.calibration.numpy().tobytes())
        h.update(b"|" + self.held_out.numpy().tobytes())
        return h.hexdigest()


def draw_rows(calib: Calibration, tokenizer: Any, seed: int, held_out: int = 16) -> Rows:
    """Exactly ``calib.samples`` rows, drawn with the seed, and up to ``held_out`` rows of other text.

    wikitext2: random windows of the joined train split (as GPTQ). c4: a random window of random documents that are longer than a
    row (as GPTQ, but no document twice). pile-val: documents of at most 512 tokens, shuffled and joined, cut into rows (as AWQ).
    Everything else: documents joined, each with its BOS, cut into rows, of which some are drawn.

    Held-out rows are the first windows of the evaluation side; where there is only one side (files, folders, pile-val), rows or
    documents that were not drawn.

    Raises:
        LowbitError: the source is missing, unreadable or too short; says how much there was.
    """
    if held_out < 0:
        raise LowbitError(f"held-out rows cannot be negative, got {held_out}.")
    return _DRAWS.get(calib.source, _from_all)(calib, tokenizer, random.Random(seed), held_out)


def evaluation_windows(source: str, tokenizer: Any, length: int, limit: int | None = None) -> Tensor:
    """Non-overlapping windows (n, length) int64, the tail dropped; at most ``limit``, and at most 256 of c4.

    A single document (wikitext2, c4, a .txt file) is tokenised once, so BOS stands only at its start; several documents are
    joined, each with its BOS.

    Raises:
        LowbitError: the text is missing or shorter than one window; a length or limit that leaves nothing to predict.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise LowbitError(f"evaluation needs at least 1 window of at least 2 tokens, got length {length}, windows {limit}.")
    windows, tokens = _first_windows(source, tokenizer, length, limit)
    if not len(windows):
        raise LowbitError(f"'{source}' has {tokens} tokens, too few for a window of {length}. Use a smaller --length or more text.")
    return windows


def _first_windows(source: str, tokenizer: Any, length: int, limit: int | None) -> tuple[Tensor, int]:
    """The first windows of the evaluation side, and how many tokens were tokenized for them."""
    texts = documents(source, "eval")
    if source == "c4":
        limit = _C4_WINDOWS if limit is None else min(limit, _C4_WINDOWS)
    if len(texts) == 1:
        tokens = _ids(tokenizer, texts, special=True)[0]
    else:
        tokens = _joined(tokenizer, texts, None if limit is None else limit * length)
    return _cut(tokens, length)[:limit], len(tokens)


def _ids(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return found


def _each(tokenizer: Any, texts: list[str], *, special: bool) -> Iterator[list[int]]:
    """The documents' tokens, tokenized as they are asked for."""
    for at in range(0, len(texts), _AT_ONCE):
        yield from _ids(tokenizer, texts[at : at + _AT_ONCE], special=special)


def _joined(tokenizer: Any, texts: list[str], enough: int | None = None) -> list[int]:
    """Documents as one run of tokens, each with its BOS if the tokenizer has one; stops when there are ``enough``."""
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    out: list[int] = []
    for ids in _each(tokenizer, texts, special=False):
        out += bos + ids
        if enough is not None and len(out) >= enough:
            break
    return out


def _cut(tokens: list[int], length: int) -> Tensor:
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def _spare(c: Calibration, tokenizer: Any, held_out: int) -> Tensor:
    """Held-out rows from the evaluation side of a source that has one; none if it is too short for one."""
    if not held_out:
        return torch.empty(0, c.length, dtype=torch.int64)
    return _first_windows(c.source, tokenizer, c.length, held_out)[0]


def _too_short(c: Calibration, rows: int, tokens: int) -> LowbitError:
    there = f"'{c.source}' yields {rows} rows of {c.length} tokens ({tokens} tokens read), {c.samples} were asked for."
    if rows:
        return LowbitError(f"{there} Use --samples {rows}, a smaller --length, or more text.")
    return LowbitError(f"{there} Use a smaller --length or more text.")


def _from_all(c: Calibration, tokenizer: Any, rng: random.Random, held_out: int) -> Rows:
    tokens = _joined(tokenizer, documents(c.source, "train"))
    pool = _cut(tokens, c.length)
    order = rng.sample(range(len(pool)), len(pool))
    if len(pool) < c.samples:
        raise _too_short(c, len(pool), len(tokens))
    rest = order[c.samples : c.samples + held_out]
    spare = _spare(c, tokenizer, held_out) if c.source == "stdlib" else pool[sorted(rest)]
    return Rows(pool[order[: c.samples]], spare, c.source, len(tokens))


def _from_one_document(c: Calibration, tokenizer: Any, rng: random.Random, held_out: int) -> Rows:
    ids = _ids(tokenizer, documents(c.source, "train"), special=True)[0]
    last = len(ids) - c.length - 1
    if last < 0:
        raise _too_short(c, 0, len(ids))
    starts = [rng.randint(0, last) for _ in range(c.samples)]
    rows = torch.tensor([ids[s : s + c.length] for s in starts])
    return Rows(rows, _spare(c, tokenizer, held_out), c.source, len(ids))


def _from_long_documents(c: Calibration, tokenizer: Any, rng: random.Random, held_out: int) -> Rows:
    texts = documents(c.source, "train")
    rng.shuffle(texts)
    rows: list[list[int]] = []
    tokens = 0
    for ids in _each(tokenizer, texts, special=True):
        tokens += len(ids)
        if len(ids) > c.length:
            start = rng.randint(0, len(ids) - c.length - 1)
            rows.append(ids[start : start + c.length])
        if len(rows) == c.samples:
            return Rows(torch.tensor(rows), _spare(c, tokenizer, held_out), c.source, tokens)
    raise _too_short(c, len(rows), tokens)


def _from_short_documents(c: Calibration, tokenizer: Any, rng: random.Random, held_out: int) -> Rows:
    texts = [t.strip() for t in documents(c.source, "train")]
    rng.shuffle(texts)
    short = (ids for ids in _each(tokenizer, texts, special=True) if len(ids) <= _PILE_DOCUMENT)
    tokens = _take(short, c.samples * c.length)
    rows = _cut(tokens, c.length)[: c.samples]
    if len(rows) < c.samples:
        raise _too_short(c, len(rows), len(tokens))
    # The corpus has one split only, so what is held out are the documents that come next.
    spare = _cut(_take(short, held_out * c.length), c.length)[:held_out]
    return Rows(rows, spare, c.source, len(tokens))


def _take(some: Iterator[list[int]], enough: int) -> list[int]:
    """Whole documents, joined, until there are ``enough`` tokens or no more documents."""
    out: list[int] = []
    while len(out) < enough:
        ids = next(some, None)
        if ids is None:
            break
        out += ids
    return out


_DRAWS: dict[str, Callable[[Calibration, Any, random.Random, int], Rows]] = {
    "wikitext2": _from_one_document,
    "c4": _from_long_documents,
    "pile-val": _from_short_documents,
}
