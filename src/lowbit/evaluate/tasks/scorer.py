"""The language model that lm-eval asks: its own Hugging Face one, which here also reports progress
and what it had to cut.

The only module that imports lm-eval when it is itself imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

from ...errors import LowbitError


class Scorer(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """Log-likelihoods of continuations.

    Args:
        model, tokenizer: as from `lowbit.evaluate.load_causal_lm` and
            `lowbit.model.tokenizer.load_tokenizer`.
        batch: rows a forward pass.
        progress: called with rows done and rows in all after each pass.

    Attributes:
        cut: (task, document number) of the examples whose prompts lost their beginning to fit into
            the model's context.

    Raises:
        LowbitError: from `loglikelihood`, an answer that has no token or more than the context
            takes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
        self.cut: set[tuple[str, int]] = set()
        self._asked: list[tuple[str, int]] = []
        self._progress = progress
        self._done = 0
        self._rows = 0

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._asked = [(r.task_name, r.doc_id) for r in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for (task, number), (_, context, answer) in zip(self._asked, requests, strict=True):
            if not answer or len(answer) > self.max_length:
                what = "has no token of its own"
                if answer:
                    what = f"takes {len(answer)} tokens, the model's context {self.max_length}"
                raise LowbitError(
                    f"task '{task}', example {number + 1}: an answer {what}; this model cannot be "
                    "asked."
                )
            if len(context) + len(answer) > self.max_length + 1:
                self.cut.add((task, number))
        # Answers of one token to one context share a row.
        rows = {(*context, *answer[:-1]) for _, context, answer in requests}
        self._rows = len(rows)
        self._done = 0
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=override_bs
        )
        return found

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._done += len(inps)
        if self._progress:
            self._progress(self._done, self._rows)
        return logits
