"""Documents through a tokenizer: plain texts as it marks them itself, conversations as its chat template writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from ..errors import LowbitError
from .records import Conversation, Document

_AT_ONCE = (
    64  # documents a tokenizer call: enough to keep its threads busy, few enough to stop early
)


def token_ids(tokenizer: Any, documents: Sequence[Document]) -> Iterator[list[int]]:
    """The token ids of each document, made as they are asked for.

    A plain text gets the special tokens that the tokenizer puts around a text by itself, and no others: a
    tokenizer may know a first token and add none. A conversation gets those that the chat template writes.

    Raises:
        LowbitError: see `written`.
    """
    for chat, run in groupby(documents, key=lambda d: isinstance(d, Conversation)):
        while some := list(islice(run, _AT_ONCE)):
            texts = [d if isinstance(d, str) else written(d, tokenizer) for d in some]
            yield from tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]


def written(conversation: Conversation, tokenizer: Any) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included.

    Raises:
        LowbitError: there is no template, it does not take these messages, or it leaves a tool or a call out.
    """
    where = conversation.where
    if not tokenizer.chat_template:
        raise LowbitError(
            f"{where} is a conversation, and the model's tokenizer has no chat template to write it with. Put the "
            "chat_template.jinja of its instruct model beside tokenizer.json, or give plain texts (field 'text')."
        )
    tools = list(conversation.tools) or None
    try:
        text = tokenizer.apply_chat_template(
            list(conversation.messages), tools=tools, tokenize=False
        )
    except Exception as e:  # templates are programs: they refuse, and fail, in ways of their own
        reason = next(iter(str(e).splitlines()), "").rstrip(".") or type(e).__name__
        raise LowbitError(
            f"{where}: the model's chat template does not take it ({reason}). Repair or drop it."
        ) from e
    lost = next((n for n in _functions(conversation) if n not in text), None)
    if lost is not None:
        raise LowbitError(
            f"{where}: the model's chat template leaves the tool '{lost}' out. Give conversations without tools, or a "
            "model whose template writes them."
        )
    return str(text)


def _functions(conversation: Conversation) -> Iterator[str]:
    """Names of the functions that are described or called."""
    calls = [c for m in conversation.messages for c in m.get("tool_calls", ())]
    for item in (*conversation.tools, *calls):
        function = item.get("function", item)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name
