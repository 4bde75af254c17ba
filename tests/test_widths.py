"""Bits of single linears: patterns, files, and what comes back from an artifact."""

import json

import pytest
from helpers import save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid import Affine, Codebook, KQuant
from lowbit.grid.names import parse_scheme
from lowbit.recipe import load_recipe
from lowbit.recipe.widths import with_bits

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"

CASES = {  # scheme, --bits, grids of Q and DOWN
    "an end": ("W2A16g16", "mlp.down_proj=4", Affine(2, 16), Affine(4, 16)),
    "a block": ("W2A16g16sym", "layers.0.*=8", Affine(8, 16, True), Affine(2, 16, True)),
    "not within a name": ("W2A16g16", "roj=4,*=3", Affine(3, 16), Affine(3, 16)),
    "the last counts": ("W2A16", "*proj=3,layers.1.*=4", Affine(3), Affine(4)),
    "a whole name": ("W2A16g16", f"{Q}=5", Affine(5, 16), Affine(2, 16)),
    "a scheme": ("W2A16g16", "down_proj=W4g32sym", Affine(2, 16), Affine(4, 32, True)),
    "codebooks": ("W2A16:column", "down_proj=3", Codebook(2), Codebook(3)),
    "k-quants": ("gguf:q2_k", "down_proj=6", KQuant("q2_k"), KQuant("q6_k")),
}


@pytest.mark.parametrize("case", CASES)
def test_patterns(case):
    scheme, text, q, down = CASES[case]
    recipe = with_bits(load_recipe("rtn", scheme=parse_scheme(scheme)), text)
    assert (recipe.grid_of(Q), recipe.grid_of(DOWN)) == (q, down)


BAD = {  # scheme, --bits, words
    "no bits": ("W2A16g16", "down_proj", "'down_proj' in --bits: --bits takes PATTERN=BITS"),
    "nothing": ("W2A16g16", "", "in --bits: --bits takes"),
    "twice": ("W2A16g16", "a=2,a=3", "'a' is in --bits twice"),
    "too many": ("W2A16g16", "down_proj=9", "'down_proj' gets 9 bits: bits must be 1 to 8"),
    "too few": ("W2A16g16", "down_proj=0", "'down_proj' gets 0 bits"),
    "k-quants": ("gguf:q2_k", "down_proj=5", "'down_proj' gets 5 bits: K-quants have 2, 3, 4, 6"),
    "mxfp4": ("mxfp4", "down_proj=3", "'down_proj' gets 3 bits: .* has 4 bits"),
    "activations": ("W2A16g16", "down_proj=W4A4", "overrides are about weights"),
    "no scheme": ("W2A16g16", "down_proj=four", "unknown scheme 'four'"),
    "no file": ("W2A16g16", "nowhere.json", "cannot read 'nowhere.json'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    scheme, text, words = BAD[case]
    with pytest.raises(LowbitError, match=words):
        with_bits(load_recipe("rtn", scheme=parse_scheme(scheme)), text)


@pytest.mark.parametrize(
    "held, words",
    [
        ("{", "is not JSON"),
        ("[1]", "holds no object"),
        ("{}", "holds no object"),
        ('{"down_proj": true}', "'down_proj' gets True"),
        ('{"down_proj": 2.5}', "'down_proj' gets 2.5"),
        ('{"down_proj": 11}', "'down_proj' gets 11 bits"),
    ],
)
def test_a_bad_file(tmp_path, held, words):
    path = tmp_path / "c.json"
    path.write_text(held)
    with pytest.raises(LowbitError, match=words):
        with_bits(load_recipe("rtn", scheme=parse_scheme("W2A16g16")), str(path))


def test_an_artifact_gives_its_choice_back(tmp_path):
    model = save_tiny(tmp_path / "m")
    given = ["--recipe", "rtn", "--samples", "4", "--length", "16", "--calib", f"{model}/text.txt"]

    def run(out, *words):
        words = ["quantize", str(model), "--scheme", "W2A16g16sym", *given, "-o", str(out), *words]
        done = CliRunner().invoke(app, words)
        return done.exit_code, " ".join(done.output.split())

    code, said = run(tmp_path / "a", "--bits", "mlp.down_proj=4,layers.0.*=8")
    assert code == 0, said
    choice = json.loads((tmp_path / "a" / "choice.json").read_text())
    assert choice[Q] == "W8g16sym" and choice[DOWN] == "W4g16sym" and len(choice) == 14
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert "--bits" in report["command"]
    code, said = run(tmp_path / "b", "--bits", str(tmp_path / "a" / "choice.json"))
    assert code == 0, said
    assert json.loads((tmp_path / "b" / "report.json").read_text())["hash"] == report["hash"]
    # Edited, and given back.
    choice[Q] = 3
    (tmp_path / "c.json").write_text(json.dumps(choice))
    code, said = run(tmp_path / "c", "--bits", str(tmp_path / "c.json"))
    assert code == 0, said
    assert json.loads((tmp_path / "c" / "choice.json").read_text())[Q] == "W3g16sym"
    choice["model.layers.9.mlp.down_proj"] = 3
    (tmp_path / "d.json").write_text(json.dumps(choice))
    code, said = run(tmp_path / "d", "--bits", str(tmp_path / "d.json"))
    assert code == 2 and "'model.layers.9.mlp.down_proj', matches no linear of this model" in said
    code, said = run(tmp_path / "e", "--bits", "down_proj=W4g25sym")
    assert code == 2 and "25" in said and not (tmp_path / "e").exists()
    plain = lowbit.quantize(
        *(model, "W2A16g16sym", "rtn"),
        out=tmp_path / "f",
        calib=model / "text.txt",
        samples=4,
        length=16,
    )
    assert not (plain.folder / "choice.json").exists()
