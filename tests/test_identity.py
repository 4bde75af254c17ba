"""What an interrupted run is continued by: the same ways to compute, whatever names them."""

from __future__ import annotations

import families
import pytest
import torch
from helpers import save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.methods._rounding import version_on

FAST = ["tesseraq.schedule=exponential-2-2", "tesseraq.iters=2"]
SETTINGS = {"tesseraq": FAST, "omniquant": ["omniquant.epochs=1"]}
EXPERTS, ROUNDING = "LOWBIT_EXPERTS", "LOWBIT_ROUNDING"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    mixture = families.config_of("qwen3_moe", vocab_size=300, num_hidden_layers=2)
    return {"mixture": save_tiny(folder / "moe", mixture), "dense": save_tiny(folder / "dense")}


def quantize(model, out, recipe, stop=False):
    def stopped(done):
        raise KeyboardInterrupt

    return lowbit.quantize(
        str(model),
        "W3A16g8",
        recipe,
        out=out,
        calib=str(model / "text.txt"),
        samples=4,
        length=16,
        settings=SETTINGS.get(recipe, []),
        device="cpu",
        progress=stopped if stop else None,
    )


def begun(models, monkeypatch, out, case):
    """A run that was interrupted, and what it is continued by."""
    kind, recipe, variable, there, here = case
    monkeypatch.delenv(EXPERTS, raising=False)
    monkeypatch.delenv(ROUNDING, raising=False)
    if there is not None:
        monkeypatch.setenv(variable, there)
    with pytest.raises(KeyboardInterrupt):
        quantize(models[kind], out, recipe, stop=True)
    monkeypatch.delenv(variable, raising=False)
    if here is not None:
        monkeypatch.setenv(variable, here)
    return models[kind], recipe


@pytest.mark.parametrize(
    "case, words",
    [
        (
            ("mixture", "tesseraq", EXPERTS, "grouped", "loop"),
            "experts computed by 'grouped' in its steps of tuning where this run's are by 'loop'",
        ),
        (
            ("mixture", "tesseraq", EXPERTS, None, "grouped"),
            "experts computed by 'loop' in its steps of tuning where this run's are by 'grouped'",
        ),
        (
            ("mixture", "omniquant", EXPERTS, "grouped", None),
            "experts computed by 'grouped' in its steps of tuning where this run's are by 'loop'",
        ),
        (
            ("dense", "tesseraq", ROUNDING, "reference", "inductor"),
            "soft rounding by 'reference' where this run's is by 'inductor'",
        ),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_a_resume_by_another_way_to_compute_is_refused(models, monkeypatch, tmp_path, case, words):
    model, recipe = begun(models, monkeypatch, tmp_path / "out", case)
    with pytest.raises(LowbitError, match="holds an unfinished run with") as told:
        quantize(model, tmp_path / "out", recipe)
    assert words in str(told.value) and "Repeat that command" in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case",
    [
        ("mixture", "tesseraq", EXPERTS, None, "loop"),  # what is taken anyhow
        ("mixture", "rtn", EXPERTS, "grouped", "loop"),  # no steps
        ("dense", "tesseraq", EXPERTS, "grouped", "loop"),  # no experts
        ("dense", "omniquant", ROUNDING, "reference", None),  # no soft rounding
    ],
    ids=lambda v: "-".join(map(str, v)),
)
def test_what_changes_nothing_is_continued(models, monkeypatch, tmp_path, case):
    model, recipe = begun(models, monkeypatch, tmp_path / "out", case)
    quantize(model, tmp_path / "out", recipe)
    assert (tmp_path / "out" / "report.json").is_file()


def test_another_recipe_alone_is_named(models, monkeypatch, tmp_path):
    """Not what follows from it."""
    model, _ = begun(models, monkeypatch, tmp_path / "out", ("mixture", "rtn", EXPERTS, None, None))
    with pytest.raises(LowbitError, match="another recipe than this one") as told:
        quantize(model, tmp_path / "out", "tesseraq")
    assert not any(words in str(told.value) for words in ("experts computed", "soft rounding"))


def test_the_version_of_a_device_is_the_one_taken(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv(ROUNDING, "reference")
    assert version_on(cpu) == "reference"
    monkeypatch.setenv(ROUNDING, "triton")
    with pytest.raises(LowbitError, match="LOWBIT_ROUNDING=triton does not work here"):
        version_on(cpu)


@pytest.mark.parametrize("variable", [EXPERTS, ROUNDING])
def test_a_way_that_is_not_there_is_refused_before_anything_is_written(
    models, monkeypatch, tmp_path, variable
):
    monkeypatch.setenv(variable, "best")
    model = models["mixture"]
    options = ("--scheme", "W3A16g8", "--recipe", "tesseraq", "--calib", model / "text.txt")
    asked = ("quantize", model, *options, "--samples", 4, "--length", 16, "-o", tmp_path / "out")
    found = CliRunner().invoke(app, list(map(str, asked)))
    assert found.exit_code == 2 and variable in found.output, found.output
    assert not list(tmp_path.glob("*"))
