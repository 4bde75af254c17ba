"""What rows of tokens begin with."""

import json

import pytest
import torch
from helpers import TEXT, save_tiny, tiny_tokenizer
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.model.bos import PUBLISHED, adds_bos, begun, check_bos, said_of
from lowbit.model.calibration import _DRAWS, Calibration, draw_rows, evaluation_windows
from lowbit.recipe import load_recipe


class Told:
    """A tokenizer whose texts begin so."""

    def __init__(self, bos, *ids):
        self.bos_token_id, self._ids = bos, list(ids)

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": self._ids})


ADDS, KNOWS, NONE = Told(7, 7, 3), Told(7, 3), Told(None, 3)
ROWS = torch.tensor([[1, 2, 3], [7, 5, 6]])
BEGUN = [[7, 2, 3], [7, 5, 6]]


@pytest.mark.parametrize(
    "tokenizer, bos, source, want",
    [
        (ADDS, "auto", "stdlib", BEGUN),
        (ADDS, "auto", "wikitext2", None),
        (ADDS, "auto", "c4", None),
        (ADDS, "auto", "pile-val", None),
        (ADDS, "auto", "wikitext2.txt", BEGUN),
        (ADDS, "yes", "wikitext2", BEGUN),
        (ADDS, "no", "stdlib", None),
        (KNOWS, "auto", "stdlib", None),
        (KNOWS, "yes", "stdlib", BEGUN),
        (NONE, "auto", "stdlib", None),
        (NONE, "no", "stdlib", None),
    ],
)
def test_rows_begin_as_asked(tokenizer, bos, source, want):
    rows = ROWS.clone()
    made = begun(rows, tokenizer, bos, source, tokenizer("a").input_ids[0])
    assert made.tolist() == (ROWS.tolist() if want is None else want)
    assert torch.equal(rows, ROWS)


def test_a_tokenizer_without_bos_cannot_begin_rows_with_it():
    with pytest.raises(LowbitError, match="no BOS token for rows to begin with"):
        begun(ROWS, NONE, "yes", "stdlib", 3)


@pytest.mark.parametrize("bos", ["row", "", "YES"])
def test_unknown_choices(bos):
    for refused in (lambda: check_bos(bos), lambda: Calibration(bos=bos)):
        with pytest.raises(LowbitError, match="unknown choice of bos"):
            refused()
    with pytest.raises(LowbitError, match="unknown choice of bos"):
        load_recipe("rtn", settings=[f"calibration.bos={bos or 'x'}"])


def test_the_published_protocols_are_those_of_the_named_corpora():
    assert set(PUBLISHED) == set(_DRAWS)


@pytest.mark.parametrize("bos, first", [("auto", True), ("yes", True), ("no", False)])
def test_calibration_held_out_and_windows(bos, first, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tokenizer = tiny_tokenizer()
    assert adds_bos(tokenizer)
    rows = draw_rows(Calibration(str(path), 6, 32, bos), tokenizer, 0, 4)
    windows = evaluation_windows(str(path), tokenizer, 32, 6, bos)
    plain = draw_rows(Calibration(str(path), 6, 32, "no"), tokenizer, 0, 4)
    for some in (rows.calibration, rows.held_out, windows):
        assert bool((some[:, 0] == tokenizer.bos_token_id).all()) is first
    assert torch.equal(rows.calibration[:, 1:], plain.calibration[:, 1:])
    assert said_of(windows, tokenizer) == (" that begin with BOS" if first else " cut without BOS")
    assert said_of(windows, KNOWS) == ""


def test_commands_take_it_and_say_so(tmp_path):
    model = save_tiny(tmp_path / "m")
    text = str(model / "text.txt")

    def ran(*words):
        done = CliRunner().invoke(app, [str(w) for w in words])
        return done.exit_code, " ".join(done.output.split())

    measure = ("eval", model, "--text", text, "--length", 32, "--windows", 4)
    said = {b: ran(*measure, "--bos", b, "--json", tmp_path / f"{b}.json") for b in ("auto", "no")}
    assert "4 windows x 32 that begin with BOS, 124 tokens" in said["auto"][1]
    assert "4 windows x 32 cut without BOS, 124 tokens" in said["no"][1]
    begun, cut = (json.loads((tmp_path / f"{b}.json").read_text()) for b in ("auto", "no"))
    assert begun["perplexity"] != cut["perplexity"]
    study = ("analyze", *measure[1:], "--no-remove")
    for bos, words in (("yes", "that begin with BOS"), ("no", "cut without BOS")):
        out = tmp_path / f"study-{bos}"
        code, output = ran(*study, "--bos", bos, "-o", out)
        assert code == 0, output
        assert words in output and words in (out / "analysis.html").read_text()
    code, output = ran(*measure, "--bos", "maybe")
    assert code == 2 and "unknown choice of bos 'maybe'" in output
    make = ("quantize", model, "--scheme", "W4A16g32", "--recipe", "rtn", "--calib", text)
    for bos in ("auto", "no"):
        code, output = ran(
            *make, "--samples", 4, "--length", 32, "--bos", bos, "-o", tmp_path / bos
        )
        assert code == 0, output
        assert f'bos = "{bos}"' in (tmp_path / bos / "recipe.toml").read_text()
    first, second = (
        json.loads((tmp_path / b / "report.json").read_text())["calibration"]["sha256"]
        for b in ("auto", "no")
    )
    assert first != second
    assert "--bos no" in (tmp_path / "no" / "README.md").read_text()
