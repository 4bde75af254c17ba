"""The model that an export holds, where its numbers are not quite those that were tuned."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...model.experts import replace_fused


class RoundedModel:
    """A transformers model in float32 that takes its weights one by one.

    Args:
        config: of transformers. spot: full parameter name, as transformers or a checkpoint has it
            -> where it lies, the same for both.
    """

    def __init__(self, config: Any, spot: Callable[[str], Hashable] = str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with no_init_weights():
            self._model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        self._model.tie_weights()
        replace_fused(self._model)
        self._spot = spot
        self._left = {spot(n): (n, p) for n, p in self._model.named_parameters()}

    @torch.no_grad()
    def put(self, full: str, value: Tensor) -> None:
        """One parameter by its full name; a copy of a tied one that a file holds all the same is
        left out.
        """
        _, own = self._left.pop(self._spot(full), (full, None))
        if own is not None:
            own.copy_(value)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """(n, length) int64 -> (n, length, vocab) float32."""
        if self._left:
            name, _ = next(iter(self._left.values()))
            raise ValueError(f"'{name}' was never put in")
        return torch.cat([self._model(row[None], use_cache=False).logits for row in ids])
