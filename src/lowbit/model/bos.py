"""What a row of tokens begins with.

A model that was trained with a token at the beginning of every text (BOS) attends to it wherever it
has nothing to look for. In a row that is cut out of the middle of a text, the first token takes its
place; some models (Gemma) then predict far worse than they ever do in use.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from ..errors import LowbitError, unknown

Bos = Literal["auto", "yes", "no"]

# Cut from the middle of texts by those who publish figures on them.
PUBLISHED = ("wikitext2", "c4", "pile-val")


def check_bos(bos: str) -> None:
    """Raise LowbitError: no such choice."""
    if bos not in get_args(Bos):
        raise unknown("choice of bos", bos, get_args(Bos))


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its BOS token before a text by itself."""
    ids = tokenizer("a").input_ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def begun(rows: Tensor, tokenizer: Any, bos: str, source: str, first: int | None) -> Tensor:
    """Rows as a model reads them: where they begin with BOS, it replaces their first token.

    Args:
        rows: (n, length) int64, cut out of texts.
        bos: "yes", "no" (as the text goes on), or "auto": as the texts themselves begin, by their
            tokenizer or their chat template; but rows of the corpora that papers name stay as
            papers cut them.
        source: where the rows come from. first: token of its texts, None of none.

    Returns:
        (n, length) int64; ``rows`` itself where they stay.

    Raises:
        LowbitError: "yes" of a tokenizer without a BOS token; no such choice.
    """
    check_bos(bos)
    own = tokenizer.bos_token_id
    if bos == "no" or (bos == "auto" and (source in PUBLISHED or own is None or first != own)):
        return rows
    if own is None:
        raise LowbitError(
            "the model's tokenizer has no BOS token for rows to begin with: leave the option bos "
            "at 'auto'."
        )
    out = rows.clone()
    out[:, :1] = own
    return out


def said_of(rows: Tensor, tokenizer: Any) -> str:
    """What a person should know of how windows (n, length) begin, to follow their number; "" where
    there is nothing to know.
    """
    if not adds_bos(tokenizer):
        return ""
    every = bool((rows[:, 0] == tokenizer.bos_token_id).all())
    return " that begin with BOS" if every else " cut without BOS"
