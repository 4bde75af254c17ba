"""Perplexity of a model on windows as the papers compute it, and distance to a reference model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from .tally import Evaluation, Tally

_LOGITS_AT_ONCE = 1 << 27  # of one forward pass


@torch.no_grad()
def evaluate(
    model: Any,
    windows: Tensor,
    reference: Any = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure the perplexity of a transformers model and its distance to a reference model.

    Args:
        model, reference: as from `load_causal_lm`, on any devices.
        windows: (n, length) int64 token ids.
        batch: upper bound on the windows of a forward pass. It takes fewer where their logits would
            be too many.
        progress: called with windows done and windows in all after each pass.

    Raises:
        LowbitError: no windows, a token id outside the vocabulary, a reference with another one, or
            logits that are not numbers.
    """
    vocab = vocabulary(model)
    check_windows(windows, vocab, reference)
    step = max(1, min(batch, _LOGITS_AT_ONCE // (windows.shape[1] * vocab)))
    tally = Tally()
    for at in range(0, len(windows), step):
        ids = windows[at : at + step]
        expected = None if reference is None else _logits(reference, ids, "the reference")
        tally.add(_logits(model, ids, "the model"), ids, expected)
        if progress:
            progress(min(at + step, len(windows)), len(windows))
    return tally.result()


def _logits(model: Any, ids: Tensor, whose: str) -> Tensor:
    """Return the logits (n, length, vocab) of ids (n, length), on the model's device."""
    return numeric(model(ids.to(model.device), use_cache=False).logits, whose)


def numeric(logits: Tensor, whose: str) -> Tensor:
    """Return logits in which no element is nan.

    Args:
        whose: the model that computed them, for the error.

    Raises:
        LowbitError: some are nan.
    """
    if bool(torch.isnan(logits).any()):
        raise LowbitError(
            f"{whose} computes logits that are not numbers: a weight is not finite, or activations "
            "overflow. 'lowbit quantize' names where."
        )
    return logits


def vocabulary(model: Any) -> int:
    """Return the number of tokens."""
    # Models that also see keep the text model's config inside their own.
    return int(model.config.get_text_config().vocab_size)


def check_windows(windows: Tensor, vocab: int, reference: Any = None) -> None:
    """Refuse windows that the model cannot read, and a reference with another vocabulary."""
    if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
        raise LowbitError(
            f"nothing to evaluate: windows have shape {tuple(windows.shape)}, not (at least 1, at "
            "least 2)."
        )
    top = int(windows.max())
    if top >= vocab:
        raise LowbitError(
            f"the text has token id {top}, the vocabulary ends at {vocab - 1}: is it the model's "
            "own tokenizer?"
        )
    if reference is not None:
        check_against(vocabulary(reference), vocab)


def check_against(reference: int, vocab: int) -> None:
    """Refuse a reference with another number of tokens in its vocabulary than the model's."""
    if reference != vocab:
        raise LowbitError(
            f"the reference has {reference} tokens in its vocabulary, the model {vocab}: they "
            "cannot be compared."
        )
