"""Records of conversations: every usual form gives the same messages, and rows hold what the
model's chat template makes of them.
"""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import save_tiny, tiny_tokenizer

import lowbit
from lowbit.errors import LowbitError
from lowbit.model.calibration import Calibration, draw_rows, evaluation_windows
from lowbit.model.chat import token_ids, written
from lowbit.model.records import Conversation, document
from lowbit.model.text import documents

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + PLAIN.replace(
    "</s>",
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% "
    "endfor %}</s>",
)
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}"
    + PLAIN
)
# The forms that published templates have: the system prompt inside the first turn of the user, a
# tool's answer as JSON, a switch that is taken out of the system prompt, a role that has no branch.
INSIDE = (
    "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}{% set ns.system = "
    "messages[0].content | trim + '\n\n' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ ns.system }}{% set ns.system = '' "
    "%}{{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% elif m.role == 'tool' %}<tool>{{ "
    "m.content | tojson }}</tool>{% endif %}{% endfor %}"
)
SWITCH = PLAIN.replace("m.content", "m.content.replace('/no_think', '').rstrip()")
BRANCHES = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content | trim }}</u>"
    "{% elif m.role == 'assistant' %}<a>{{ m.content.split('</think>')[-1] | trim }}</a>{% endif "
    "%}{% endfor %}"
)
READING = (
    INSIDE
    + "{% for m in messages %}{% if m.role == 'tool' %}{{ {'0': 'no', '1': 'yes'}[m.content] or raise_exception('what?') }}{% endif %}{% endfor %}"
)
USER, ANSWER = (
    {"role": "user", "content": "Why is it?"},
    {"role": "assistant", "content": "It is so."},
)
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def chatty(template: str | None = PLAIN) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(r) for r in records))
    return str(path)


def refused(record: Any) -> str:
    with pytest.raises(LowbitError) as e:
        document(record, "a.jsonl, line 7")
    assert str(e.value).startswith("a.jsonl, line 7")
    return str(e.value)


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [SYSTEM, USER, ANSWER], "id": 3}, [SYSTEM, USER, ANSWER]),
        ({"text": None, "messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"conversation": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why is it?"},
                    {"from": "gpt", "value": "It is so."},
                ]
            },
            [USER, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "user", "value": "Why is it?"},
                ],
                "tools": "[]",
            },
            [SYSTEM, USER],
        ),
        (
            {"system": "Be brief.", "conversations": [{"from": "human", "value": "Why is it?"}]},
            [SYSTEM, USER],
        ),
        ({"system": "Another.", "messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "Why is it?", "completion": "It is so."}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "Why is it?", "response": "It is so.", "system": ""}, [USER, ANSWER]),
        ({"prompt": "p", "prompt_id": "x", "messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"instruction": "Why is it?", "input": "", "output": "It is so."}, [USER, ANSWER]),
        (
            {"instruction": "Why", "input": "is it?", "output": "It is so."},
            [{"role": "user", "content": "Why\n\nis it?"}, ANSWER],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Why "},
                            {"type": "text", "text": "is it?"},
                        ],
                    }
                ]
            },
            [USER],
        ),
        ({"messages": [{**USER, "tool_calls": None, "name": None}]}, [USER]),
        ({"messages": [{**USER, "role": "human"}, {**ANSWER, "role": "gpt"}]}, [USER, ANSWER]),
        ({"messages": [{**USER, "role": "developer"}]}, [{**USER, "role": "developer"}]),
    ],
)
def test_every_form_gives_its_messages(record: Any, expected: list[Any]) -> None:
    found = document(record, "here")
    assert (
        isinstance(found, Conversation)
        and list(found.messages) == expected
        and found.where == "here"
    )


def test_text_comes_first() -> None:
    assert document({"text": "as it is", "messages": [USER]}, "here") == "as it is"


def test_arguments_of_calls_become_objects() -> None:
    found = document({"messages": [USER, CALLED], "tools": json.dumps([TOOL])}, "here")
    assert isinstance(found, Conversation) and found.tools == (TOOL,)
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "a", "answer": "b"}, "it has the fields question, answer."),
        ({"prompt": "a", "chosen": "b"}, "it has the fields prompt, chosen."),
        ({"messages": None}, "it has the fields messages (null)."),
        ({}, "it has no fields."),
        ([USER], "it is a list."),
        ({"messages": "hello"}, "field 'messages' is a text that is not a list in JSON"),
        ({"messages": USER}, "field 'messages' is an object, not a list"),
        ({"messages": [USER, "b"]}, "'messages' item 2 is a text, not an object."),
        (
            {"messages": [{"content": "a"}]},
            "'messages' item 1: expected 'role' and 'content' or 'from' and 'value'; it has the "
            "fields content.",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "item 1 has no text in 'content' and no tool calls; it has the fields role, content "
            "(null).",
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, "its 'role' is a number"),
        ({"messages": [{"role": "user", "content": 3}]}, "its content is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "is of type 'image_url'; only texts can be read.",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            "'conversations' item 1 is from 'alien': known are human, user, gpt",
        ),
        ({"prompt": "a", "completion": 3}, "field 'completion' is a number"),
        ({"prompt": [USER], "completion": ["a"]}, "'completion' item 1 is a text, not an object."),
        (
            {"messages": [{**CALLED, "tool_calls": [{"id": "1"}]}]},
            "a tool call names no function; it has the fields id.",
        ),
        (
            {
                "messages": [
                    {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "the arguments of 'f' are not valid JSON",
        ),
        ({"messages": [USER], "tools": "x"}, "field 'tools' is a text that is not a list in JSON"),
    ],
)
def test_a_bad_record_says_what_it_has(record: Any, says: str) -> None:
    assert says in refused(record)


def test_tables_hold_conversations_as_well(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table(
            {"id": [1, 2], "messages": [[USER, ANSWER], [USER, {**ANSWER, "name": "x"}]]}
        ),
        tmp_path / "a.parquet",
    )
    (tmp_path / "a.csv").write_text('prompt,completion\nWhy is it?,It is so.\n"",""\n')
    first, second = documents(str(tmp_path / "a.parquet"), "train")
    (row,) = documents(str(tmp_path / "a.csv"), "train")
    assert all(isinstance(d, Conversation) for d in (first, second, row))
    assert first.messages == row.messages == (USER, ANSWER) and second.messages[1]["name"] == "x"
    assert second.where == f"{tmp_path / 'a.parquet'}, row 2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([None, "b"], [(USER, ANSWER), "b"]),
        ([None, None], [(USER, ANSWER)] * 2),
        (["a", " "], ["a", (USER, ANSWER)]),
    ],
)
def test_a_conversation_beside_an_empty_text_is_read_from_every_kind_of_file(
    tmp_path: Path, text: list[Any], expected: list[Any]
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talks = [[USER, ANSWER]] * 2
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array(text, pyarrow.string()), "messages": talks}),
        tmp_path / "a.parquet",
    )
    jsonl(
        tmp_path / "a.jsonl", [{"text": t, "messages": m} for t, m in zip(text, talks, strict=True)]
    )
    with (tmp_path / "a.csv").open("w", newline="") as f:
        csv.writer(f).writerows(
            [("text", "messages"), *((t, json.dumps(m)) for t, m in zip(text, talks, strict=True))]
        )
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        found = documents(str(tmp_path / name), "train")
        assert [d.messages if isinstance(d, Conversation) else d for d in found] == expected, name


def test_a_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(LowbitError, match=r"a.parquet' names more than one column 'text'"):
        documents(str(tmp_path / "a.parquet"), "train")


def test_hub_data_sets_hold_conversations_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        column_names = ("id", "messages")

        def select_columns(self, names: list[str]) -> Table:
            assert names == ["messages"]
            return self

        def __getitem__(self, at: slice) -> dict[str, list[Any]]:
            return {
                "messages": [
                    [USER, {**ANSWER, "tool_calls": None}],
                    [{"role": "user", "content": None}],
                ][at]
            }

    fake = types.ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", lambda *a, **k: Table(), raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(LowbitError) as e:
        documents("owner/name", "train")
    assert str(e.value).startswith(
        "dataset 'owner/name' (split train), row 2, 'messages' item 1 has no text"
    )
    monkeypatch.setattr(
        Table,
        "__getitem__",
        lambda self, at: {"messages": [[USER, {**ANSWER, "tool_calls": None}]]},
    )
    (found,) = documents("owner/name", "train")
    assert isinstance(found, Conversation) and found.messages == (USER, ANSWER)


# --- the template ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, WITH_BOS])
def test_rows_hold_what_transformers_makes_of_conversations(tmp_path: Path, template: str) -> None:
    tokenizer = chatty(template)
    talks = [[SYSTEM, USER, ANSWER], [USER, ANSWER] * 3, [USER]] * 70
    source = jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in talks])
    each = [tokenizer.apply_chat_template(m, tokenize=True, return_dict=False) for m in talks]
    # BOS once or not at all.
    assert [ids.count(1) for ids in each] == [int(template == WITH_BOS)] * len(talks)
    assert each[0].count(2) == 3  # a special token, not its letters
    tokens = [i for ids in each for i in ids]
    windows = evaluation_windows(source, tokenizer, 16, bos="no")
    assert windows.flatten().tolist() == tokens[: len(tokens) // 16 * 16]
    # The template says whether conversations begin with BOS, not the tokenizer.
    begun = evaluation_windows(source, tokenizer, 16)
    assert begun[:, 1:].equal(windows[:, 1:])
    assert begun[:, 0].eq(1).all() if template == WITH_BOS else begun.equal(windows)
    rows = draw_rows(Calibration(source, 4, 16), tokenizer, 0)
    assert rows.conversations == len(talks) and rows.tokens_available == len(tokens)


def test_texts_and_conversations_may_be_mixed(tmp_path: Path) -> None:
    tokenizer = chatty()
    records = [{"text": "plain"}, {"messages": [USER, ANSWER]}, {"text": "again"}]
    found = list(token_ids(tokenizer, documents(jsonl(tmp_path / "a.jsonl", records), "train")))
    chat = tokenizer.apply_chat_template([USER, ANSWER], tokenize=True, return_dict=False)
    assert found == [tokenizer("plain")["input_ids"], chat, tokenizer("again")["input_ids"]]


def test_tools_and_calls_are_written() -> None:
    found = document({"messages": [USER, CALLED], "tools": [TOOL]}, "here")
    text = written(found, chatty(TOOLS))
    assert text == '[weather]<|user|>Why is it?</s><|assistant|>weather{"city": "Paris"}</s>'


@pytest.mark.parametrize(
    ("template", "record", "says"),
    [
        (
            None,
            {"messages": [USER]},
            "here is a conversation, and the model's tokenizer has no chat template",
        ),
        (
            STRICT,
            {"messages": [SYSTEM, USER]},
            "here: the model's chat template does not take it (the user must begin).",
        ),
        ("{% for %}", {"messages": [USER]}, "here: the model's chat template does not take it ("),
        (
            "{{ messages[0].content + 3 }}",
            {"messages": [USER]},
            "here: the model's chat template does not take it (",
        ),
        (
            PLAIN,
            {"messages": [USER, CALLED]},
            "here: the model's chat template leaves the tool 'weather' out.",
        ),
        (
            PLAIN,
            {"messages": [USER], "tools": [TOOL]},
            "here: the model's chat template leaves the tool 'weather' out.",
        ),
    ],
)
def test_what_the_template_cannot_write_is_refused(
    template: str | None, record: Any, says: str
) -> None:
    with pytest.raises(LowbitError) as e:
        written(document(record, "here"), chatty(template))
    assert str(e.value).startswith(says) and "\n" not in str(e.value)


HALF = "a \ud83d b"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ANSWER, "reasoning_content": HALF}]},
        {
            "messages": [
                USER,
                {
                    **CALLED,
                    "tool_calls": [{"function": {"name": "weather", "arguments": {"city": HALF}}}],
                },
            ]
        },
        {
            "messages": [
                USER,
                {
                    **CALLED,
                    "tool_calls": [
                        {"function": {"name": "weather", "arguments": json.dumps({"city": HALF})}}
                    ],
                },
            ]
        },
        {
            "messages": [USER],
            "tools": [{"type": "function", "function": {"name": "weather", "description": HALF}}],
        },
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": HALF}}]},
        {"messages": [{**USER, "role": HALF}]},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_the_template_writes_it(
    tmp_path: Path, record: Any
) -> None:
    template = "{{ tools | tojson }}" + TOOLS.replace(
        "{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}"
    )
    source = jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, record])
    with pytest.raises(LowbitError) as e:
        draw_rows(Calibration(source, 1, 4), chatty(template), 0)
    assert (
        str(e.value)
        == f"{source}, line 2: a field holds half of a surrogate pair, which no tokenizer takes. Repair or drop it."
    )


RESULT = {"role": "tool", "content": '{"temperature": "20 \u00b0C"}'}


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (BRANCHES, [SYSTEM, USER, ANSWER], "system"),
        (BRANCHES, [USER, ANSWER, {"role": "developer", "content": "Be brief."}], "developer"),
        (BRANCHES, [USER, ANSWER, RESULT, ANSWER], "tool"),
        # The word is in the user's message.
        (
            BRANCHES,
            [{"role": "system", "content": "is"}, USER, ANSWER],
            "system",
        ),
        (BRANCHES, [USER, ANSWER, {"role": "critic", "content": "It is"}], "critic"),
        (INSIDE, [USER, SYSTEM], "system"),
        (
            BRANCHES,
            [
                {"role": "user", "content": "  Why is it?\n"},
                {**ANSWER, "content": "<think>Hm.</think>It is so."},
            ],
            None,
        ),
        (BRANCHES, [{**USER, "role": "human"}, {**ANSWER, "role": "gpt"}], None),
        (BRANCHES, [USER, ANSWER, USER, ANSWER], None),
        (BRANCHES, [{"role": "system", "content": " \n"}, USER, ANSWER], None),
        (INSIDE, [SYSTEM, USER, ANSWER, USER], None),
        (INSIDE, [USER, ANSWER, RESULT, ANSWER], None),
        (READING, [USER, ANSWER, {"role": "tool", "content": "1"}], None),
        (
            SWITCH,
            [{"role": "system", "content": "Be brief. /no_think Be kind."}, USER, ANSWER],
            None,
        ),
        (PLAIN, [{"role": "critic", "content": "Be brief."}, USER, ANSWER], None),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(
    template: str, messages: list[Any], lost: str | None
) -> None:
    found, tokenizer = document({"messages": messages}, "here"), chatty(template)
    if lost is None:
        assert written(found, tokenizer) == tokenizer.apply_chat_template(
            list(found.messages), tokenize=False
        )
        return
    with pytest.raises(LowbitError) as e:
        written(found, tokenizer)
    assert str(e.value) == (
        f"here: the model's chat template leaves the message of role '{lost}' out. "
        "Give conversations without this role, or a model whose template writes it."
    )


def test_the_report_tells_of_conversations_and_only_of_them(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m")
    chatty().save_pretrained(model)
    talks = jsonl(tmp_path / "a.jsonl", [{"messages": [SYSTEM, USER, ANSWER]}] * 20)
    found = {}
    for name, source in (("chat", talks), ("plain", str(model / "text.txt"))):
        done = lowbit.quantize(
            str(model),
            "W4A16g16",
            "rtn",
            out=tmp_path / name,
            calib=source,
            samples=4,
            length=16,
            device="cpu",
        )
        found[name] = done.report["calibration"].get("conversations")
    assert found == {"chat": 20, "plain": None}
    assert (
        "20 conversations written by the model's chat template"
        in (tmp_path / "chat" / "README.md").read_text()
    )
    assert "conversations" not in (tmp_path / "plain" / "README.md").read_text()
