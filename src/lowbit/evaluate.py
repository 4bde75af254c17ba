"""Perplexity as the papers compute it, and distance to a reference model: mean KL and top-1
agreement.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import LowbitError, unknown
from .model.checkpoint import Checkpoint
from .model.intake import check_read_as_floats, is_leftover
from .model.ranks import Ranks
from .model.skeleton import reason_of
from .model.stream import load_config

_LOGITS_AT_ONCE = 1 << 27  # of one forward pass
_PROBABILITIES_AT_ONCE = 1 << 24  # of one step of the sums: a few float32 temporaries of 64 MiB
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        perplexity: exp(nll). nll: mean negative log-likelihood in nats per predicted token.
        tokens: predicted tokens, windows * (length - 1). windows, length: what was fed.
        batch: windows that passed together, at most. Scales that a grid takes from all of a call
            depend on it (`CrossQuant`, `LLMInt8`).
        kl: mean KL(reference || model) per predicted token in nats. top1: share of equal most
            likely tokens.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    length: int
    batch: int
    kl: float | None = None
    top1: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The attributes, by their names."""
        return asdict(self)


class Tally:
    """Adds up an evaluation window by window: log-probabilities in float32, sums over tokens in
    float64.
    """

    def __init__(self) -> None:
        self._nll = self._kl = 0.0
        self._same = self._tokens = self._windows = self._length = self._batch = 0
        self._referenced: bool | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, ids: Tensor, reference: Tensor | None = None) -> None:
        """Count some windows.

        Args:
            logits: (n, length, vocab), any float dtype. ids: (n, length) int64. reference: the
                reference model's logits, same shape; for all windows of an evaluation or for none.

        Raises:
            LowbitError: shapes that do not fit together or to what was added before.
        """
        self._check(logits, ids, reference)
        for row in range(len(ids)):
            expected = None if reference is None else reference[row, :-1].to(logits.device)
            self._add_row(logits[row, :-1], ids[row, 1:].to(logits.device), expected)
        self._windows += len(ids)
        self._batch = max(self._batch, len(ids))

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
        if self._windows and (
            ids.shape[1] != self._length or (reference is not None) != self._referenced
        ):
            raise LowbitError(
                "windows of one evaluation must have one length, and all or none a reference."
            )
        self._length, self._referenced = ids.shape[1], reference is not None

    def _add_row(self, logits: Tensor, target: Tensor, reference: Tensor | None) -> None:
        """One window: logits (length - 1, vocab), target (length - 1,), reference as logits."""
        step = max(1, _PROBABILITIES_AT_ONCE // logits.shape[1])
        for at in range(0, len(target), step):
            part = slice(at, at + step)
            log_p = logits[part].float().log_softmax(-1)  # (step, vocab)
            self._nll -= _sum(log_p.gather(-1, target[part, None]))
            if reference is not None:
                log_q = reference[part].float().log_softmax(-1)
                self._kl += _sum(_kl(log_q, log_p))
                self._same += int((logits[part].argmax(-1) == reference[part].argmax(-1)).sum())
        self._tokens += len(target)

    def merge(self, ranks: Ranks) -> None:
        """Add what the other ranks have counted. Called by all, also by one that had no window."""
        self._nll, self._kl, *counts = ranks.total(
            self._nll, self._kl, self._same, self._tokens, self._windows
        )
        self._same, self._tokens, self._windows = (int(n) for n in counts)

    def result(self, batch: int | None = None) -> Evaluation:
        """The means over everything added.

        Args:
            batch: windows that passed the model together, at most; None where logits were added as
                they passed.

        Raises:
            LowbitError: nothing was.
        """
        if not self._tokens:
            raise LowbitError("nothing to evaluate: no window of at least 2 tokens.")
        nll = self._nll / self._tokens
        perplexity = math.inf if nll >= 700 else math.exp(nll)  # not finite stays not finite
        kl, top1 = (
            (self._kl / self._tokens, self._same / self._tokens)
            if self._referenced
            else (None, None)
        )
        return Evaluation(
            perplexity,
            nll,
            self._tokens,
            self._windows,
            self._length,
            batch or self._batch,
            kl,
            top1,
        )


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) per token: (n, vocab) log-probabilities twice -> (n,) nats, never negative.

    Summed as q (log q - log p) + (p - q): the second part adds up to zero, and with it no term is
    negative and an error in the normalization of either side, which float32 cannot avoid, cancels
    to first order. The plain sum loses small divergences.
    """
    q, p, d = log_q.exp(), log_p.exp(), log_p - log_q
    # P - q, without cancellation where the two are close.
    moved = torch.where(d < 1, q * d.expm1(), p - q)
    # 0 log 0 is 0, also where a logit is minus infinity.
    return torch.where(q == 0, p, moved - q * d).sum(-1)


def _sum(per_token: Tensor) -> float:
    # Off the device first: not every accelerator has float64.
    return float(per_token.cpu().sum(dtype=torch.float64))


def together(batch: int) -> str:
    """In words, how many windows passed together."""
    return f"{batch} {'window' if batch == 1 else 'windows'} a pass"


def load_causal_lm(model: str, device: str, dtype: str = "auto") -> Any:
    """A model through plain transformers; "auto" is float32 on a CPU and the checkpoint's own dtype
    elsewhere.

    Args:
        model: local folder or hub id, of floats or of codes that transformers can read. No code
            that comes with it is run.
        device: such as "cpu" or "cuda:0". dtype: auto, float32, bfloat16 or float16.

    Raises:
        LowbitError: missing, unreadable, unsupported, or without some of its tensors.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    checkpoint = Checkpoint(model)
    stored = checkpoint.stored()  # finds missing and truncated shards before transformers does
    config = load_config(checkpoint)
    leftover = is_leftover(checkpoint, stored)
    if leftover:
        del config.quantization_config
    kind: Any = (
        dtype if dtype != "auto" else ("float32" if torch.device(device).type == "cpu" else "auto")
    )
    path = checkpoint.file("config.json")
    assert path is not None  # Checkpoint() has checked
    options = {
        "config": config,
        "dtype": kind,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    options["ignore_mismatched_sizes"] = True  # refused below, by name
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    except Exception as e:  # each model class and each quantizer fails in ways of its own
        raise LowbitError(f"transformers cannot load '{model}': {reason_of(e)}") from e
    if found["mismatched_keys"]:
        name, held, wanted = min(found["mismatched_keys"])
        raise LowbitError(
            f"tensor '{name}' of '{model}' is {tuple(held)}, its config.json wants {tuple(wanted)} "
            f"({len(found['mismatched_keys'])} such in all): "
            "the checkpoint does not fit its config.json."
        )
    if found["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise LowbitError(
            f"tensor '{min(found['missing_keys'])}' is missing from '{model}' "
            f"({len(found['missing_keys'])} in all): "
            "the checkpoint does not fit its config.json."
        )
    # Else it is for its loader to know what the numbers mean.
    if leftover or not checkpoint.config_json.get("quantization_config"):
        # These are not among the unexpected ones.
        ignored = [re.compile(p) for p in loaded._keys_to_ignore_on_load_unexpected or ()]
        unused = {
            *found["unexpected_keys"],
            *(n for n in stored if any(p.search(n) for p in ignored)),
        }
        check_read_as_floats(checkpoint, stored, unused)
    return loaded.to(device).eval()


def _vocabulary(model: Any) -> int:
    # Models that also see keep the text model's config inside their own.
    return int(model.config.get_text_config().vocab_size)


def _check_windows(windows: Tensor, vocab: int, reference: Any) -> None:
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
    if reference is not None and _vocabulary(reference) != vocab:
        raise LowbitError(
            f"the reference has {_vocabulary(reference)} tokens in its vocabulary, the model "
            f"{vocab}: they cannot be compared."
        )


@torch.no_grad()
def evaluate(
    model: Any,
    windows: Tensor,
    reference: Any = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a transformers model on windows (n, length) int64, and its distance to a
    reference model.

    Args:
        model, reference: as from `load_causal_lm`, on any devices.
        batch: windows a forward pass, at most: fewer where their logits would be too many.
        progress: told windows done and windows in all after each pass.

    Raises:
        LowbitError: no windows, a token id outside the vocabulary, a reference with another one, or
            logits that are not numbers.
    """
    vocab = _vocabulary(model)
    _check_windows(windows, vocab, reference)
    step = max(1, min(batch, _LOGITS_AT_ONCE // (windows.shape[1] * vocab)))
    tally = Tally()
    for at in range(0, len(windows), step):
        ids = windows[at : at + step]
        expected = (
            None
            if reference is None
            else _numbers(
                reference(ids.to(reference.device), use_cache=False).logits, "the reference"
            )
        )
        tally.add(
            _numbers(model(ids.to(model.device), use_cache=False).logits, "the model"),
            ids,
            expected,
        )
        if progress:
            progress(min(at + step, len(windows)), len(windows))
    return tally.result()


def _numbers(logits: Tensor, whose: str) -> Tensor:
    """Logits that are numbers; a model that gives others has no perplexity to tell."""
    if bool(torch.isnan(logits).any()):
        raise LowbitError(
            f"{whose} computes logits that are not numbers: a weight is not finite, or activations "
            "overflow. 'lowbit quantize' names where."
        )
    return logits


@torch.no_grad()
def continue_text(
    model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """The prompt with up to ``tokens`` new tokens; greedy at temperature 0.

    Raises:
        LowbitError: no tokens asked for, a temperature below 0, an empty prompt, one that leaves no
            room in the model's context, or logits that are not numbers.
    """
    if tokens < 1 or not 0 <= temperature < math.inf:
        raise LowbitError(
            f"generation needs at least 1 token and a temperature from 0 up, got {tokens} and "
            f"{temperature:g}."
        )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if not ids.shape[1]:
        raise LowbitError("the prompt is empty.")
    if ids.shape[1] >= context:
        raise LowbitError(
            f"the prompt has {ids.shape[1]} tokens, the model's context is {context}."
        )
    _numbers(model(ids, use_cache=False).logits[:, -1], "the model")
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    room = min(tokens, context - ids.shape[1])
    produced = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        pad_token_id=tokenizer.eos_token_id or 0,
        **sampling,
    )
    return str(tokenizer.decode(produced[0], skip_special_tokens=True))
