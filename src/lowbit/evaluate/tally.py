"""Sums of an evaluation: perplexity, mean KL and top-1 agreement, added up window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..model.context import SUMMED
from ..model.ranks import Ranks


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood in nats per predicted token.
        tokens: predicted tokens, windows * (length - 1).
        windows, length: number of windows and tokens in each.
        batch: largest number of windows in one forward pass. Scales that a grid takes from a whole
            call depend on it (`CrossQuant`, `LLMInt8`).
        kl: mean KL(reference || model) per predicted token in nats.
        top1: share of tokens on which both models' most likely token is the same.
        kl_median, kl_p99, kl_max: of the tokens' KL, the 50th and 99th percentile (between the two
            nearest tokens) and the most.
        perplexity_error, kl_error, top1_error: standard errors, as if tokens were independent;
            perplexity's to first order. None of a single token.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    length: int
    batch: int
    kl: float | None = None
    top1: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by their names."""
        return asdict(self)


def together(batch: int) -> str:
    """Return the number of windows in a forward pass, in words."""
    return f"{batch} {'window' if batch == 1 else 'windows'} a pass"


class Tally:
    """Adds up an evaluation window by window.

    Log-probabilities are float32, sums over tokens float64. Each token's are held, 8 bytes.
    """

    def __init__(self) -> None:
        self._nll: list[Tensor] = []  # of single tokens, (n,) float32 each
        self._kl: list[Tensor] = []
        self._same = 0  # tokens on which the reference agrees
        self._windows = 0
        self._length = 0
        self._batch = 0
        self._referenced: bool | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, ids: Tensor, reference: Tensor | None = None) -> None:
        """Add some windows.

        Args:
            logits: (n, length, vocab), any float dtype.
            ids: (n, length) int64.
            reference: the reference model's logits, same shape; for all windows of an evaluation
                or for none.

        Raises:
            LowbitError: the shapes do not fit together, or differ from those added before.
        """
        self._check(logits, ids, reference)
        self.count_windows(ids.shape, reference is not None)
        for row in range(len(ids)):
            expected = None if reference is None else reference[row, :-1].to(logits.device)
            self.add_tokens(logits[row, :-1], ids[row, 1:].to(logits.device), expected)

    def count_windows(self, shape: Sequence[int], referenced: bool) -> None:
        """Count windows, whose tokens `add_tokens` is given.

        Args:
            shape: (n, length) of them. referenced: a reference was given.

        Raises:
            LowbitError: windows of another length were added before, or with a reference and
                without.
        """
        count, length = shape
        if self._windows and (length, referenced) != (self._length, self._referenced):
            raise LowbitError(
                "windows of one evaluation must have one length, and all or none a reference."
            )
        self._length, self._referenced = length, referenced
        self._windows += count
        self._batch = max(self._batch, count)

    def _check(self, logits: Tensor, ids: Tensor, reference: Tensor | None) -> None:
        if logits.shape[:2] != ids.shape:
            raise LowbitError(
                f"logits {tuple(logits.shape)} do not belong to token ids {tuple(ids.shape)}."
            )
        if reference is not None and reference.shape != logits.shape:
            raise LowbitError(
                f"the reference gives logits {tuple(reference.shape)}, the model "
                f"{tuple(logits.shape)}: is it the same vocabulary?"
            )

    @torch.no_grad()
    def add_tokens(self, logits: Tensor, target: Tensor, reference: Tensor | None = None) -> None:
        """Add some tokens of a window, which `count_windows` counts.

        Args:
            logits: (n, vocab), any float dtype. target: (n,) int64, what follows each.
            reference: as logits, on the same device.
        """
        step = max(1, SUMMED // logits.shape[1])
        for at in range(0, len(target), step):
            part = slice(at, at + step)
            log_p = logits[part].float().log_softmax(-1)  # (step, vocab)
            self._nll.append(-log_p.gather(-1, target[part, None])[:, 0].cpu())
            if reference is not None:
                log_q = reference[part].float().log_softmax(-1)
                self._kl.append(_kl(log_q, log_p).cpu())
                self._same += int((logits[part].argmax(-1) == reference[part].argmax(-1)).sum())

    def merge(self, ranks: Ranks) -> None:
        """Add the tokens of the other ranks. Every rank calls it, also one that had no window."""
        told = ranks.everyone((_all(self._nll), _all(self._kl), self._same, self._windows))
        nll, kl, same, windows = zip(*told, strict=True)
        self._nll, self._kl = list(nll), list(kl)
        self._same, self._windows = sum(same), sum(windows)

    def result(self, batch: int | None = None) -> Evaluation:
        """Return the means over everything added.

        Args:
            batch: largest number of windows in one forward pass; None where logits were added as
                they were computed.

        Raises:
            LowbitError: nothing was added.
        """
        each = _all(self._nll)
        if not len(each):
            raise LowbitError("nothing to evaluate: no window of at least 2 tokens.")
        nll, error = _mean(each)
        perplexity = math.inf if nll >= 700 else math.exp(nll)  # not finite stays not finite
        found = Evaluation(
            perplexity=perplexity,
            nll=nll,
            tokens=len(each),
            windows=self._windows,
            length=self._length,
            batch=batch or self._batch,
            perplexity_error=None if error is None else perplexity * error,
        )
        return replace(found, **self._against_reference()) if self._referenced else found

    def _against_reference(self) -> dict[str, Any]:
        """Return what an evaluation says of the distance to the reference."""
        each = _all(self._kl)
        mean, error = _mean(each)
        ordered, share, count = each.double().sort().values, self._same / len(each), len(each)
        spread = None if count < 2 else math.sqrt(share * (1 - share) / (count - 1))
        return {
            "kl": mean,
            "kl_error": error,
            "kl_median": _quantile(ordered, 0.5),
            "kl_p99": _quantile(ordered, 0.99),
            "kl_max": float(ordered[-1]),
            "top1": share,
            "top1_error": spread,
        }


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(q || p) per token: (n, vocab) log-probabilities twice -> (n,) nats, never negative.

    The sum is over q (log q - log p) + (p - q). The second part adds up to zero. With it no term is
    negative, and an error in the normalization of either side, which float32 cannot avoid, cancels
    to first order. The plain sum loses small divergences.
    """
    q, p, d = log_q.exp(), log_p.exp(), log_p - log_q
    # P - q, without cancellation where the two are close.
    moved = torch.where(d < 1, q * d.expm1(), p - q)
    # 0 log 0 is 0, also where a logit is minus infinity.
    return torch.where(q == 0, p, moved - q * d).sum(-1)


def _all(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0)


def _mean(each: Tensor) -> tuple[float, float | None]:
    """Return the mean, and its standard error, of (n,) float32."""
    wide, count = each.double(), len(each)
    error = None if count < 2 else float(wide.std()) / math.sqrt(count)
    return float(wide.mean()), error


def _quantile(ordered: Tensor, share: float) -> float:
    """Return the number below which a share of ascending ones lies, between the two nearest."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
