"""Sources of text: every one gives the documents it holds, and every bad one says what is wrong and
what to do.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import tracemalloc
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import LowbitError
from lowbit.model.folders import SIDES, folder_files
from lowbit.model.text import CORPORA, documents, iter_documents, named_documents


def refused(source: object, split: Any = "train") -> str:
    with pytest.raises(LowbitError) as e:
        documents(str(source), split)
    return str(e.value)


gzipped = partial(gzip.compress, mtime=0)  # the same in every process that collects tests


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- local files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a", "no suffix", ["no suffix"]),
        ("a.py", "x = '{'\n", ["x = '{'\n"]),
        ("crlf.txt", "one\r\ntwo", ["one\ntwo"]),
        ("bom.txt", b"\xef\xbb\xbfmarked", ["marked"]),
        ("a.json", '["one", {"text": "two", "id": 2}]', ["one", "two"]),
        (
            "a.jsonl",
            '{"text": "one"}\n"two"\n\n{"text": "", "id": 3}\r\n{"text": "four"}',
            ["one", "two", "four"],
        ),
        ("A.JSONL", '{"text": "upper"}', ["upper"]),
        ("unicode.jsonl", '{"text": "ein\u2028Satz \x85 \u00fc"}\n', ["ein\u2028Satz \x85 \u00fc"]),
        ("pair.jsonl", '"\\ud83d\\ude00"', ["\U0001f600"]),
        ("a.ndjson", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("lines.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("one.json", '{"text": "a"}', ["a"]),
        ("null.jsonl", '{"text": null}\n{"text": "b"}', ["b"]),
        ("a.csv", 'id,text\n1,"one, ""two""\nthree"\n2,\n3,NA\n', ['one, "two"\nthree', "NA"]),
        ("crlf.csv", b'text\r\n"one\r\ntwo"\r\n', ["one\r\ntwo"]),
        ("unnamed.csv", "text,,\na,,\n", ["a"]),
        ("inches.csv", 'id,text\n1,5" wide\n', ['5" wide']),
        ("long.csv", f"text\n{'x' * 200_000}\n", ["x" * 200_000]),
        ("a.tsv", "id\ttext\n1\tone, two\n", ["one, two"]),
        ("u16.txt", "größer".encode("utf-16"), ["größer"]),
        ("u16be.jsonl", codecs.BOM_UTF16_BE + '{"text": "größer"}'.encode("utf-16-be"), ["größer"]),
        ("u32.csv", "text\ngrößer\n".encode("utf-32"), ["größer"]),
        ("u32be.json", codecs.BOM_UTF32_BE + '["größer"]'.encode("utf-32-be"), ["größer"]),
        ("a.txt.gz", gzipped(b"whole\n"), ["whole\n"]),
        ("a.gz", gzipped(b"whole"), ["whole"]),
        ("a.jsonl.gz", gzipped(b'"one"\n') + gzipped(b'"two"\n'), ["one", "two"]),
        ("a.json.bz2", bz2.compress(b'["one", "two"]'), ["one", "two"]),
        ("a.csv.xz", lzma.compress(b"text\none\n"), ["one"]),
        ("A.NDJSON.XZ", lzma.compress(b'"one"\n'), ["one"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_file_gives_its_documents_on_both_sides(
    tmp_path: Path, name: str, content: str | bytes, expected: list[str], split: Any
) -> None:
    assert documents(str(write(tmp_path / name, content)), split) == expected


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.txt", " \n\t\n", "holds no text"),
        ("empty.jsonl", "\n", "holds no text"),
        ("empty.json", "", "holds no text"),
        ("none.json", "[]", "holds no text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text (byte 3)"),
        ("latin.jsonl", b'{"text": "\xff"}', "is not UTF-8 text"),
        ("broken.jsonl", '{"text": "a"}\n\n{"text": \n', "broken.jsonl, line 3 is not valid JSON"),
        (
            "nofield.jsonl",
            '{"text": "a"}\n{"content": "b"}\n',
            "nofield.jsonl, line 2: expected a text or an object with a field 'text'",
        ),
        ("number.jsonl", '{"text": 3}\n', "number.jsonl, line 1: expected a text"),
        ("null.jsonl", "null\n", "null.jsonl, line 1: expected a text"),
        ("broken.json", '["a", ', "broken.json is not valid JSON"),
        ("deep.json", "[" * 200_000, "deep.json is not valid JSON"),
        (
            "object.json",
            '{"version": 1, "data": [{"text": "a"}]}',
            "it has the fields version, data.",
        ),
        ("value.json", "3", "must hold a list"),
        ("nofield.json", '["a", {"content": "b"}]', "nofield.json, item 2: expected a text"),
        (
            "found.jsonl",
            '{"question": "a", "answer": null}',
            "it has the fields question, answer (null).",
        ),
        ("number2.jsonl", '{"text": 3}\n', "its 'text' is a number."),
        (
            "nofield.csv",
            "question,answer\na,b\n",
            "nofield.csv' has no field 'text' (it has question, answer), nor those of a "
            "conversation",
        ),
        ("headless.csv", f"{'x' * 100},b\n", f"(it has {'x' * 37}..., b)"),
        (
            "ragged.csv",
            "id,text\n1,one, two\n",
            "ragged.csv, row 1 (line 2) has more fields than the first line names",
        ),
        ("empty.csv", "", "holds no text"),
        (
            "twice.csv",
            "text,id,text\na,1,b\n",
            "twice.csv' names more than one column 'text'. Rename or drop",
        ),
        (
            "twice.tsv",
            "id\ttext\tid\n1\ta\t2\n",
            "twice.tsv' names more than one column 'id'. Rename or drop",
        ),
        ("rowless.tsv", "id\ttext\n", "holds no text"),
        ("broken.json.gz", gzipped(b'["a", '), "broken.json.gz is not valid JSON"),
        ("lines.json", '{"text": "a"}\n{"text": \n', "lines.json, line 2 is not valid JSON"),
        (
            "u16le.txt",
            "plain text".encode("utf-16-le"),
            "holds NUL bytes: it is binary data, or UTF-16 or UTF-32 without its mark",
        ),
        ("u16be.jsonl", '{"text": "größer"}'.encode("utf-16-be"), "holds NUL bytes"),
        (
            "odd.txt",
            "plain".encode("utf-16") + b"x",
            "is not the UTF-16 text that its mark announces",
        ),
        ("binary.txt", b"\x7fELF\x02\x01\x01\0\0\xff", "holds NUL bytes: it is binary data"),
        ("zipped.jsonl", gzipped(b'"a"'), "zipped.jsonl' is gzip data: add .gz to its name"),
        (
            "table.jsonl",
            b"PAR1\x15\0\xff",
            "table.jsonl' is a Parquet table: add .parquet to its name",
        ),
        ("cut.jsonl.gz", gzipped(b"x" * 99)[:-9], "cut.jsonl.gz' cannot be unpacked"),
        ("cut.txt.bz2", bz2.compress(b"x" * 99)[:-9], "cut.txt.bz2' cannot be unpacked"),
        ("cut.txt.xz", lzma.compress(b"x" * 99)[:-9], "cut.txt.xz' cannot be unpacked"),
        ("plain.txt.gz", b"plain", "plain.txt.gz' cannot be unpacked"),
        ("plain.txt.xz", b"plain", "plain.txt.xz' cannot be unpacked"),
        ("a.tar.gz", gzipped(b"x"), "is an archive: unpack it and give the folder"),
        ("a.zip", b"PK\x03\x04", "is an archive"),
        ("a.parquet.gz", gzipped(b"x"), "is a compressed Parquet file"),
        (
            "pointer.txt",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a git-lfs pointer",
        ),
        (
            "half.jsonl",
            '"ok"\n"\\ud83d"\n',
            "half.jsonl, line 2: the text holds half of a surrogate pair",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    assert says in refused(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "open.csv",
            'id,text\n1,"one\n2,two\n3,three\n',
            "open.csv: what begins after line 1 and ends in line 4 is not a table's row",
        ),
        (
            "later.csv",
            'id,text\n1,one\n2,"two\n3,three\n',
            "later.csv: what begins after line 2 and ends in line 4",
        ),
        (
            "header.csv",
            'id,"text\n1,one\n',
            "header.csv: what begins after line 0 and ends in line 2",
        ),
        (
            "single.csv",
            'text\n"one" two\n',
            "single.csv: what begins after line 1 and ends in line 2",
        ),
        (
            "open.tsv.gz",
            gzipped(b'text\n"one\ntwo\n'),
            "open.tsv.gz: what begins after line 1 and ends in line 3",
        ),
    ],
)
def test_a_quote_left_open_is_refused(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    said = refused(write(tmp_path / name, content))
    assert says in said and said.endswith("Is a quote left open, or not doubled within a text?")


# --- files larger than what is read at once -------------------------------------------------------

LINES = '\ufeff"größer"\r\n\r\n{"text": "zwei\u2028\U0001f600 und"}\r"drei"\n"vier"'
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzipped,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
}


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("packed", PACKERS)
def test_lines_do_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str, at_once: int
) -> None:
    monkeypatch.setattr("lowbit.model.decoded._AT_ONCE", max(at_once, 4 if packed else 1))
    # The mark is in what is read first.
    for encoding in ("utf-8", "utf-16", "utf-32") if at_once >= 4 else ("utf-8",):
        text = LINES if encoding == "utf-8" else LINES[1:]
        found = documents(
            str(write(tmp_path / f"a.jsonl{packed}", PACKERS[packed](text.encode(encoding)))),
            "train",
        )
        assert found == ["größer", "zwei\u2028\U0001f600 und", "drei", "vier"]
        table = 'id,text\r\n1,"größer\r\nals ""das"""\r2,zwei\n'.encode(encoding)
        assert documents(
            str(write(tmp_path / f"a.csv{packed}", PACKERS[packed](table))), "train"
        ) == ['größer\r\nals "das"', "zwei"]


@pytest.mark.parametrize("at_once", [4, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'"a"\n"b"\n"caf\xe9"\n"d"\n', "(byte 12). Convert it first."),
        (codecs.BOM_UTF8 + b'"a"\n"b"\n"caf\xe9"\n"d"\n', "(byte 15). Convert it first."),
        (b'"a"\n"\xc3\xbc"\n"b\xc3', "(byte 11). Convert it first."),
        (
            '"a"\n"b"'.encode("utf-16") + b"x",
            "is not the UTF-16 text that its mark announces (byte 16).",
        ),
        (b'"a"\n"b"\n"c\0"', "holds NUL bytes"),
        (
            b'"a"\n"b"\n{"c"\n',
            "a.jsonl, line 3 is not valid JSON: Expecting ':' delimiter: line 1 column 5",
        ),
    ],
)
def test_where_a_file_is_bad_does_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str, at_once: int
) -> None:
    monkeypatch.setattr("lowbit.model.decoded._AT_ONCE", at_once)
    assert says in refused(write(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.csv", "a.tsv"])
def test_lines_are_read_as_they_are_asked_for(tmp_path: Path, name: str, packed: str) -> None:
    line = "x" * 1000
    text = "\n".join([line if "sv" in name else json.dumps(line)] * 10_000)
    path = write(
        tmp_path / f"{name}{packed}",
        PACKERS[packed]((("text\n" if "sv" in name else "") + text).encode()),
    )
    tracemalloc.start()
    try:
        count = sum(len(d) for d in iter_documents(str(path), "train") if isinstance(d, str))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 10_000_000 and peak < 8_000_000  # bytes; the whole text takes more


def test_the_limit_on_a_table_s_fields_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    documents(str(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")), "train")
    refused(write(tmp_path / "b.csv", "text\na,b\n"))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd"),
    ],
)
def test_what_only_pyarrow_reads_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    said = refused(write(tmp_path / name, content))
    assert name in said and "pip install 'lowbit[eval]'" in said


def test_parquet_and_zstd(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["one", None, "  ", "two"]
    parquet.write_table(pyarrow.table({"id": range(4), "text": texts}), tmp_path / "a.parquet")
    assert documents(str(tmp_path / "a.parquet"), "train") == ["one", "two"]
    packed = b"".join(
        pyarrow.compress(part, codec="zstd", asbytes=True) for part in (b'"one"\n', b'"two"\n')
    )
    assert documents(str(write(tmp_path / "a.jsonl.zst", packed)), "train") == ["one", "two"]
    assert "cut.txt.zst' cannot be unpacked" in refused(
        write(tmp_path / "cut.txt.zst", packed[:-9])
    )
    assert "bad.parquet' cannot be read as a Parquet file" in refused(
        write(tmp_path / "bad.parquet", b"PAR1, or not")
    )
    parquet.write_table(pyarrow.table({"question": ["q"]}), tmp_path / "q.parquet")
    assert "q.parquet' has no field 'text' (it has question)" in refused(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nosuch.txt", "no such text file or folder: 'nosuch.txt'"),
        ("./data", "no such text file or folder: './data'"),
        ("data/part.jsonl", "no such text file or folder: 'data/part.jsonl'"),
        ("/a/b/c", "no such text file or folder: '/a/b/c'"),
        ("~/nosuch", "no such text file or folder: '~/nosuch'"),
        ("~nosuchuser/x.txt", "no such text file or folder: '~nosuchuser/x.txt'"),
        ("~nosuchuser/x", "no such text file or folder: '~nosuchuser/x'"),
        ("~nosuchuser", "known: c4, pile-val, stdlib, wikitext2."),
        ("x" * 300 + ".txt", ".txt' cannot be looked up: File name too long."),
        ("wikitext", "did you mean 'wikitext2'?"),
        ("STDLIB", "did you mean 'stdlib'?"),
        ("zzzzzz", "known: c4, pile-val, stdlib, wikitext2."),
    ],
)
def test_a_missing_source_is_refused_with_the_nearest_name(source: str, says: str) -> None:
    assert says in refused(source)


# --- the standard library -------------------------------------------------------------------------


def test_the_sides_of_the_standard_library_share_no_file() -> None:
    train, held = documents("stdlib", "train"), documents("stdlib", "eval")
    assert len(train) > 5 * len(held) > 0
    assert not set(train) & set(held)


def test_an_interpreter_without_sources_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(split: str) -> None:
        raise FileNotFoundError("no Python sources here. Give a text file instead.")

    monkeypatch.setattr("lowbit.model.text.stdlib_files", none)
    assert "Give a text file" in refused("stdlib")


# --- the datasets library, played by a stand-in ---------------------------------------------------


class Table:
    """The part of a datasets.Dataset that is used."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> Table:
        return Table(**{n: self.columns[n] for n in names})

    def __getitem__(self, at: slice) -> dict[str, list[Any]]:
        return {k: v[at] for k, v in self.columns.items()}


Loader = Callable[..., Table]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loader], list[tuple[Any, ...]]]:
    """Install a stand-in that answers with ``loader``; gives back the list of calls."""

    def install(loader: Loader) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(
            repo: str, config: str | None = None, *, split: str, **options: Any
        ) -> Table:
            calls.append((repo, config, split, options))
            return loader(repo, split)

        fake = types.ModuleType("datasets")
        monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        return calls

    return install


@pytest.mark.parametrize("source", ["wikitext2", "c4", "pile-val", "owner/name"])
def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    said = refused(source)
    assert "pip install 'lowbit[eval]'" in said and "local text file" in said


def test_without_a_network_it_says_what_was_tried_once(library: Any) -> None:
    def unreachable(repo: str, split: str) -> Table:
        raise ConnectionError(f"Couldn't reach '{repo}' on the Hub\nlong\ntrace")

    calls = library(unreachable)
    assert refused("wikitext2", "eval") == (
        "dataset 'Salesforce/wikitext' (split test) cannot be loaded: Couldn't reach "
        "'Salesforce/wikitext' on the Hub. A local text file works too. "
        "So does stdlib, offline."
    )
    assert "'owner/name' (split test)" in refused("owner/name", "eval")
    # The other splits of an unreachable repository are not tried: each costs many seconds.
    assert len(calls) == 2


def test_a_split_of_another_name_is_asked_for_and_then_taken(library: Any) -> None:
    def chats(repo: str, split: str) -> Table:
        if split != "train_sft":
            raise ValueError(
                f'Unknown split "{split}". Should be one of ["train_sft", "test_sft"].'
            )
        return Table(text=["one", "two"])

    calls = library(chats)
    said = refused("owner/chats")
    assert '["train_sft", "test_sft"]' in said and said.endswith(
        "A split of another name is given after a colon: owner/chats:SPLIT."
    )
    assert (
        documents("owner/chats:train_sft", "train")
        == documents("owner/chats:train_sft", "eval")
        == ["one", "two"]
    )
    assert [c[2] for c in calls] == ["train", "train_sft", "train_sft"]


def test_an_error_without_a_message_still_says_something(library: Any) -> None:
    def silent(repo: str, split: str) -> Table:
        raise TimeoutError

    library(silent)
    assert "TimeoutError" in refused("owner/name")


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("wikitext2", "train", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None)),
        ("wikitext2", "eval", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None)),
        (
            "c4",
            "train",
            ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ),
        (
            "c4",
            "eval",
            (
                "allenai/c4",
                None,
                "validation",
                {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            ),
        ),
        ("pile-val", "train", ("mit-han-lab/pile-val-backup", None, "validation", None)),
        ("pile-val", "eval", ("mit-han-lab/pile-val-backup", None, "validation", None)),
    ],
)
def test_named_corpora_are_the_ones_the_papers_use(
    library: Any, source: str, split: Any, expected: tuple[Any, ...]
) -> None:
    calls = library(lambda repo, split: Table(text=["a", "", "b"], url=["u"] * 3))
    assert documents(source, split)
    ((repo, config, name, options),) = calls
    assert (repo, config, name, options.get("data_files")) == expected


def test_a_hub_dataset_gives_its_texts_and_its_name_may_hold_a_dot(library: Any) -> None:
    calls = library(lambda repo, split: Table(id=[1, 2, 3, 4], text=["a", None, " ", "b"]))
    assert documents("owner/pile-v1.5", "train") == ["a", "b"]
    assert calls == [("owner/pile-v1.5", None, "train", {})]


@pytest.mark.parametrize(
    "held", [("train", "validation", "test"), ("train", "validation"), ("train",)]
)
def test_evaluation_takes_test_else_validation_else_train(
    library: Any, held: tuple[str, ...]
) -> None:
    def loader(repo: str, split: str) -> Table:
        if split not in held:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(held)}.')
        return Table(text=[f"from {split}"])

    library(loader)
    assert documents("owner/name", "eval") == [f"from {held[-1]}"]
    assert documents("owner/name", "train") == ["from train"]


def test_a_dataset_without_text_is_refused(library: Any) -> None:
    library(lambda repo, split: Table(content=["a"], url=["u"]))
    assert refused("owner/name").startswith(
        "dataset 'owner/name' (split train) has no field 'text' (it has content, url), nor"
    )
    library(lambda repo, split: Table(text=["", "  "]))
    assert "dataset 'owner/name' (split train) holds no text" in refused("owner/name")
    library(lambda repo, split: (_ for _ in ()).throw(ValueError('Unknown split "train".')))
    assert "Unknown split" in refused("owner/name")


# --- the datasets library itself, on folders laid out like the hub's repositories -----------------


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repo"
    folder.mkdir()
    return folder


def readme(folder: Path, config: str, files: dict[str, str], announced: int = 0) -> None:
    """The part of a dataset card that the library reads; ``announced`` rows a split, if any."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    lines += [f"  - split: {s}\n    path: {p}" for s, p in files.items()]
    if announced:
        lines += ["dataset_info:", f"- config_name: {config}", "  features:"]
        lines += [f"  - name: {n}\n    dtype: string" for n in ("text", "url")]
        lines += [
            "  splits:",
            *(f"  - name: {s}\n    num_bytes: 1\n    num_examples: {announced}" for s in files),
        ]
    write(folder / "README.md", "\n".join([*lines, "---", ""]))


def test_wikitext2_is_one_document_a_side(real: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    sides = {
        "train": ["", " = Title = \n", " some text \n"],
        "validation": ["v"],
        "test": [" = Other = \n", "", " held out \n"],
    }
    (real / "wikitext-2-raw-v1").mkdir()
    for side, rows in sides.items():
        pyarrow.parquet.write_table(
            pyarrow.table({"text": rows}),
            real / "wikitext-2-raw-v1" / f"{side}-00000-of-00001.parquet",
        )
    readme(real, "wikitext-2-raw-v1", {s: f"wikitext-2-raw-v1/{s}-*" for s in sides})
    assert named_documents(CORPORA["wikitext2"], "train", str(real)) == [
        "\n\n = Title = \n\n\n some text \n"
    ]
    assert named_documents(CORPORA["wikitext2"], "eval", str(real)) == [
        " = Other = \n\n\n\n\n held out \n"
    ]


def test_c4_reads_one_shard_and_evaluates_on_1100_documents(real: Path) -> None:
    (real / "en").mkdir()
    for name, count in (
        ("train.00000-of-01024", 7),
        ("train.00001-of-01024", 3),
        ("validation.00000-of-00008", 1200),
    ):
        rows = [json.dumps({"text": f"{name[:5]} {i}", "url": "u"}) for i in range(count)]
        write(real / "en" / f"c4-{name}.json.gz", gzip.compress("\n".join(rows).encode()))
    readme(
        real,
        "en",
        {s: f"en/c4-{s}.*.json.gz" for s in ("train", "validation")},
        announced=364_868_892,
    )
    assert named_documents(CORPORA["c4"], "train", str(real)) == [f"train {i}" for i in range(7)]
    assert named_documents(CORPORA["c4"], "eval", str(real)) == [
        " ".join(f"valid {i}" for i in range(1100))
    ]


def test_pile_val_has_one_split(real: Path) -> None:
    write(
        real / "val.jsonl",
        "\n".join(json.dumps({"text": t, "meta": {"pile_set_name": "x"}}) for t in ("a", "", "b")),
    )
    assert named_documents(CORPORA["pile-val"], "train", str(real)) == ["a", "b"]
    assert named_documents(CORPORA["pile-val"], "eval", str(real)) == ["a", "b"]


def test_a_folder_is_read_like_a_dataset(real: Path) -> None:
    write(real / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert documents(str(real), "train") == documents(str(real), "eval") == ["a", "b"]
    write(real / "test.jsonl", '{"text": "c"}\n')
    assert documents(str(real), "eval") == ["c"]


def test_a_folder_of_text_files_gives_whole_files(real: Path) -> None:
    write(real / "README.md", "about")
    write(real / "a.txt", "one\ntwo\n\nthree")
    write(real / "b.txt", "four")
    assert sorted(documents(str(real), "train")) == ["four", "one\ntwo\n\nthree"]


LAYOUTS = [
    ["a.jsonl", "b.jsonl"],
    ["train.jsonl", "test.jsonl"],
    ["train.jsonl", "valid.jsonl", "extra.jsonl"],
    [
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
        "other.jsonl",
    ],
    ["train/a.jsonl", "train/b.jsonl", "test/c.jsonl"],
    ["x/my-train/1.jsonl", "x/dev set/2.jsonl"],
    ["my_train.jsonl", "eval_1.jsonl"],
    ["constraint.jsonl", "latest.jsonl"],
    ["a/b.jsonl", "a-b.jsonl", "A.jsonl"],
    [".hidden.jsonl", "__x/a.jsonl", "b.jsonl", "config.json"],
    ["training 1.jsonl", "train1.jsonl", "a-train.jsonl", "train.2.jsonl"],
    ["train_test.jsonl", "b.jsonl"],
    ["a.jsonl.gz", "sub/b.jsonl.gz"],
    ["a.txt", "sub/b.txt"],
]


@pytest.mark.parametrize("names", LAYOUTS, ids=" ".join)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_folder_s_files_are_those_of_the_datasets_library(
    real: Path, names: list[str], split: Any
) -> None:
    import datasets

    for name in names:
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        write(real / name, '{"text": "x"}')
    theirs = datasets.load_dataset_builder(str(real)).config.data_files
    expected = next(theirs[side] for side in SIDES[split] if side in theirs)
    assert [str(p) for p in folder_files(real, split)] == [str(p) for p in expected]


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["a.txt", "b.txt", "my-test-notes.txt"], ["a.txt", "b.txt"]),
        (["a.txt", "dev.txt", "eval/c.txt", "eval/train.txt"], ["a.txt"]),
        (["x/a.txt", "test/b.txt", "valid.txt"], ["x/a.txt"]),
        (["data/test-00000-of-00001.txt", "data/a.txt", "b.txt"], ["b.txt", "data/a.txt"]),
    ],
)
def test_training_takes_what_is_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], train: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, name)
    assert documents(str(tmp_path), "train") == train
    assert not set(documents(str(tmp_path), "eval")) & set(train)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["test.txt"], "'test.txt' (test)"),
        (["dev/a.txt", "b-test.jsonl"], "'b-test.jsonl' (test), 'dev/a.txt' (validation)"),
        ([f"test-{n}.txt" for n in range(8)], "'test-5.txt' (test), ..."),
    ],
)
def test_a_folder_of_nothing_to_train_on_names_its_files(
    tmp_path: Path, names: list[str], says: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, '"a"')
    said = refused(tmp_path)
    assert said.startswith(
        f"folder '{tmp_path}' has no file to train or calibrate on: by their names, all are held "
        "out, '"
    )
    assert said.endswith(f"{says}. Give one of them as a file, or rename it.")
    assert documents(str(tmp_path), "eval")


def test_a_folder_of_files_is_read_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path / "a.jsonl", '{"text": "one"}')
    write(tmp_path / "b.txt", "two\nlines")
    write(tmp_path / "c.csv.gz", gzip.compress(b"text\nthree\n"))
    for about in ("README.md", "LICENSE.txt", "notes.md", "picture.png", "dataset_info.json"):
        write(tmp_path / about, "about")
    assert documents(str(tmp_path), "train") == ["one", "two\nlines", "three"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bad.txt", "caf\u00e9".encode("latin-1"), "bad.txt' is not UTF-8 text"),
        ("bad.txt", "plain".encode("utf-16-le"), "bad.txt' holds NUL bytes"),
        ("bad.jsonl", '{"content": "x"}', "bad.jsonl, line 1: expected a text"),
        ("bad.csv", "a,b\n1,2\n", "bad.csv' has no field 'text' (it has a, b)"),
        ("sub/bad.jsonl.gz", b"plain", "bad.jsonl.gz' cannot be unpacked"),
    ],
)
def test_the_bad_file_of_a_folder_is_named(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    write(tmp_path / "good.jsonl", '{"text": "one"}')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, content)
    assert says in refused(tmp_path)


def test_a_folder_whose_card_lists_its_files_is_the_library_s(real: Path) -> None:
    write(real / "used.jsonl", '{"text": "a"}')
    write(real / "unused.jsonl", '{"text": "b"}')
    readme(real, "default", {"train": "used.jsonl"})
    assert documents(str(real), "train") == ["a"]


def test_an_empty_folder_is_refused(real: Path) -> None:
    assert "cannot be loaded" in refused(real)
