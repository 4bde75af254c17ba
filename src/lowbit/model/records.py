"""What a record of a data set holds: a plain text, or a conversation for the model's chat
template.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LowbitError

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template writes out; see `lowbit.model.chat`.

    Attributes:
        messages: each with ``role`` and ``content``, a text; perhaps ``tool_calls``, whose
            arguments are objects, and whatever else the record has.
        tools: descriptions of the functions that may be called; empty if there are none.
        where: file or data set, and record, as a refusal names it.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    where: str


Document = str | Conversation

_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_BESIDE = ("input", "system", "tools")  # read where they are, besides the fields of a form
_CONVERSATION = (
    "'messages', 'conversations', 'prompt' with 'completion' or 'response', or 'instruction' with "
    "'output'"
)
# ShareGPT's names, and those of its relatives.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def document(record: Any, where: str) -> Document:
    """The text or conversation in a record: a string, or an object with the fields of one of the
    forms.

    The first form counts whose fields hold something: ``text``; ``messages`` or ``conversations``,
    a list of role and content or of from and value; ``prompt`` and ``completion`` or ``response``,
    texts or lists of messages; ``instruction``, perhaps ``input``, and ``output``. Lists may be
    written as JSON.

    Args:
        where: file or data set, and record, for a refusal.

    Raises:
        LowbitError: none of the forms, or one that is not filled as it should be; names the fields
            found.
    """
    if isinstance(record, str):
        return _text(record, where)
    if not isinstance(record, dict):
        raise LowbitError(f"{where}: {_expected()}; it is {_kind(record)}.")
    text = record.get("text")
    if text is not None and not isinstance(text, str):
        raise LowbitError(f"{where}: {_expected()}; its 'text' is {_kind(text)}.")
    if text and text.strip():  # a cell of a table without nulls is empty where others have null
        return _text(text, where)
    for name in _CHATS:
        if record.get(name) is not None:
            return _conversation(record, _messages(record[name], where, name), where)
    for asked, answered in _PAIRS:
        if record.get(asked) is not None and record.get(answered) is not None:
            turns = _turns(record, asked, "user", where) + _turns(
                record, answered, "assistant", where
            )
            return _conversation(record, turns, where)
    if "text" in record:  # an empty cell of a table
        return ""
    raise LowbitError(f"{where}: {_expected()}; it has {names(record)}.")


def filled(found: Document) -> bool:
    """Whether a document holds anything but white space."""
    if isinstance(found, str):
        return bool(found.strip())
    return any(m["content"].strip() or m.get("tool_calls") for m in found.messages)


def columns_of(there: Iterable[str], what: str) -> list[str]:
    """Which columns of a table `document` reads.

    Args:
        there: the table's columns. what: the table, for a refusal.

    Raises:
        LowbitError: the table has the fields of no form, or a name twice; names those that it has.
    """
    held = list(there)
    twice = [n for n, count in Counter(held).items() if n and count > 1]
    if twice:
        raise LowbitError(
            f"{what} names more than one column {', '.join(map(repr, _shown(twice)))}. "
            "Rename or drop all but one."
        )
    chats = any(n in held for n in _CHATS) or any(a in held and b in held for a, b in _PAIRS)
    if not chats and "text" in held:
        return ["text"]
    if not chats:
        raise LowbitError(
            f"{what} has no field 'text' (it has {', '.join(_shown(held))}), nor those of a "
            f"conversation: {_CONVERSATION}."
        )
    known = ("text", *_CHATS, *(n for pair in _PAIRS for n in pair), *_BESIDE)
    return [n for n in held if n in known]


def names(record: Mapping[str, Any]) -> str:
    """The fields of a record, for a sentence."""
    held = _shown(f"{name} (null)" if value is None else name for name, value in record.items())
    return f"the fields {', '.join(held)}" if held else "no fields"


def _shown(fields: Iterable[Any]) -> list[str]:
    # A table without a header names its columns by its first row, which may be whole texts.
    held = [str(n) for n in fields]
    some = [n if len(n) <= 40 else f"{n[:37]}..." for n in held[:12]]
    return some + ["..."] * (len(held) > len(some))


def _expected() -> str:
    return f"expected a text or an object with a field 'text', {_CONVERSATION}"


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise LowbitError(
            f"{where}: the text holds half of a surrogate pair, which no tokenizer takes. Repair "
            "or drop it."
        ) from e
    return value


def _conversation(record: Mapping[str, Any], turns: list[Message], where: str) -> Conversation:
    system = record.get("system")
    if isinstance(system, str) and system.strip() and not any(m["role"] == "system" for m in turns):
        turns = [{"role": "system", "content": _text(system, where)}, *turns]
    tools = record.get("tools")
    listed = [] if tools in (None, "", []) else _objects(tools, where, "tools")
    return Conversation(tuple(turns), tuple(listed), where)


def _objects(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    """A list of objects, or the same written as JSON, as tables without nested columns have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise LowbitError(
                f"{where}: field '{name}' is a text that is not a list in JSON: {e}."
            ) from e
    if not isinstance(value, list):
        raise LowbitError(f"{where}: field '{name}' is {_kind(value)}, not a list of objects.")
    for n, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise LowbitError(f"{where}, '{name}' item {n} is {_kind(item)}, not an object.")
    return value


def _turns(record: Mapping[str, Any], name: str, role: str, where: str) -> list[Message]:
    value = record[name]
    if isinstance(value, list):
        return _messages(value, where, name)
    if not isinstance(value, str):
        raise LowbitError(
            f"{where}: field '{name}' is {_kind(value)}, not a text or a list of messages."
        )
    more = record.get("input") if name == "instruction" else None
    if isinstance(more, str) and more.strip():
        value = f"{value}\n\n{more}"
    return [{"role": role, "content": _text(value, where)}]


def _messages(value: Any, where: str, name: str) -> list[Message]:
    return [
        _message(item, f"{where}, '{name}' item {n}")
        for n, item in enumerate(_objects(value, where, name), 1)
    ]


def _message(item: dict[str, Any], where: str) -> Message:
    if item.get("role") is not None:
        role, key = item["role"], "content"
        if not isinstance(role, str) or not role:
            raise LowbitError(
                f"{where}: its 'role' is {_kind(role)}, not a name such as user or assistant."
            )
        role = _ROLES.get(role, role)
    elif item.get("from") is not None:
        role, key = _ROLES.get(str(item["from"]), ""), "value"
        if not role:
            raise LowbitError(f"{where} is from '{item['from']}': known are {', '.join(_ROLES)}.")
    else:
        raise LowbitError(
            f"{where}: expected 'role' and 'content' or 'from' and 'value'; it has {names(item)}."
        )
    # Tables fill in null for what a message of other messages' shape lacks; templates would print
    # it.
    rest = {
        k: v
        for k, v in item.items()
        if v is not None and k not in ("role", "content", "from", "value")
    }
    calls = rest.get("tool_calls")
    if calls:
        rest["tool_calls"] = [_call(c, where) for c in _objects(calls, where, "tool_calls")]
    content = item.get(key)
    if content is None:
        if not calls:
            raise LowbitError(
                f"{where} has no text in '{key}' and no tool calls; it has {names(item)}."
            )
        content = ""
    return {"role": role, "content": _content(content, where), **rest}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _text(value, where)
    if not isinstance(value, list):
        raise LowbitError(
            f"{where}: its content is {_kind(value)}, not a text or a list of parts with texts."
        )
    return "".join(_part(part, where) for part in value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return _text(part, where)
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        kind = f"of type '{part.get('type')}'" if isinstance(part, dict) else _kind(part)
        raise LowbitError(f"{where}: a part of its content is {kind}; only texts can be read.")
    return _text(text, where)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object: chat templates write them as JSON themselves."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise LowbitError(f"{where}: a tool call names no function; it has {names(call)}.")
    given = function.get("arguments")
    if not isinstance(given, str):
        return call
    try:
        parsed = {**function, "arguments": json.loads(given) if given.strip() else {}}
    except (ValueError, RecursionError) as e:
        raise LowbitError(
            f"{where}: the arguments of '{function['name']}' are not valid JSON: {e}."
        ) from e
    return {**call, "function": parsed} if "function" in call else parsed
