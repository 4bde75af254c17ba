"""From text to rows of tokens: calibration samples as the papers draw them, and evaluation windows
as they cut them.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .bos import begun, check_bos
from .chat import token_ids
from .records import Conversation, Document
from .text import iter_documents

_PILE_DOCUMENT = 512  # longest document, in tokens, that the AWQ authors keep
_C4_WINDOWS = 256


@dataclass(frozen=True)
class Calibration:
    """Which text to calibrate on; part of a result's name.

    Attributes:
        source: see `lowbit.model.text.iter_documents`.
        samples: rows, exactly as many or an error.
        length: tokens a row; in a recipe, the model's context if that is shorter.
        bos: what rows begin with, see `lowbit.model.bos.begun`.

    Raises:
        LowbitError: fewer than one sample or two tokens, no source, or no such choice of bos.
    """

    source: str = "stdlib"
    samples: int = 128
    length: int = 2048
    bos: str = "auto"

    def __post_init__(self) -> None:
        if not self.source:
            raise LowbitError(
                "calibration needs a text source (--calib): stdlib, a file, or a named corpus."
            )
        check_bos(self.bos)
        if self.samples < 1 or self.length < 2:
            raise LowbitError(
                f"calibration needs at least 1 sample of at least 2 tokens, got {self.samples} x "
                f"{self.length}."
            )


@dataclass(frozen=True)
class Rows:
    """Calibration tokens.

    Attributes:
        calibration: (samples, length) int64.
        held_out: (m, length) int64 from text that is not calibrated on; m may be 0.
        source: where they come from.
        tokens_available: tokens found on the calibration side: all of them, except for c4 and
            pile-val, whose documents are read until there are rows enough (of pile-val only those
            that are short enough to be used).
        conversations: documents among them that the model's chat template wrote out.
        first: token of the texts.
        further: (k, length) int64 of the same kind as ``calibration``, none of them in it or held
            out; k may be 0.
    """

    calibration: Tensor
    held_out: Tensor
    source: str
    tokens_available: int
    conversations: int = 0
    first: int | None = None
    further: Tensor | None = None

    @property
    def sha256(self) -> str:
        """Over the bytes of all."""
        h = hashlib.sha256(self.calibration.numpy().tobytes())
        h.update(b"|" + self.held_out.numpy().tobytes())
        if self.further is not None and len(self.further):
            h.update(b"|" + self.further.numpy().tobytes())
        return h.hexdigest()


def draw_rows(
    calib: Calibration, tokenizer: Any, seed: int, held_out: int = 16, further: int = 0
) -> Rows:
    """Exactly ``calib.samples`` rows, drawn with the seed, up to ``held_out`` rows of other text,
    and up to ``further`` rows drawn as the first ones are, which changes none of the others.

    wikitext2: random windows of the joined train split (as GPTQ). c4: a random window of random
    documents that are longer than a row (as GPTQ, but no document twice). pile-val: documents of at
    most 512 tokens, shuffled and joined, cut into rows (as AWQ). Everything else: documents joined,
    each with the special tokens that the tokenizer gives it (a conversation: those of the chat
    template), cut into rows, of which some are drawn.

    What rows begin with follows ``calib.bos`` (`lowbit.model.bos.begun`).

    Held-out rows are the first windows of the evaluation side; where there is only one side (files,
    folders, pile-val), rows or documents that were not drawn.

    Raises:
        LowbitError: the source is missing, unreadable or too short; says how much there was.
            Conversations that the model has no chat template for.
    """
    if min(held_out, further) < 0:
        raise LowbitError(f"rows cannot be negative, got {min(held_out, further)}.")
    draw = _DRAWS.get(calib.source, _from_all)
    rows = draw(calib, tokenizer, random.Random(seed), held_out, further)
    assert rows.further is not None
    calibration, spare, more = (
        begun(t, tokenizer, calib.bos, calib.source, rows.first)
        for t in (rows.calibration, rows.held_out, rows.further)
    )
    return replace(rows, calibration=calibration, held_out=spare, further=more)


def evaluation_windows(
    source: str, tokenizer: Any, length: int, limit: int | None = None, bos: str = "auto"
) -> Tensor:
    """Non-overlapping windows (n, length) int64, the tail dropped; at most ``limit``, and at most
    256 of c4.

    A single document (wikitext2, c4, a .txt file) is tokenised once; several documents are joined.
    Each has the special tokens that the tokenizer gives it: with most, BOS at its start, with some
    none. What windows begin with follows ``bos`` (`lowbit.model.bos.begun`).

    Raises:
        LowbitError: the text is missing or shorter than one window; a length or limit that leaves
            nothing to predict.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise LowbitError(
            f"evaluation needs at least 1 window of at least 2 tokens, got length {length}, "
            f"windows {limit}."
        )
    windows, tokens = _first_windows(source, tokenizer, length, limit)
    if not len(windows):
        raise LowbitError(
            f"'{source}' has {tokens} tokens, too few for a window of {length}. Use a smaller "
            "--length or more text."
        )
    return begun(windows, tokenizer, bos, source, int(windows[0, 0]))


def _first_windows(
    source: str, tokenizer: Any, length: int, limit: int | None
) -> tuple[Tensor, int]:
    """The first windows of the evaluation side, and how many tokens were tokenized for them."""
    texts = iter_documents(source, "eval")
    if source == "c4":
        limit = _C4_WINDOWS if limit is None else min(limit, _C4_WINDOWS)
    tokens = _joined(token_ids(tokenizer, texts), None if limit is None else limit * length)
    return _cut(tokens, length)[:limit].long(), len(tokens)


def _joined(documents: Iterator[list[int]], enough: int | None = None) -> array[int]:
    """Whole documents as one run of tokens, int32, until there are ``enough`` or no more
    documents.
    """
    out = array("i")  # a list takes nine times as much, and a source may have 1e9 tokens
    while enough is None or len(out) < enough:
        ids = next(documents, None)
        if ids is None:
            break
        out.extend(ids)
    return out


def _cut(tokens: array[int], length: int) -> Tensor:
    """Rows (n, length) int32 on the memory of the tokens."""
    count = len(tokens) // length
    if not count:
        return torch.empty(0, length, dtype=torch.int32)
    return torch.frombuffer(tokens, dtype=torch.int32, count=count * length).view(count, length)


def _spare(c: Calibration, tokenizer: Any, held_out: int) -> Tensor:
    """Held-out rows from the evaluation side of a source that has one; none if it is too short for
    one.
    """
    if not held_out:
        return torch.empty(0, c.length, dtype=torch.int64)
    return _first_windows(c.source, tokenizer, c.length, held_out)[0]


def _too_short(c: Calibration, rows: int, tokens: int) -> LowbitError:
    there = (
        f"'{c.source}' yields {rows} rows of {c.length} tokens ({tokens} tokens read), {c.samples} "
        "were asked for."
    )
    if rows:
        return LowbitError(f"{there} Use --samples {rows}, a smaller --length, or more text.")
    return LowbitError(f"{there} Use a smaller --length or more text.")


def _from_all(
    c: Calibration, tokenizer: Any, rng: random.Random, held_out: int, further: int
) -> Rows:
    chats = 0

    def counted() -> Iterator[Document]:
        nonlocal chats
        for document in iter_documents(c.source, "train"):
            chats += isinstance(document, Conversation)
            yield document

    tokens = _joined(token_ids(tokenizer, counted()))
    pool = _cut(tokens, c.length)
    order = rng.sample(range(len(pool)), len(pool))
    if len(pool) < c.samples:
        raise _too_short(c, len(pool), len(tokens))
    rest = order[c.samples : c.samples + held_out]
    spare = _spare(c, tokenizer, held_out) if c.source == "stdlib" else pool[sorted(rest)].long()
    drawn = pool[order[: c.samples]].long()
    more = pool[order[c.samples + held_out :][:further]].long()
    return Rows(drawn, spare, c.source, len(tokens), chats, tokens[0], more)


def _from_one_document(
    c: Calibration, tokenizer: Any, rng: random.Random, held_out: int, further: int
) -> Rows:
    ids = next(token_ids(tokenizer, iter_documents(c.source, "train")))
    last = len(ids) - c.length - 1
    if last < 0:
        raise _too_short(c, 0, len(ids))
    starts = [rng.randint(0, last) for _ in range(c.samples + further)]
    rows = torch.tensor([ids[s : s + c.length] for s in starts])
    spare, drawn, more = _spare(c, tokenizer, held_out), rows[: c.samples], rows[c.samples :]
    return Rows(drawn, spare, c.source, len(ids), further=more)


def _from_long_documents(
    c: Calibration, tokenizer: Any, rng: random.Random, held_out: int, further: int
) -> Rows:
    texts = [*iter_documents(c.source, "train")]
    rng.shuffle(texts)
    rows: list[list[int]] = []
    tokens = read = 0
    for ids in token_ids(tokenizer, texts):
        read += len(ids)
        if len(ids) > c.length:
            start = rng.randint(0, len(ids) - c.length - 1)
            rows.append(ids[start : start + c.length])
        if len(rows) <= c.samples and len(ids) > c.length:
            tokens = read
        if len(rows) == c.samples + further:
            break
    if len(rows) < c.samples:
        raise _too_short(c, len(rows), read)
    drawn = torch.tensor(rows)
    spare, more = _spare(c, tokenizer, held_out), drawn[c.samples :]
    return Rows(drawn[: c.samples], spare, c.source, tokens, further=more)


def _from_short_documents(
    c: Calibration, tokenizer: Any, rng: random.Random, held_out: int, further: int
) -> Rows:
    # All of them are.
    texts = [t.strip() for t in iter_documents(c.source, "train") if isinstance(t, str)]
    rng.shuffle(texts)
    short = (ids for ids in token_ids(tokenizer, texts) if len(ids) <= _PILE_DOCUMENT)
    tokens = _joined(short, c.samples * c.length)
    rows = _cut(tokens, c.length)[: c.samples].long()
    if len(rows) < c.samples:
        raise _too_short(c, len(rows), len(tokens))
    # The corpus has one split only, so what is held out are the documents that come next.
    spare = _cut(_joined(short, held_out * c.length), c.length)[:held_out].long()
    more = _cut(_joined(short, further * c.length), c.length)[:further].long()
    return Rows(rows, spare, c.source, len(tokens), further=more)


_DRAWS: dict[str, Callable[[Calibration, Any, random.Random, int, int], Rows]] = {
    "wikitext2": _from_one_document,
    "c4": _from_long_documents,
    "pile-val": _from_short_documents,
}
