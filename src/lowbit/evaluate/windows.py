"""How many tokens a window has."""

from __future__ import annotations

from typing import Any

from ..errors import LowbitError

_USUAL = 2048  # tokens, as in the papers


def window_length(config: Any, asked: int | None, option: str = "--length") -> int:
    """Return the window length asked for; by default 2048, or the model's context if shorter.

    Args:
        config: of transformers, which may or may not name a context.
        option: the name of the option, for the error.

    Raises:
        LowbitError: the length asked for is beyond the context.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or _USUAL
    if asked is not None and asked > context:
        raise LowbitError(f"{option} {asked} is beyond the model's context of {context} tokens.")
    return asked or min(_USUAL, context)
