"""The same evaluation of models of which one block is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..model.context import token_parts
from .perplexity import check_against, check_windows, numeric
from .tally import Evaluation, Tally

Progress = Callable[[int, int], None]
_FLOAT32 = 4  # bytes
_HELD = 3  # of the size of what leaves a block: its input, its output, and what is made of them


class Passing(Protocol):
    """A model that windows pass block by block."""

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        ...

    @property
    def width(self) -> int:
        """Numbers of a token that go from block to block."""
        ...

    @property
    def blocks(self) -> int:
        """How many there are."""
        ...

    def together(self, length: int) -> int:
        """Windows of so many tokens in one pass of a block."""
        ...

    def hidden(self, windows: Tensor, progress: Callable[[], None]) -> Tensor:
        """What leaves the last block, (n, length, width) float32, of windows (n, length) int64."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, length, width) -> (n, length, vocab) float32."""
        ...


@torch.no_grad()
def evaluate_by_block(
    model: Passing,
    windows: Tensor,
    reference: Passing | None = None,
    room: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the perplexity of a model and its distance to a reference model, as `evaluate`.

    Args:
        windows: (n, length) int64 token ids.
        room: bytes for what goes from block to block, at least of one window: more windows than
            that have the blocks read again. None for all at once.
        progress: called with blocks done and blocks in all.

    Raises:
        LowbitError: as `evaluate`.
    """
    check_windows(windows, model.vocab)
    both = [model] if reference is None else [reference, model]
    if reference is not None:
        check_against(reference.vocab, model.vocab)
    length = windows.shape[1]
    own = sum(m.width for m in both) * length * _FLOAT32 * _HELD
    step = len(windows) if room is None else max(1, min(len(windows), room // own))
    total = -(-len(windows) // step) * sum(m.blocks for m in both)
    done = 0

    def block() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    tally = Tally()
    for at in range(0, len(windows), step):
        ids = windows[at : at + step]
        _add(tally, [(m, m.hidden(ids, block)) for m in both], ids)
    return tally.result(min(step, model.together(length)))


def _add(tally: Tally, passed: list[tuple[Passing, Tensor]], ids: Tensor) -> None:
    """Add what some models predict, the reference before the model, part by part of a window."""
    count, length = ids.shape
    tally.count_windows((count, length), referenced=len(passed) > 1)
    for i in range(count):
        for part in token_parts(length - 1, passed[-1][0].vocab):
            found = [m.logits(x[i : i + 1, part])[0] for m, x in passed]
            numeric(found[-1], "the model")
            expected = numeric(found[0], "the reference") if len(found) > 1 else None
            tally.add_tokens(found[-1], ids[i, 1:][part].to(found[-1].device), expected)
