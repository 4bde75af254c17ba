"""`lowbit compare`: equal terms, resumable cells, failures shown as failures, reports that agree
with the cells.
"""

import csv
import json

import pytest
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.cli.compare import bench
from lowbit.errors import DiskFull


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def compare(model, out, *more, schemes="W4A16,W4A8", recipes="rtn,awq+gptq"):
    text = str(model / "text.txt")
    args = [
        "compare",
        model,
        "--schemes",
        schemes,
        "--recipes",
        recipes,
        "--calib",
        text,
        "--samples",
        8,
        "--length",
        32,
    ]
    args += ["--text", text, "--eval-length", 32, "--windows", 6, "-o", out, *more]
    return CliRunner().invoke(app, [str(a) for a in args])


def runs_of(monkeypatch):
    """A list that gets the name of every cell that is quantized from now on."""
    names, quantize = [], bench.quantize

    def noted(*args, **options):
        names.append(options["out"].name)
        return quantize(*args, **options)

    monkeypatch.setattr(bench, "quantize", noted)
    return names


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("c") / "cmp"
    result = compare(model, out)
    assert result.exit_code == 0, result.output
    return out


def test_all_cells_on_equal_terms(done):
    rows = json.loads((done / "comparison.json").read_text())["rows"]
    assert [(r["scheme"], r["recipe"]) for r in rows] == [
        ("float", "original"),
        ("bfloat16", "original"),
        ("W4A16", "rtn"),
        ("W4A16", "awq+gptq"),
        ("W4A8", "rtn"),
        ("W4A8", "awq+gptq"),
    ]
    assert len({r["windows_sha256"] for r in rows}) == 1
    assert {r["begin"] for r in rows} == {" that begin with BOS"}
    assert len({r["calibration"]["sha256"] for r in rows[2:]}) == 1
    assert rows[0]["kl"] < 1e-6 < rows[2]["kl"]
    assert rows[3]["kl"] < rows[2]["kl"]


def test_reports_agree_with_the_cells(done):
    rows = json.loads((done / "comparison.json").read_text())["rows"]
    table = list(csv.DictReader((done / "comparison.csv").read_text().splitlines()))
    assert [float(t["perplexity"]) for t in table] == pytest.approx(
        [r["perplexity"] for r in rows], abs=1e-4
    )
    assert {r["batch"] for r in rows} == {min(8, rows[0]["windows"])}
    assert f"{rows[0]['batch']} windows a pass" in (done / "comparison.md").read_text()
    page = (done / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert all(t["perplexity"] in (done / "comparison.md").read_text() for t in table)
    assert not (done / "artifacts" / "W4A16-rtn").exists()


def test_a_repeated_command_measures_nothing_again_and_a_new_cell_is_added(
    done, model, monkeypatch
):
    ran = runs_of(monkeypatch)
    assert compare(model, done).exit_code == 0
    assert ran == []
    assert compare(model, done, "--keep", recipes="rtn,awq").exit_code == 0
    assert ran == ["W4A16-awq", "W4A8-awq"]
    assert (done / "artifacts" / "W4A8-awq" / "report.json").is_file()


def test_a_failure_is_a_row_and_is_tried_again(model, tmp_path, monkeypatch):
    result = compare(model, tmp_path / "c", schemes="W4A16g48,W4A16g32", recipes="rtn")
    assert result.exit_code == 1
    assert "group size 48 does not divide" in " ".join(result.output.split())
    rows = json.loads((tmp_path / "c" / "comparison.json").read_text())["rows"]
    assert ["error" in r for r in rows] == [False, False, True, False]
    assert "failed" in (tmp_path / "c" / "comparison.md").read_text()
    ran = runs_of(monkeypatch)
    compare(model, tmp_path / "c", schemes="W4A16g48,W4A16g32", recipes="rtn")
    assert ran == ["W4A16g48-rtn"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(recipes="rtn,awk"), "awq"),
        (dict(recipes="rtn,rtn"), "given twice"),
        (dict(schemes="W44"), "2 to 8|must be 1 to 8"),
        (dict(schemes=""), "no scheme"),
    ],
)
def test_bad_names_are_refused_before_work(model, tmp_path, options, words):
    import re

    result = compare(model, tmp_path / "c", **options)
    assert result.exit_code == 2
    assert re.search(words, " ".join(result.output.split()))
    assert not (tmp_path / "c").exists()


def test_settings_reach_the_recipes_that_have_the_method(model, tmp_path):
    result = compare(model, tmp_path / "c", "--set", "tesseraq.iters=4")
    assert result.exit_code == 2 and "none of the recipes" in " ".join(result.output.split())
    assert (
        compare(model, tmp_path / "c", "--set", "gptq.damping=0.05", schemes="W4A16").exit_code == 0
    )


def test_other_terms_are_refused(done, model):
    result = compare(model, done, "--seed", 5)
    assert result.exit_code == 2 and "another seed" in " ".join(result.output.split())


def test_missing_text_and_unknown_options_are_refused_before_work(model, tmp_path):
    bad = compare(model, tmp_path / "c", "--text", tmp_path / "none.txt")
    assert bad.exit_code == 2 and "none.txt" in " ".join(bad.output.split())
    bad = compare(model, tmp_path / "c", "--set", "gptq.nosuch=1")
    assert bad.exit_code == 2 and "nosuch" in bad.output
    assert not (tmp_path / "c").exists()


def test_a_recipe_file_is_a_cell_and_a_changed_one_is_measured_again(model, tmp_path, monkeypatch):
    ran = runs_of(monkeypatch)
    recipe = tmp_path / "mine.toml"
    for methods, runs in (("rtn", 1), ("rtn", 1), ("awq", 2)):
        recipe.write_text(f'name = "mine"\nmethods = ["{methods}"]\n')
        assert compare(model, tmp_path / "c", recipes=str(recipe), schemes="W4A16").exit_code == 0
        assert len(ran) == runs


def test_accuracies_of_tasks_are_in_every_report(tmp_path):
    from lowbit.evaluate.pages import write_comparison

    tasks = {"each": {"piqa": {"acc": 0.5, "acc_norm": 0.25}}, "mean_acc": 0.5}
    row = {
        "scheme": "W4A16",
        "recipe": "rtn",
        "bits": 4.0,
        "bytes": 1,
        "perplexity": 2.0,
        "kl": 0.1,
        "top1": 0.9,
        "seconds": 1.0,
    }
    write_comparison(
        tmp_path, [{**row, "blocks": [{"before": 2.0, "after": 1.0}], "tasks": tasks}], "title"
    )
    (line,) = csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines())
    assert line["piqa"] == "0.5000" and line["mean acc"] == "0.5000"


def test_another_model_or_text_under_the_same_names_is_measured_anew(tmp_path):
    model, out = save_tiny(tmp_path / "m"), tmp_path / "c"
    assert compare(model, out, "--keep", schemes="W4A16", recipes="rtn").exit_code == 0
    first = json.loads((out / "comparison.json").read_text())["rows"]
    held = load_file(model / "model.safetensors")
    held["model.embed_tokens.weight"][100:] *= 1.5
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    again = compare(model, out, "--keep", schemes="W4A16", recipes="rtn")
    assert again.exit_code == 0, again.output
    second = json.loads((out / "comparison.json").read_text())["rows"]
    assert all(a["perplexity"] != b["perplexity"] for a, b in zip(first, second, strict=True))
    (model / "text.txt").write_text((model / "text.txt").read_text()[::-1])
    assert compare(model, out, "--keep", schemes="W4A16", recipes="rtn").exit_code == 0
    third = json.loads((out / "comparison.json").read_text())["rows"]
    assert third[2]["calibration"]["sha256"] != second[2]["calibration"]["sha256"]
    assert third[0]["windows_sha256"] != second[0]["windows_sha256"]


def test_a_full_disk_ends_the_comparison_instead_of_failing_every_cell(
    model, tmp_path, monkeypatch
):
    def full(*args, **options):
        raise DiskFull(
            "no space left on disk while writing 'x': free some and run the same command."
        )

    monkeypatch.setattr(bench, "quantize", full)
    result = compare(model, tmp_path / "c", schemes="W4A16,W4A8", recipes="rtn")
    assert result.exit_code == 2
    assert "Cells measured and kept" in " ".join(result.output.split())
    assert "failed:" not in result.output
