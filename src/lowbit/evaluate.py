"""Perplexity as the papers compute it, and distance to a reference model: mean KL and top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import LowbitError
from .model.checkpoint import Checkpoint
from .model.stream import load_config

_LOGITS_AT_ONCE = 1 << 27


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        perplexity: exp(nll). nll: mean negative log-likelihood in nats per predicted token.
        tokens: predicted tokens, windows * (length - 1). windows, length: what was fed.
        kl: mean KL(reference || model) per predicted token in nats. top1: share of equal most likely tokens.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    length: int
    kl: float | None = None
    top1: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tally:
    """Adds up an evaluation window by window, in float64."""

    def __init__(self) -> None:
        self._nll = self._kl = 0.0
        self._same = self._tokens = self._windows = self._length = 0
        self._referenced = False

    @torch.no_grad()
    def add(self, logits: Tensor, ids: Tensor, reference: Tensor | None = None) -> None:
        """Count some windows.

        Args:
            logits: (n, length, vocab). ids: (n, length) int64. reference: the reference model's logits, same shape.
        """
        log_p = logits[:, :-1].float().log_softmax(-1)
        target = ids[:, 1:, None].to(log_p.device)
        self._nll -= float(log_p.gather(-1, target).sum(dtype=torch.float64))
        self._tokens += target.numel()
        self._windows += len(ids)
        self._length = ids.shape[1]
        if reference is not None:
            log_q = reference[:, :-1].to(log_p.device).float().log_softmax(-1)
            self._kl += float((log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64))
            self._same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self._referenced = True

    def result(self) -> Evaluation:
        """The means over everything added."""
        nll = self._nll / self._tokens
        perplexity = math.exp(nll) if nll < 700 else math.inf
        kl, top1 = (self._kl / self._tokens, self._same / self._tokens) if self._referenced else (None, None)
        return Evaluation(perplexity, nll, self._tokens, self._windows, self._length, kl, top1)


def load_causal_lm(model: str, device: str, dtype: str = "auto") -> Any:
    """A model through plain transformers; "auto" is float32 on a CPU and the checkpoint's own dtype elsewhere.

    Raises:
        LowbitError: missing, unreadable or unsupported.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(model)
    load_config(checkpoint)
    checkpoint.shapes()  # finds missing and truncated shards before transformers does
    kind: Any = dtype if dtype != "auto" else ("float32" if device == "cpu" else "auto")
    path = checkpoint.file("config.json")
    assert path is not None
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=kind, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as e:
        raise LowbitError(f"transformers cannot load '{model}': {str(e).splitlines()[0]}") from e
    return loaded.to(device).eval()


@torch.no_grad()
def evaluate(
    model: Any, windows: Tensor, reference: Any = None, batch: int = 8, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Perplexity of a transformers model on windows (n, length), and its distance to a reference model.

    Raises:
        LowbitError: a token id outside the vocabulary, or a reference with another one.
    """
    vocab = model.config.vocab_size
    if int(windows.max()) >= vocab:
        raise LowbitError(f"the text has token id {int(windows.max())}, the model's vocabulary ends at {vocab - 1}: is it the model's own tokenizer?")
    if reference is not None and reference.config.vocab_size != vocab:
        raise LowbitError(f"the reference has {reference.config.vocab_size} tokens in its vocabulary, the model {vocab}: they cannot be compared.")
    step = max(1, min(batch, _LOGITS_AT_ONCE // (windows.shape[1] * vocab)))
    tally = Tally()
    for at in range(0, len(windows), step):
        ids = windows[at : at + step].to(model.device)
        expected = None if reference is None else reference(ids, use_cache=False).logits
        tally.add(model(ids, use_cache=False).logits, ids, expected)
        if progress:
            progress(min(at + step, len(windows)), len(windows))
    return tally.result()


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """The prompt with up to ``tokens`` new tokens; greedy at temperature 0.

    Raises:
        LowbitError: an empty prompt, or one that leaves no room in the model's context.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if not ids.shape[1]:
        raise LowbitError("the prompt is empty.")
    if ids.shape[1] >= context:
        raise LowbitError(f"the prompt has {ids.shape[1]} tokens, the model's context is {context}.")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    room = min(tokens, context - ids.shape[1])
    produced = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, pad_token_id=tokenizer.eos_token_id or 0, **sampling
    )
    return str(tokenizer.decode(produced[0], skip_special_tokens=True))
