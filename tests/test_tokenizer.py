"""Loading the tokenizer beside the weights: whatever is wrong with it, one sentence names the file
that is to blame.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_tokenizer

from lowbit.demo import demo_model
from lowbit.errors import LowbitError
from lowbit.export.gguf.tokens import read
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.tokenizer import load_tokenizer, tokenizer_at

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 8397312\n"
Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def put(name: str, text: str | bytes) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None
    )


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        held = json.loads((folder / name).read_text())
        change(held)
        (folder / name).write_text(json.dumps(held))

    return apply


def cut(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def only(name: str, text: str, config: dict[str, Any]) -> Change:
    def apply(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / name).write_text(text)

    return apply


PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
UNKNOWN = [
    {"SpecialToken": {"id": "<nope>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
]
BROKEN = {
    "newer kind": (
        edit("tokenizer.json", lambda j: j["model"].update(type="BPE2")),
        "tokenizer.json' is no tokenizer that the installed",
    ),
    "no merges": (
        edit("tokenizer.json", lambda j: j["model"].pop("merges")),
        "tokenizer.json' is no tokenizer that the installed",
    ),
    "foreign merge": (
        edit("tokenizer.json", lambda j: j["model"].update(merges=[["zz", "qq"]])),
        "(Token `zz` out of vocabulary",
    ),
    "panic at load": (
        edit("tokenizer.json", lambda j: j.update(normalizer=PANICS)),
        "tokenizer.json' is no tokenizer that the installed",
    ),
    "panic at use": (
        edit(
            "tokenizer.json",
            lambda j: j["post_processor"].update(single=UNKNOWN, special_tokens={}),
        ),
        "tokenizer.json' is no tokenizer that the installed",
    ),
    "cut": (cut, "tokenizer.json' is not valid JSON"),
    "empty": (put("tokenizer.json", ""), "tokenizer.json' is not valid JSON"),
    "a list": (put("tokenizer.json", "[]"), "tokenizer.json' does not hold a JSON object"),
    "pointer": (put("tokenizer.json", POINTER), "tokenizer.json' is a git-lfs pointer"),
    "merges pointer": (put("merges.txt", POINTER), "merges.txt' is a git-lfs pointer"),
    "config cut": (
        put("tokenizer_config.json", '{"bos_token": '),
        "tokenizer_config.json' is not valid JSON",
    ),
    "config a list": (
        put("tokenizer_config.json", "[]"),
        "tokenizer_config.json' does not hold a JSON object",
    ),
    "config of a wrong type": (
        edit("tokenizer_config.json", lambda j: j.update(bos_token=3)),
        "tokenizer_config.json' describes",
    ),
    "config wants code": (
        edit(
            "tokenizer_config.json",
            lambda j: j.update(
                tokenizer_class="Foo", auto_map={"AutoTokenizer": ["tok.Foo", None]}
            ),
        ),
        "tokenizer_config.json' describes",
    ),
    "map cut": (put("special_tokens_map.json", "{"), "special_tokens_map.json' is not valid JSON"),
    "map latin-1": (
        put("special_tokens_map.json", b'{"a": "\xff"}'),
        "special_tokens_map.json' is not UTF-8 text (byte 7)",
    ),
    "template": (
        put("chat_template.jinja", b"\xff\xfe"),
        "chat_template.jinja' is not UTF-8 text (byte 0)",
    ),
    "unknown class alone": (
        only("vocab.json", '{"a": 0}', {"tokenizer_class": "FooTokenizer"}),
        "has no tokenizer.json, and transformers cannot",
    ),
    "sentencepiece": (
        only("tokenizer.model", "x", {"tokenizer_class": "LlamaTokenizer"}),
        "has no tokenizer.json, and transformers cannot",
    ),
    "pointer of sentencepiece": (
        only("tokenizer.model", POINTER, {}),
        "tokenizer.model' is a git-lfs pointer",
    ),
}


@pytest.mark.parametrize(("change", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_refused_by_the_name_of_its_file(
    folder: Path, change: Change, says: str
) -> None:
    change(folder)
    with pytest.raises(LowbitError) as e:
        tokenizer_at(folder)
    said = str(e.value)
    assert says in said and str(folder) in said and "\n" not in said and said.endswith(".")


@pytest.mark.parametrize("case", ["newer kind", "panic at load", "pointer"])
def test_the_export_says_the_same(folder: Path, case: str) -> None:
    change, says = BROKEN[case]
    change(folder)
    with pytest.raises(LowbitError) as e:
        read(folder, 280)
    assert says in str(e.value)


def test_what_is_no_failure_of_the_tokenizer_goes_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenizer_at(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: None,
        edit("tokenizer_config.json", lambda j: j.update(tokenizer_class="FooTokenizer")),
    ],
)
def test_a_whole_tokenizer_json_needs_no_class(folder: Path, change: Change) -> None:
    change(folder)
    assert tokenizer_at(folder)("a")["input_ids"][0] == 1


def test_the_embedded_model_s_tokenizer_begins_a_text_as_in_training() -> None:
    tokenizer = load_tokenizer(Checkpoint(demo_model()))
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_a_folder_without_one_says_what_to_copy(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((demo_model() / name).read_bytes())
    with pytest.raises(LowbitError, match=r"has no tokenizer files\. Copy tokenizer\.json"):
        load_tokenizer(Checkpoint(tmp_path))
