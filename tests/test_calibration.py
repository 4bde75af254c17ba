"""Rows of tokens: exactly as many as asked or an error, the same for the same seed, and cut where
the papers cut.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_tokenizer
from tokenizers import processors
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.model.calibration import Calibration, Rows, draw_rows, evaluation_windows

BOS = 1
Sides = dict[str, list[str]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sides], None]:
    """Replace what every source holds: {"train": documents, "eval": documents}."""

    def install(sides: Sides) -> None:
        monkeypatch.setattr(
            "lowbit.model.calibration.iter_documents", lambda source, split: iter(sides[split])
        )

    return install


def prose(name: str, words: int) -> str:
    """Text in which no stretch occurs twice."""
    return " ".join(f"{name}{i}" for i in range(words))


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps(t) for t in texts))
    return str(path)


def as_set(rows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(r) for r in rows.tolist()}


def stream(tokenizer: Any, texts: list[str]) -> list[int]:
    """Documents one after the other, each with its BOS: the independent version."""
    out: list[int] = []
    for text in texts:
        out += [BOS, *tokenizer.encode(text, add_special_tokens=False)]
    return out


def windows_of(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]


def begun(tokens: list[int], length: int) -> list[list[int]]:
    """The same with BOS for the first token of each, if the first text begins with it."""
    first = tokens[:1] if tokens[0] == BOS else []
    return [[*first, *w[len(first) :]] for w in windows_of(tokens, length)]


# --- any source: rows of the joined documents -----------------------------------------------------


def test_rows_are_distinct_cuts_of_the_joined_documents(tmp_path: Path, tokenizer: Any) -> None:
    texts = [prose(f"d{i}x", 20 + 7 * i) for i in range(70)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    tokens = stream(tokenizer, texts)
    pool = {tuple(w) for w in begun(tokens, 32)}
    rows = draw_rows(Calibration(source, 20, 32), tokenizer, seed=3, held_out=5)
    assert rows.calibration.shape == (20, 32) and rows.held_out.shape == (5, 32)
    assert rows.calibration.dtype == rows.held_out.dtype == torch.int64
    assert rows.source == source and rows.tokens_available == len(tokens)
    drawn, held = as_set(rows.calibration), as_set(rows.held_out)
    assert len(drawn) == 20 and len(held) == 5 and not drawn & held
    assert drawn | held <= pool


def test_tokens_take_four_bytes_each(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn from may have 1e9 tokens."""

    class Numbers:
        bos_token_id = None

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(range(1000, 3000)) for _ in texts]}

    monkeypatch.setattr(
        "lowbit.model.calibration.iter_documents", lambda source, split: ("x" for _ in range(500))
    )
    tracemalloc.start()
    try:
        rows = draw_rows(Calibration("some.jsonl", 4, 100), Numbers(), 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.tokens_available == 1_000_000 and rows.calibration[0, 0] % 100 == 0
    # A batch of 64 documents is held as lists; the array may be copied once as it grows.
    assert peak < 1_000_000 * 9 + 64 * 2000 * 36 * 2


def test_every_document_brings_its_bos(tmp_path: Path, tokenizer: Any) -> None:
    texts = [prose("a", 30), prose("b", 30), prose("c", 30)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    count = len(stream(tokenizer, texts)) // 8
    for bos, found in (("no", 3), ("auto", count)):
        rows = draw_rows(Calibration(source, count, 8, bos), tokenizer, 0).calibration
        assert int((rows == BOS).sum()) == found + 2 * (bos == "auto")


def knows_bos_and_adds_none() -> Any:
    bare = tiny_tokenizer(bos=False)
    bare.bos_token, bare.eos_token = "<s>", "</s>"
    return bare


def adds_eos_too() -> Any:
    own = tiny_tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return own


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (tiny_tokenizer, [BOS], []),
        (lambda: tiny_tokenizer(bos=False), [], []),
        (knows_bos_and_adds_none, [], []),
        (adds_eos_too, [BOS], [2]),
    ],
)
def test_documents_have_the_special_tokens_that_the_tokenizer_gives_them(
    tmp_path: Path, make: Callable[[], Any], first: list[int], last: list[int]
) -> None:
    own = make()
    for texts in ([prose("a", 30)], [prose("a", 30), prose("b", 30), prose("c", 30)]):
        source = jsonl(tmp_path / "a.jsonl", texts)
        tokens = [
            i for t in texts for i in (*first, *own.encode(t, add_special_tokens=False), *last)
        ]
        expected = begun(tokens, 8)
        assert evaluation_windows(source, own, 8).tolist() == expected
        drawn = draw_rows(Calibration(source, len(expected), 8), own, 0)
        assert as_set(drawn.calibration) == {tuple(w) for w in expected}
        assert drawn.tokens_available == len(tokens)


@pytest.mark.parametrize("held_out", [0, 1, 16])
def test_exactly_as_many_rows_or_an_error_that_says_how_many(
    tmp_path: Path, tokenizer: Any, held_out: int
) -> None:
    text = prose("w", 300)
    source = str(tmp_path / "a.txt")
    Path(source).write_text(text)
    tokens = stream(tokenizer, [text])
    most = len(tokens) // 16
    for samples in (1, most - 1, most):
        rows = draw_rows(Calibration(source, samples, 16), tokenizer, 0, held_out)
        assert len(rows.calibration) == samples
        assert len(rows.held_out) == min(held_out, most - samples)
    with pytest.raises(LowbitError) as e:
        draw_rows(Calibration(source, most + 1, 16), tokenizer, 0, held_out)
    assert str(e.value) == (
        f"'{source}' yields {most} rows of 16 tokens ({len(tokens)} tokens read), {most + 1} were "
        "asked for. "
        f"Use --samples {most}, a smaller --length, or more text."
    )
    with pytest.raises(
        LowbitError, match=r"yields 0 rows of 99999 tokens .* Use a smaller --length or more text\."
    ):
        draw_rows(Calibration(source, 1, 99999), tokenizer, 0, held_out)


def test_the_seed_decides_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", [prose(f"d{i}x", 40) for i in range(40)])

    def draw(seed: int) -> Rows:
        random.seed(seed + 100)  # the global generators have no say
        torch.manual_seed(seed + 100)
        return draw_rows(Calibration(source, 8, 32), tokenizer, seed)

    assert draw(1).sha256 == draw(1).sha256
    assert torch.equal(draw(1).calibration, draw(1).calibration)
    assert draw(1).sha256 != draw(2).sha256


def test_the_hash_covers_both_tensors() -> None:
    a, b = torch.zeros(2, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    seen = {Rows(x, y, "s", 0).sha256 for x, y in ((a, b), (b, a), (a, a[:0]), (a, b + 1))}
    assert len(seen) == 4 and all(len(s) == 64 for s in seen)
    assert Rows(a, b, "s", 0).sha256 == Rows(a.clone(), b.clone(), "other name", 9).sha256


def test_the_standard_library_is_held_out_by_file(corpus: Any, tokenizer: Any) -> None:
    sides = {"train": [prose("t", 200), prose("u", 200)], "eval": [prose("e", 60), prose("f", 60)]}
    corpus(sides)
    rows = draw_rows(Calibration("stdlib", 4, 32), tokenizer, 0, held_out=3)
    assert rows.held_out.tolist() == begun(stream(tokenizer, sides["eval"]), 32)[:3]
    corpus(sides | {"eval": ["short"]})
    assert draw_rows(Calibration("stdlib", 4, 32), tokenizer, 0).held_out.shape == (0, 32)


def test_the_real_standard_library_gives_windows(tokenizer: Any) -> None:
    assert evaluation_windows("stdlib", tokenizer, 64, 4).shape == (4, 64)


# --- named corpora: the published draws -----------------------------------------------------------


def test_wikitext2_rows_are_windows_of_the_one_document(corpus: Any, tokenizer: Any) -> None:
    sides = {"train": [prose("t", 400)], "eval": [prose("e", 200)]}
    corpus(sides)
    ids = tokenizer(sides["train"][0])["input_ids"]
    rows = draw_rows(Calibration("wikitext2", 50, 32), tokenizer, 5, held_out=2)
    rng = random.Random(5)
    starts = [rng.randint(0, len(ids) - 32 - 1) for _ in range(50)]
    assert rows.calibration.tolist() == [ids[s : s + 32] for s in starts]
    assert rows.held_out.tolist() == windows_of(tokenizer(sides["eval"][0])["input_ids"], 32)[:2]
    assert rows.tokens_available == len(ids)


def test_wikitext2_needs_one_token_more_than_a_row(corpus: Any, tokenizer: Any) -> None:
    text = prose("t", 50)
    tokens = len(tokenizer(text)["input_ids"])
    corpus({"train": [text], "eval": [text]})
    rows = draw_rows(Calibration("wikitext2", 3, tokens - 1), tokenizer, 0)
    assert rows.calibration.tolist() == [tokenizer(text)["input_ids"][:-1]] * 3
    with pytest.raises(
        LowbitError, match=rf"yields 0 rows of {tokens} tokens \({tokens} tokens read\)"
    ):
        draw_rows(Calibration("wikitext2", 3, tokens), tokenizer, 0)


def test_c4_rows_are_windows_of_different_long_documents(corpus: Any, tokenizer: Any) -> None:
    texts = [prose(f"d{i}x", 3 if i % 3 else 60) for i in range(300)]
    corpus({"train": texts, "eval": [prose("e", 100)]})
    rows = draw_rows(Calibration("c4", 100, 40), tokenizer, 0, held_out=2)
    long = [i for i in map(tokenizer.encode, texts) if len(i) > 40]
    homes = [
        next(
            n for n, ids in enumerate(long) if any(ids[s : s + 40] == row for s in range(len(ids)))
        )
        for row in rows.calibration.tolist()
    ]
    assert len(long) == 100 and sorted(homes) == list(range(100)) and homes != list(range(100))
    assert rows.held_out.shape == (2, 40)
    assert (
        rows.calibration.tolist()
        == draw_rows(Calibration("c4", 100, 40), tokenizer, 0).calibration.tolist()
    )
    with pytest.raises(LowbitError, match="yields 100 rows of 40 tokens .* 101 were asked for"):
        draw_rows(Calibration("c4", 101, 40), tokenizer, 0)


def test_c4_stops_reading_when_it_has_enough(corpus: Any, tokenizer: Any) -> None:
    texts = [prose(f"d{i}x", 60) for i in range(300)]
    corpus({"train": texts, "eval": [prose("e", 100)]})
    rows = draw_rows(Calibration("c4", 3, 40), tokenizer, 0)
    assert rows.tokens_available < sum(len(tokenizer.encode(t)) for t in texts) / 50


def test_pile_rows_are_whole_short_documents_and_held_out_ones_are_others(
    corpus: Any, tokenizer: Any
) -> None:
    short = [f"  {prose(f'd{i}x', 20)}\n" for i in range(60)]
    long = [prose("L", 600)]
    corpus({"train": long + short, "eval": long + short})
    rows = draw_rows(Calibration("pile-val", 5, 64), tokenizer, 42, held_out=4)
    assert rows.calibration.shape == (5, 64) and rows.held_out.shape == (4, 64)
    order = [t.strip() for t in long + short]
    random.Random(42).shuffle(order)
    kept = [ids for ids in map(tokenizer.encode, order) if len(ids) <= 512]
    first, used = [], 0
    while len(first) < 5 * 64:
        first += kept[used]
        used += 1
    assert rows.calibration.flatten().tolist() == first[: 5 * 64]
    assert rows.held_out.flatten().tolist() == sum(kept[used:], [])[: 4 * 64]
    total = sum(map(len, kept)) // 64
    with pytest.raises(LowbitError, match=f"yields {total} rows of 64 tokens"):
        draw_rows(Calibration("pile-val", 10_000, 64), tokenizer, 42)


@pytest.mark.parametrize("source", ["wikitext2", "c4", "pile-val", "stdlib"])
def test_no_held_out_rows_are_no_rows(corpus: Any, tokenizer: Any, source: str) -> None:
    corpus({"train": [prose("a", 60), prose("b", 60)], "eval": ["x"]})
    rows = draw_rows(Calibration(source, 1, 16), tokenizer, 0, held_out=0)
    assert rows.held_out.shape == (0, 16) and rows.held_out.dtype == torch.int64
    with pytest.raises(LowbitError, match="cannot be negative, got -1"):
        draw_rows(Calibration(source, 1, 16), tokenizer, 0, held_out=-1)


# --- evaluation windows ---------------------------------------------------------------------------


def test_one_document_is_tokenised_once_with_bos_at_its_start_only(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose("w", 100))
    ids = tokenizer(path.read_text())["input_ids"]
    windows = evaluation_windows(str(path), tokenizer, 32, bos="no")
    assert windows.tolist() == windows_of(ids, 32) and windows.dtype == torch.int64
    assert (windows == BOS).nonzero().tolist() == [[0, 0]]
    assert len(ids) % 32, "a tail is there to be dropped"


def test_several_documents_bring_a_bos_each(tmp_path: Path, tokenizer: Any) -> None:
    texts = [prose(f"d{i}x", 9) for i in range(100)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    windows = evaluation_windows(source, tokenizer, 32)
    assert windows.tolist() == begun(stream(tokenizer, texts), 32)
    assert torch.equal(evaluation_windows(source, tokenizer, 32, 3), windows[:3])
    assert torch.equal(evaluation_windows(source, tokenizer, 32, 10**9), windows)


def test_c4_is_evaluated_on_256_windows(corpus: Any, tokenizer: Any) -> None:
    corpus({"train": [], "eval": [prose("e", 1500)]})
    ids = tokenizer(prose("e", 1500))["input_ids"]
    assert evaluation_windows("c4", tokenizer, 8).tolist() == windows_of(ids, 8)[:256]
    assert len(evaluation_windows("c4", tokenizer, 8, 300)) == 256
    assert len(evaluation_windows("c4", tokenizer, 8, 5)) == 5
    assert len(evaluation_windows("wikitext2", tokenizer, 8)) == len(ids) // 8 > 256


def test_text_shorter_than_a_window_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("short")
    count = len(tokenizer("short")["input_ids"])
    assert evaluation_windows(str(path), tokenizer, count).shape == (1, count)
    with pytest.raises(
        LowbitError,
        match=rf"a.txt' has {count} tokens, too few for a window of {count + 1}\. Use a smaller --length",
    ):
        evaluation_windows(str(path), tokenizer, count + 1)


@pytest.mark.parametrize(("length", "limit"), [(1, None), (0, None), (-3, None), (8, 0), (8, -1)])
def test_windows_that_leave_nothing_to_predict_are_refused(
    tokenizer: Any, length: int, limit: int | None
) -> None:
    with pytest.raises(LowbitError, match="at least 1 window of at least 2 tokens"):
        evaluation_windows("stdlib", tokenizer, length, limit)


# --- the description ------------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    assert Calibration() == Calibration("stdlib", 128, 2048)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (-1, 8), (4, 1), (4, 0), (4, -8)])
def test_sizes_that_make_no_row_are_refused(samples: int, length: int) -> None:
    with pytest.raises(LowbitError, match=f"got {samples} x {length}"):
        Calibration("stdlib", samples, length)


def test_a_calibration_needs_a_source() -> None:
    with pytest.raises(LowbitError, match="--calib"):
        Calibration("")
