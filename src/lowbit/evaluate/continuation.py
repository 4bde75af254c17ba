"""Text that a model continues."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import LowbitError
from .perplexity import numeric


@torch.no_grad()
def continue_text(
    model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """Return the prompt with up to ``tokens`` new tokens.

    Args:
        model, tokenizer: as from `load_causal_lm` and `lowbit.model.tokenizer.load_tokenizer`.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.

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
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if not ids.shape[1]:
        raise LowbitError("the prompt is empty.")
    if ids.shape[1] >= context:
        raise LowbitError(
            f"the prompt has {ids.shape[1]} tokens, the model's context is {context}."
        )
    numeric(model(ids, use_cache=False).logits[:, -1], "the model")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    room = min(tokens, context - ids.shape[1])
    produced = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        pad_token_id=tokenizer.eos_token_id or 0,
        **sampling,
    )
    return str(tokenizer.decode(produced[0], skip_special_tokens=True))
