"""What people read: sizes and times, tables and lines, names, and strings where something would be
read into them.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import typer

from lowbit.artifact.proof import Verification
from lowbit.cli.compare import Cell, Terms, cells, title_of
from lowbit.cli.display import (
    Progress,
    analysis_tables,
    artifact_lines,
    comparison_table,
    duration,
    linears_table,
    progress_bar,
    runtime_table,
    runtimes_table,
    size,
    summary,
)
from lowbit.cli.numbers import real, seed, whole
from lowbit.cli.places import write_json
from lowbit.cli.sentences import check_needed
from lowbit.console import Console, Table
from lowbit.errors import LowbitError, in_bytes, unknown
from lowbit.evaluate import together
from lowbit.model.calibration import Calibration
from lowbit.names import hub_id, hub_of, model_name
from lowbit.plan.targets import Verdict
from lowbit.run.asked import Result
from lowbit.run.events import BlockDone, Working
from lowbit.verbatim import code, code_block, encodable, literal, markdown, plotted, shell

# --- numbers with units ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1049, "1.0 KB"),
        (1051, "1.1 KB"),
        (999_900, "999.9 KB"),
        (10**6, "1.0 MB"),
        (123_456_789, "123.5 MB"),
        (10**9, "1.0 GB"),
        (10**12, "1000.0 GB"),
    ],
)
def test_a_size_in_powers_of_ten(count: float, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (490 << 20, "490.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 50, "1024.0 TiB"),
    ],
)
def test_a_size_in_powers_of_two(count: int, shown: str) -> None:
    assert in_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (89.9, "89.9 s"),
        (90, "1.5 min"),
        (3600, "60.0 min"),
        (5399, "90.0 min"),
        (5400, "1.5 h"),
        (360000, "100.0 h"),
    ],
)
def test_a_time(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(("batch", "shown"), [(1, "1 window a pass"), (8, "8 windows a pass")])
def test_windows_that_pass_together(batch: int, shown: str) -> None:
    assert together(batch) == shown


# --- options --------------------------------------------------------------------------------------


class Param:
    opts = ("-n", "--number")


@pytest.mark.parametrize(
    ("check", "good", "bad", "words"),
    [
        (whole(), (1, 2**31 - 1, None), (0, -1, 2**31), "a whole number from 1 to 2147483647"),
        (whole(2), (2,), (1, 0), "a whole number from 2 to 2147483647"),
        (whole(0, 9), (0, 9), (-1, 10), "a whole number from 0 to 9"),
        (seed, (0, 2**63 - 1), (-1, 2**63), f"a whole number from 0 to {2**63 - 1}"),
        (real(0.5, 2), (0.5, 2, None), (0.49, 2.01, math.nan, math.inf, 0), "a number from 0.5 to 2"),
        (real(1, 2, zero=True), (0, 1, 2), (0.5, -1), "0, or a number from 1 to 2"),
        (real(1, 1e6, "of GiB"), (80,), (0, 1e7), "a number of GiB from 1 to 1e+06"),
    ],
)  # fmt: skip
def test_numbers_and_their_ranges(check, good, bad, words: str) -> None:
    param: typer.CallbackParam = Param()  # type: ignore[assignment]
    for value in good:
        assert check(param, value) == value
    for value in bad:
        with pytest.raises(LowbitError) as e:
            check(param, value)
        assert (
            str(e.value)
            == f"--number {value if isinstance(value, int) else f'{value:g}'}: give {words}."
        )


@pytest.mark.parametrize(
    ("given", "there", "refused"),
    [
        ({"--shots": None, "--limit": None}, False, None),
        ({"--shots": 3, "--limit": 0}, True, None),
        ({"--shots": 0}, False, "--shots"),
        ({"--shots": None, "--limit": 3}, False, "--limit"),
    ],
)
def test_options_that_need_another(given, there: bool, refused: str | None) -> None:
    if refused is None:
        check_needed(given, "--tasks", there)
        return
    with pytest.raises(LowbitError, match=f"^{refused} has no effect without --tasks. Give both"):
        check_needed(given, "--tasks", there)


@pytest.mark.parametrize(
    ("given", "known", "hint"),
    [
        ("gptp", ("gptq", "awq"), "did you mean 'gptq'?"),
        ("GPTQ", ("gptq", "awq"), "did you mean 'gptq'?"),
        ("xyz", ("gptq", "awq"), "known: awq, gptq."),
        ("", ("b", "a"), "known: a, b."),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_all(given: str, known, hint: str) -> None:
    assert str(unknown("recipe", given, known)) == f"unknown recipe '{given}': {hint}"


def test_a_json_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1.5, None], "ü": "你"})
    assert json.loads(path.read_text()) == {"x": [1.5, None], "ü": "你"}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
    write_json(path, {})
    assert path.read_text() == "{}\n"


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "hub", "name"),
    [
        ({"model": "meta/tiny", "source": {"hub": "meta/tiny"}}, "meta/tiny", "tiny"),
        ({"model": "/a/b", "source": {"hub": "o/n"}}, "o/n", "n"),
        ({"model": "/a/b/", "source": {"hub": None}}, None, "b"),
        ({"model": "."}, None, ""),
        ({"model": ".."}, None, ""),
        ({"model": "a/.."}, None, ""),
        ({"model": "/"}, None, ""),
        ({"model": "/c/models--o--a--b/snapshots/1"}, "o/a--b", "a--b"),
        ({"model": "/c/models--o--n/snapshots/1", "source": {}}, "o/n", "n"),
        ({"model": "/c/xmodels--o--n/snapshots/1"}, None, "1"),
        ({"model": "/c/models--o--n/snapshots/1/sub"}, None, "sub"),
    ],
)
def test_what_a_model_is_called(report, hub: str | None, name: str) -> None:
    assert hub_of(report) == hub and model_name(report) == name
    if "source" not in report:
        assert hub_id(report["model"]) == hub


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (Cell("W4A16g32", "awq+gptq"), "W4A16g32-awq+gptq"),
        (Cell("float", "original"), "float-original"),
        (Cell("W4", "a/mine.toml"), "W4-mine-"),
        (Cell("W4", "b/mine.toml"), "W4-mine-"),
    ],
)
def test_a_cell_has_a_file_name(cell: Cell, name: str) -> None:
    assert "/" not in cell.name and cell.name.startswith(name)
    assert (len(cell.name) == len(name)) == (not cell.recipe.endswith(".toml"))
    assert Cell("W4", "a/mine.toml").name != Cell("W4", "b/mine.toml").name


def test_cells_are_all_combinations_behind_the_original() -> None:
    found = [(c.scheme, c.recipe) for c in cells(["W4A16", "W2A16g64"], ["rtn", "awq"])]
    assert found == [
        ("float", "original"),
        ("bfloat16", "original"),
        ("W4A16", "rtn"),
        ("W4A16", "awq"),
        ("W2A16g64", "rtn"),
        ("W2A16g64", "awq"),
    ]


@pytest.mark.parametrize(
    ("schemes", "recipes", "settings", "words"),
    [
        ([], ["rtn"], [], "no scheme to compare."),
        (["W4A16"], [], [], "no recipe to compare."),
        (["W4A16", "W4A16"], ["rtn"], [], "scheme 'W4A16' is given twice."),
        (["W4A16"], ["rtn", "rtm"], [], "unknown recipe 'rtm': did you mean 'rtn'?"),
        (["W4A16", "W9A16"], ["rtn"], [], "scheme 'W9A16': bits must be 1 to 8, got 9."),
        (["W4A16"], ["rtn"], ["awq.rows=3"], "none of the recipes rtn has."),
        (["W4A16"], ["rtn"], ["kv.clip=0.5"], "none of the recipes rtn has."),
        (["W4A16"], ["rtn"], ["calibration.samples=3"], "none of the recipes rtn has."),
        (["W4A16"], ["rtn", "awq"], ["awq.rows=x"], "recipe 'awq': awq.rows must be of type int"),
    ],
)
def test_cells_that_cannot_be_measured(schemes, recipes, settings, words: str) -> None:
    with pytest.raises(LowbitError) as e:
        cells(schemes, recipes, settings)
    assert words in str(e.value)


def test_a_comparisons_title_says_what_is_equal() -> None:
    terms = Terms("m", Calibration("t.txt", 4, 32), "e.txt", 64, seed=3)
    start = "m; calibration t.txt, 4 x 32 tokens, seed 3; evaluation e.txt, windows of 64 tokens"
    assert title_of(terms, []) == start
    assert title_of(terms, [{"batch": 8}, {}, {"batch": 1}, {"batch": 8}]) == (
        f"{start}, 1 window a pass, 8 windows a pass"
    )
    assert title_of(terms, [{"error": "no"}, {"begin": " cut without BOS"}]) == (
        f"{start} cut without BOS"
    )


# --- strings where something would be read into them ----------------------------------------------


TEXTS = ["", "a b", "-rf", "--x=1", "'", '"', "a'b\"c", "$HOME", "`x`", "a\\", "*", "~", "!", "a\nb", "üñ", "#", ";"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_shell_reads_one_word_back(text: str) -> None:
    (word,) = shlex.split(shell(text), comments=True)
    assert word == (f"./{text}" if text.startswith("-") else text)
    assert not word.startswith("-")


@pytest.mark.parametrize("text", TEXTS)
def test_python_reads_a_literal_back(text: str) -> None:
    assert eval(literal(text)) == text
    assert literal(Path("/a b")) == '"/a b"'


@pytest.mark.parametrize(
    "text", ["a", "`", "``", "a`b", "a``b`c", "`a", "a`", " a ", "a\nb", "``a``"]
)
def test_a_code_span_closes_where_its_text_ends(text: str) -> None:
    """CommonMark 6.1: a span ends at the next run of as many backticks as opened it; one space at
    both ends is taken off.
    """
    found = re.fullmatch(r"(`+)(?!`)(.*?)(?<!`)\1", code(text))
    assert found and not re.search(rf"(?<!`){found[1]}(?!`)", found[2])
    inner = found[2]
    if inner.startswith(" ") and inner.endswith(" "):
        inner = inner[1:-1]
    assert inner == " ".join(text.split())


@pytest.mark.parametrize("lines", [("a", "b"), ("```",), ("````", "```"), ("a ``` b",), ()])
def test_a_code_block_closes_where_its_lines_end(lines: tuple[str, ...]) -> None:
    first, *inner, last = code_block("sh", *lines).split("\n")
    assert first == f"{last}sh" and set(last) == {"`"} and len(last) >= 3
    assert inner == (list(lines) or [""])
    assert not any(line.startswith(last) for line in inner)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("snake_case_name", "snake_case_name"),
        ("_a_", "\\_a\\_"),
        ("__init__", "\\_\\_init\\_\\_"),
        ("a_ b", "a\\_ b"),
        ("1_2", "1_2"),
        ("# a", "\\# a"),
        ("a\n\n# b", "a \\# b"),
        ("x & y ~z~", "x \\& y \\~z\\~"),
        ("<script>", "\\<script\\>"),
        ("\\", "\\\\"),
    ],
)
def test_markdown_finds_nothing_to_format(text: str, shown: str) -> None:
    assert markdown(text) == shown
    assert re.sub(r"\\(.)", r"\1", shown) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a_b", "a_b"), ("__a", " __a"), ("$x$ $", "\\$x\\$ \\$"), ("\udcff", "?"), ("_\udcff$", " _?\\$")],
)  # fmt: skip
def test_a_label_of_a_plot_is_seen_as_it_is(text: str, shown: str) -> None:
    assert plotted(text) == shown


@pytest.mark.parametrize(("text", "shown"), [("ü你", "ü你"), ("a\udcffb\ud800", "a?b?"), ("", "")])
def test_text_is_made_encodable(text: str, shown: str) -> None:
    assert encodable(text) == encodable(text).encode("utf-8").decode("utf-8") == shown


# --- tables and lines -----------------------------------------------------------------------------


def rows_of(table: Table) -> list[list[str]]:
    """The cells of a table, its head first."""
    columns = [[str(c.header), *map(str, c.cells)] for c in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


LINEAR = {
    "name": "model.layers.0.mlp.up_proj",
    "scheme": "W4A16g32",
    "shape": [96, 64],
    "bytes": 3584,
    "bits_per_weight": 4.66667,
    "moved": 0.1254,
    "error_nearest": 0.012345,
    "error": 0.0067891,
}


def test_the_table_of_linears() -> None:
    skipped = {"name": "model.layers.0.router", "skipped": "too small"}
    assert rows_of(linears_table({"linears": [LINEAR, skipped]}))[1:] == [
        ["model.layers.0.mlp.up_proj", "W4A16g32", "96 x 64", "3.6 KB", "4.667", "12.5%", "0.0123 -> 0.00679"],
        ["model.layers.0.router", "skipped", "too small", "", "", "", ""],
    ]  # fmt: skip


def test_the_lines_on_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    report = {
        "blocks": [{"name": "b0", "loss_before": 0.123456, "loss_after": 0.01, "seconds": 100.0}],
        "copied": {"extra": "not known"},
        "left_out": {"x.bin": "not needed"},
        "remarks": ["look"],
        "shards": {"s": {"bytes": 1500, "sha256": "abc"}},
        "hash": "h",
        "lowbit": "9",
        "model": "m",
        "seed": 3,
    }
    assert list(artifact_lines(report, tmp_path)) == [
        "b0: loss 0.1235 -> 0.01, 1.7 min",
        "extra: not known",
        "x.bin: left out, not needed",
        "note: look",
        'name = "x"',
        "s  1.5 KB  sha256 abc",
        "hash h, made by lowbit 9 from m, seed 3",
    ]
    for key in ("copied", "left_out", "remarks"):
        del report[key]  # an older version had none
    assert len(list(artifact_lines(report, tmp_path))) == 4


def test_the_table_of_a_comparison() -> None:
    row = dict(scheme="W4", recipe="rtn", bits=4.25, bytes=10**6, perplexity=12.3456, kl=0.01234, top1=0.9, seconds=100.0)  # fmt: skip
    rows = [row, {**row, "bits": None, "seconds": 0.0}, dict(scheme="W2", recipe="awq", error="e")]
    assert rows_of(comparison_table(rows, "t")) == [
        ["scheme", "recipe", "bits", "size", "perplexity", "KL", "top-1", "time"],
        ["W4", "rtn", "4.250", "1.0 MB", "12.35", "0.0123", "90.0%", "1.7 min"],
        ["W4", "rtn", "", "1.0 MB", "12.35", "0.0123", "90.0%", ""],
        ["W2", "awq", "", "", "failed", "", "", ""],
    ]
    with_tasks = [{**row, "tasks": {"mean_acc": 0.51239}}, {**row, "tasks": {"mean_acc": None}}]
    assert [r[7] for r in rows_of(comparison_table(with_tasks, "t"))] == ["mean acc", "0.512", ""]


def test_the_tables_of_runtimes() -> None:
    takes = Verdict("A", True, "gptq", "4-bit", "lowbit export OUT", "A 1.0", notes=("n",))
    is_it = Verdict("B", True, "ct", "4-bit", requires="B 2")
    not_it = Verdict("C", False, reasons=("first.", "second."))
    assert rows_of(runtimes_table([takes, is_it, not_it]))[1:] == [
        ["A", "loads", "gptq", "4-bit - A 1.0\nlowbit export OUT\nn"],
        ["B", "loads", "ct", "4-bit - B 2\nas quantized, no export"],
        ["C", "refuses", "", "first.\nsecond."],
    ]
    assert [r[0] for r in rows_of(runtime_table(takes))[1:]] == [
        "runtime", "needs", "format", "weights", "export", "note",
    ]  # fmt: skip


def test_the_tables_of_an_analysis() -> None:
    site = {
        "linears": ["model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"],
        "zeros": 0.25,
        "kernel": {"A8 per token": 0.1234, "A8 CrossQuant 0.15": 0.01, "A4 per token": 0.5},
        "largest": 12.345,
        "channel_spread": 3.0,
        "token_spread": 2.0,
        "outlier_channels": 4,
    }
    runs = [
        ("none", 0.0, None, 10.0),
        ("bound", 0.1, None, 11.0),
        ("random", 0.1, None, 12.0),
        ("quantized", 0.0, "A8 per token", 10.5),
        ("restored", 0.0, "A8 per token", 10.25),
    ]
    data = {
        "title": "t",
        "grids": list(site["kernel"]),
        "sites": [site],
        "mean": site["kernel"],
        "removals": [dict(zip(("kind", "share", "grid", "perplexity"), r, strict=True)) for r in runs],
        "knees": {"bound": 0.0123, "random": None},
    }  # fmt: skip
    inputs, grids, removed = map(rows_of, analysis_tables(data))
    assert inputs[0][:5] == ["block", "input of", "zero", "per token", "cross 0.15"]
    assert inputs[1] == ["3", "q_proj, k_proj", "25.0%", "12.34%", "1.00%", "12.3", "3", "2", "4"]
    assert grids[1:] == [
        ["A8 per token", "12.340%", "10.5000", "10.2500"],
        ["A8 CrossQuant 0.15", "1.000%", "", ""],
        ["A4 per token", "50.000%", "", ""],
    ]
    assert removed == [
        ["set to zero", "bound", "random"],
        ["0.1", "11.0000", "12.0000"],
        ["1 % worse at", "0.012", "never here"],
    ]
    assert len(analysis_tables({**data, "removals": []})) == 2


# --- a run ----------------------------------------------------------------------------------------


def done(index: int, seconds: float, resumed: bool = False, **more: object) -> BlockDone:
    record = {
        "name": f"model.layers.{index}",
        "linears": [LINEAR, {**LINEAR, "bytes": 1536 * 2}],
        "loss_before": 2.0,
        "loss_after": 1.0,
        "seconds": seconds,
        "peak_memory": 2 * 10**9,
    }
    return BlockDone(index, 4, {**record, **more}, resumed)


def test_a_run_into_a_file_is_a_line_a_block() -> None:
    """The time left is the mean of the blocks that this run has made itself."""
    file = io.StringIO()
    with Progress(Console(file=file)) as progress:
        progress.working(Working(0, 4, "tuning"))
        progress(done(0, 1000.0, resumed=True))
        progress(done(1, 10.0))
        progress(done(2, 20.0, trouble=["a", "b"]))
        progress(done(3, 30.0))
    # (3584 + 3072) bytes for 2 x 96 x 64 weights.
    assert file.getvalue().splitlines() == [
        "block  linear  loss rtn -> tuned  bits  time  memory  left",
        "1/4 (resumed)  2 linears  2 -> 1  4.333  16.7 min  2.0 GB  50.0 min",
        "2/4  2 linears  2 -> 1  4.333  10.0 s  2.0 GB  20.0 s",
        "3/4  2 linears  2 -> 1  4.333  20.0 s  2.0 GB  15.0 s  a; b",
        "4/4  2 linears  2 -> 1  4.333  30.0 s  2.0 GB  0.0 s",
    ]


def test_a_bar_is_for_terminals() -> None:
    file = io.StringIO()
    with progress_bar(Console(file=file)) as told:
        told(1, 2)
    assert file.getvalue().strip() == ""


REPORT = {
    "size": {"before": 2e6, "after": 5e5, "bits_per_weight": 4.5, "model_bits_per_weight": 5.25},
    "quality": None,
    "hash": "0123456789abcdef" * 4,
    "seconds": 12.0,
    "format": "compressed-tensors",
    "model": "m",
    "recipe": {"scheme": "W4A16"},
}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, "2.0 MB -> 500.0 KB on disk; 4.500 bits per quantized weight, 5.250 over all parameters"),
        ({}, "verified: 3 tensors and 2 linears as tuned; loader check passed"),
        ({}, "hash 0123456789abcdef, 12.0 s, report in out/report.json"),
        ({}, "serve     vllm serve out    (which versions: lowbit plan m --scheme W4A16)"),
        ({"remarks": ["look"]}, "note: look"),
        ({"offload": {"used": "disk", "bytes": 1500}}, "activations were kept on disk, 1.5 KB at most"),
        ({"left_out": {"x.bin": "why", "README.md": "own", ".git": "own"}}, "note: left out: x.bin (why)"),
        (
            {"left_out": {f"w{i}_scale": f"the scale of 'w{i}', which is dequantized" for i in range(9)}},
            "note: left out: w0_scale (the scale of 'w0', which is dequantized) and 8 alike",
        ),
        (
            {"copied": {f"t{i}": "" for i in range(5)}},
            "note: 5 tensors that the model's class does not know were copied as they are: t0, t1, t2 "
            "and 2 more",
        ),
        (
            {
                "quality": {
                    "text": "t (held out)",
                    "float": {"perplexity": 10.0},
                    "quantized": {"perplexity": 11.5, "kl": 0.125, "top1": 0.875, "windows": 16, "length": 64},
                }
            },
            "t (held out), 16 x 64 tokens: perplexity 10 -> 11.5, KL 0.125, top-1 87.5%",
        ),
        (
            {"format": "lowbit", "beyond_compressed_tensors": "quantized keys and values"},
            "serve     no server reads this format, chosen for quantized keys and values",
        ),
        ({"format": "lowbit"}, "serve     no server reads this format, chosen for what compressed-tensors cannot carry"),
    ],
)  # fmt: skip
def test_a_run_ends_with_what_there_is_to_know(more, line: str) -> None:
    result = Result(Path("out"), {**REPORT, **more}, Verification(3, 2, "passed"))
    assert line in summary(result).splitlines()
    if "left_out" in more:
        assert "README.md (" not in summary(result) and ".git (" not in summary(result)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        (Verification(3, 2, "not asked for"), "3 tensors and 2 linears as tuned; loader check not asked for"),
        (
            Verification(3, 2, "passed", 1.234e-6, 1.0),
            "3 tensors and 2 linears as tuned; logits by transformers within 1.2e-06 of the tuned "
            "model's, top-1 equal at 100.0%",
        ),
        (
            Verification(3, 2, "passed; llama.cpp not run", 0.01, 0.5, "X", 1e-5, "those of the file"),
            "3 tensors and 2 linears as tuned; logits by X within 1.0e-02 (1.0e-05 with its weights in "
            "float32) of those of the file, top-1 equal at 50.0% (llama.cpp not run)",
        ),
    ],
)  # fmt: skip
def test_a_verification_in_a_line(found: Verification, shown: str) -> None:
    assert found.summary == shown
    assert Verification(**found.as_dict()) == found
