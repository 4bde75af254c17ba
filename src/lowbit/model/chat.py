"""Documents through a tokenizer: plain texts as it marks them itself, conversations as its chat
template writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from ..errors import LowbitError
from .records import Conversation, Document, Message

_AT_ONCE = (
    64  # documents a tokenizer call: enough to keep its threads busy, few enough to stop early
)


def token_ids(tokenizer: Any, documents: Iterable[Document]) -> Iterator[list[int]]:
    """The token ids of each document, made as they are asked for.

    A plain text gets the special tokens that the tokenizer puts around a text by itself, and no
    others: a tokenizer may know a first token and add none. A conversation gets those that the chat
    template writes.

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
        LowbitError: there is no template, it does not take these messages, it leaves a tool, a call
            or a message of another than the assistant out, or what it writes is no text that a
            tokenizer takes.
    """
    where = conversation.where
    if not tokenizer.chat_template:
        raise LowbitError(
            f"{where} is a conversation, and the model's tokenizer has no chat template to write "
            "it with. Put the "
            "chat_template.jinja of its instruct model beside tokenizer.json, or give plain texts "
            "(field 'text')."
        )
    messages = list(conversation.messages)
    try:
        text = _rendered(messages, conversation, tokenizer)
    except Exception as e:  # templates are programs: they refuse, and fail, in ways of their own
        reason = next(iter(str(e).splitlines()), "").rstrip(".") or type(e).__name__
        raise LowbitError(
            f"{where}: the model's chat template does not take it ({reason}). Repair or drop it."
        ) from e
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise LowbitError(
            f"{where}: a field holds half of a surrogate pair, which no tokenizer takes. "
            "Repair or drop it."
        ) from e
    lost = next((n for n in _functions(conversation) if n not in text), None)
    if lost is not None:
        raise LowbitError(
            f"{where}: the model's chat template leaves the tool '{lost}' out. Give conversations "
            "without tools, or a "
            "model whose template writes them."
        )
    doubtful = _doubtful(messages, text)
    unread = next((m for m in doubtful if _is_unread(m, conversation, text, tokenizer)), None)
    if unread is not None:
        raise LowbitError(
            f"{where}: the model's chat template leaves the message of role '{unread['role']}' "
            "out. "
            "Give conversations without this role, or a model whose template writes it."
        )
    return text


def _rendered(messages: list[Message], conversation: Conversation, tokenizer: Any) -> str:
    tools = list(conversation.tools) or None
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


def _doubtful(messages: list[Message], text: str) -> list[Message]:
    """Messages of others than the assistant whose content does not stand in the text as it is.

    Each stretch of the text stands for one message, the longest first: a short content that only
    occurs within another message does not count as written.
    """
    missing = []
    filled = [m for m in messages if m["content"].strip()]
    for message in sorted(filled, key=lambda m: len(m["content"]), reverse=True):
        before, found, after = text.partition(message["content"].strip())
        if found:
            text = f"{before}\0{after}"
        elif message["role"] != "assistant":
            missing.append(message)
    return missing


def _is_unread(message: Message, conversation: Conversation, text: str, tokenizer: Any) -> bool:
    """Whether the text stays the same when the message says something else.

    Templates may change what they write (escape it, drop a switch such as /no_think), so that a
    content which is not found may be there all the same.
    """
    other = {**message, "content": f"{message['content']} and more"}
    changed = [other if m is message else m for m in conversation.messages]
    try:
        return _rendered(changed, conversation, tokenizer) == text
    except Exception:  # the template looked at the content
        return False


def _functions(conversation: Conversation) -> Iterator[str]:
    """Names of the functions that are described or called."""
    calls = [c for m in conversation.messages for c in m.get("tool_calls", ())]
    for item in (*conversation.tools, *calls):
        function = item.get("function", item)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name
