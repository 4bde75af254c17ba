"""The model card: what it says is what the report says, and what it tells to type works."""

import copy
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from helpers import save_tiny
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.card import model_card, terms_of
from lowbit.cli import app
from lowbit.recipe import Recipe

ARGS = dict(samples=4, length=32)
OWN = "---\nlicense: other\nlicense_name: 'no: \"tiny\"'\nlicense_link: LICENSE\n---\nA model.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("card") / "tiny")
    (folder / "README.md").write_text(OWN)
    return folder


def made(model, out, scheme="W2A16g32", recipe="rtn", **more):
    lowbit.quantize(
        str(model), scheme, recipe, out=out, calib=str(model / "text.txt"), **{**ARGS, **more}
    )
    return out


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    return made(model, tmp_path_factory.mktemp("made") / "a", seed=3)


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    return made(model, tmp_path_factory.mktemp("made") / "n", "W2A16", "claq-fused")


@pytest.fixture
def quick(monkeypatch):
    """Runs that leave the runtime out of their proof."""
    from lowbit.artifact.proof import verify

    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def front(text):
    return ModelCard(text, ignore_metadata_errors=False).data.to_dict()


def test_front_matter_and_numbers_are_those_of_the_report(artifact):
    text, report = (artifact / "README.md").read_text(), report_of(artifact)
    assert text == model_card(report)
    found = front(text)
    assert found["library_name"] == "transformers" and "base_model" not in found
    assert found["tags"] == ["quantized", "lowbit", "2-bit", "compressed-tensors", "rtn"]
    assert (found["license"], found["license_name"]) == ("other", 'no: "tiny"')
    assert "license_link" not in found  # no file of that name comes along
    q, s, c = report["quality"], report["size"], report["calibration"]
    for said in (
        "# tiny W2A16g32",
        f"{s['bits_per_weight']:.3f}",
        f"{s['before'] / 1e6:.2f} MB -> {s['after'] / 1e6:.2f} MB",
        f"`{report['hash']}`",
        f"| perplexity | {q['float']['perplexity']:.4g} | {q['quantized']['perplexity']:.4g} |",
        f"{q['quantized']['kl']:.4g}",
        f"text.txt (held out), {q['quantized']['windows']} windows of 32 tokens",
        f"4 rows of 32 tokens, sha256 `{c['sha256'][:16]}`",
        "| seed | 3 |",
        f"torch {report['versions']['torch']}",
        "14 in `W2A16g32`",
        "`lm_head` (output head",
        "logits by transformers within",
    ):
        assert said in text, said
    assert str(artifact.parent) not in text and report["model"] not in text and "tmp" not in text


def test_equal_runs_make_equal_cards(artifact, model, tmp_path):
    again = made(model, tmp_path / "again", seed=3)
    assert (again / "README.md").read_bytes() == (artifact / "README.md").read_bytes()


def test_its_command_makes_the_same_artifact(model, artifact, native, tmp_path, monkeypatch, quick):
    import shlex

    monkeypatch.chdir(model.parent)
    shutil.copy(model / "text.txt", model.parent)
    for folder in (artifact, native):
        (line,) = re.findall(r"^lowbit quantize .*$", (folder / "README.md").read_text(), re.M)
        assert (
            CliRunner()
            .invoke(
                app,
                [str(tmp_path / folder.name) if a == "OUT" else a for a in shlex.split(line)[1:]],
            )
            .exit_code
            == 0
        ), line
        assert report_of(tmp_path / folder.name)["hash"] == report_of(folder)["hash"]


def test_a_recipe_of_ones_own_is_the_one_that_comes_along(model, artifact, tmp_path, quick):
    (tmp_path / "mine.toml").write_text('scheme = "W2A16g32"\nmethods = ["rtn"]\nname = "mine"\n')
    done = made(model, tmp_path / "a", None, str(tmp_path / "mine.toml"), seed=3)
    command = report_of(done)["command"]
    assert command == [
        "lowbit",
        "quantize",
        str(model),
        "--recipe",
        "recipe.toml",
        "--seed",
        "3",
        "-o",
        "OUT",
    ]
    assert Recipe.from_toml((done / "recipe.toml").read_text()).calibration.samples == 4
    assert report_of(done)["hash"] == report_of(artifact)["hash"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def test_its_python_runs(artifact, native, capsys):
    for folder in (artifact, native):
        (code,) = blocks((folder / "README.md").read_text(), "python")
        assert ("import lowbit" in code) == (folder is native)
        exec(code.replace("MODEL", str(folder)), {})
        assert capsys.readouterr().out.startswith("<s>Once")


def test_the_format_of_lowbit_says_what_it_needs_and_holds(native):
    text, report = (native / "README.md").read_text(), report_of(native)
    found = front(text)
    assert found["library_name"] == "lowbit"
    assert found["tags"] == [
        "quantized",
        "lowbit",
        "2-bit",
        "claq",
    ]
    assert "Needs lowbit, for codebooks" in text
    assert "on a codebook per column" in text
    assert "vllm" not in text
    outliers = sum(e.get("outliers", 0) for e in report["linears"])
    columns = sum(e.get("columns", {}).get("4", 0) for e in report["linears"])
    assert f"{outliers} weights kept in 16 bits" in text and f"{columns} of 4" in text


@pytest.mark.parametrize(
    "to, library, words",
    [
        (
            "gptq_v2",
            "transformers",
            ["gptqmodel", "dtype=torch.bfloat16", 'GPTQModel.load("MODEL")'],
        ),
        ("mlx", "mlx", ["mlx_lm.generate --model MODEL"]),
    ],
)
def test_an_export_has_a_card_of_its_own(artifact, tmp_path, to, library, words):
    source = tmp_path / "a"
    shutil.copytree(artifact, source)
    (source / "README.md").write_text("changed by hand")
    assert CliRunner().invoke(app, ["verify", str(source), "--no-loader"]).exit_code == 0
    assert (
        CliRunner()
        .invoke(app, ["export", str(source), "-o", str(tmp_path / "e"), "--to", to])
        .exit_code
        == 0
    )
    text, report = (tmp_path / "e" / "README.md").read_text(), report_of(tmp_path / "e")
    assert text == model_card(report)
    assert front(text)["library_name"] == library
    assert to in front(text)["tags"]
    assert f"lowbit export OUT -o DIR --to {to}" in text
    assert f"hash `{report_of(artifact)['hash']}`" in text
    assert f"`{report['hash']}`" in text
    assert all(w in text for w in words), text
    assert "vllm" not in text
    assert (source / "README.md").read_text() == "changed by hand"


def test_the_copy_for_vllm_says_that_transformers_is_not_enough(model, tmp_path, quick):
    made(model, tmp_path / "a", "W4A16", "quarot", settings=["quarot.across_heads=false"])
    assert (
        CliRunner()
        .invoke(app, ["export", str(tmp_path / "a"), "-o", str(tmp_path / "v")])
        .exit_code
        == 0
    )
    text = (tmp_path / "v" / "README.md").read_text()
    assert front(text)["library_name"] == "vllm"
    assert "vllm serve MODEL" in text
    assert "on one device" in text
    assert "from_pretrained" not in text and "transformers alone ignores" in text


def test_what_lies_there_is_left_alone_and_a_resumed_run_has_its_card(model, tmp_path, quick):
    def stop(done):
        raise KeyboardInterrupt

    for words in (None, "mine"):
        out = tmp_path / str(words)
        with pytest.raises(KeyboardInterrupt):
            made(model, out, seed=3, progress=stop)
        if words:
            (out.with_name(out.name + ".partial") / "README.md").write_text(words)
        made(model, out, seed=3)
        assert (out / "README.md").read_text() == (words or model_card(report_of(out)))
        made(model, out, seed=3)  # verified again, nothing written
        assert (out / "README.md").read_text() == (words or model_card(report_of(out)))


# --- as a function of a report --------------------------------------------------------------------


def changed(report, **more):
    return {**copy.deepcopy(report), **more}


def with_scheme(report, scheme, **more):
    linears = [e if "skipped" in e else {**e, "scheme": scheme} for e in report["linears"]]
    return changed(report, linears=linears, recipe={**report["recipe"], "scheme": scheme}, **more)


def test_a_model_of_the_hub_is_named_with_its_terms(artifact):
    source = {
        "hub": "some/tiny",
        "license": {"license": "other", "license_name": "tiny", "license_link": "./LICENSE"},
    }
    text = model_card(
        changed(
            report_of(artifact),
            source=source,
            model="some/tiny",
            command=["lowbit", "quantize", "some/tiny", "-o", "OUT"],
        )
    )
    found = front(text)
    assert (found["base_model"], found["base_model_relation"]) == ("some/tiny", "quantized")
    assert found["license_link"] == "https://huggingface.co/some/tiny/blob/main/LICENSE"
    assert "[some/tiny](https://huggingface.co/some/tiny)" in text
    assert "lowbit quantize some/tiny -o OUT" in text
    assert "last part" not in text


@pytest.mark.parametrize(
    "scheme, said",
    [
        ("W4A16g128", "any recent version"),
        ("W8A16sym", "any recent version"),
        ("W2A16g64sym", "0.25 or newer for symmetric weights of 2 bits"),
        ("W2A16g64", "0.33 or newer for asymmetric weights of 2 bits"),
        ("W3A16sym", "0.33 or newer"),
        ("W1A16", None),
        ("W4A16g48", None),
        ("W4A8sym", "0.33 or newer, 8-bit activations on compute capability 8.0"),
        ("W8A4sym", None),
    ],
)
def test_the_version_of_vllm(artifact, scheme, said):
    text = model_card(with_scheme(report_of(artifact), scheme))
    assert ("vllm serve MODEL" in text) == (said is not None)
    assert said is None or f"By its sources, {said}" in text


def test_linears_on_different_grids_are_not_promised_to_vllm(artifact):
    report = with_scheme(report_of(artifact), "W4A16sym")
    report["linears"][0]["scheme"] = "W8A16sym"
    text = model_card(report)
    assert "vllm" not in text
    assert "in 4, 8 bits" in text
    assert front(text)["tags"][2:4] == ["4-bit", "8-bit"]


@pytest.mark.parametrize(
    ("to", "scheme", "served"),
    [
        ("gptq", "W4A16g32sym", True),
        ("gptq", "W2A16g32sym", False),
        ("awq", "W4A16g64", True),
        ("awq", "W4A16", False),
    ],
)
def test_gptq_and_awq_in_vllm(artifact, to, scheme, served):
    text = model_card(with_scheme(report_of(artifact), scheme, format=to, exported_from="0" * 64))
    assert ("vllm serve" in text) == served and ("GPTQModel.load" in text) == (to == "gptq")


def test_the_error_that_an_export_adds(artifact):
    report = changed(report_of(artifact), format="mlx", exported_from="0" * 64)
    assert "extra" not in model_card(report)
    assert "equal" in model_card(
        changed(report, linears=[{**e, "extra_error": 0.0} for e in report["linears"]])
    )
    for e, value in zip(report["linears"], (0.01, *[0.0] * 12, 0.04), strict=False):
        e["extra_error"] = value
    assert "mean square error of 0.0036 (worst linear: 0.04) times scale^2 / 12" in model_card(
        report
    )


def test_gguf(artifact):
    text = model_card(
        changed(
            report_of(artifact),
            format="gguf",
            exported_from="0" * 64,
            gguf={"file": "tiny model.gguf", "moved": None, "remarks": []},
        )
    )
    assert front(text)["library_name"] == "gguf"
    assert "llama-cli -m 'tiny model.gguf' -p Once" in text
    assert 'Llama("tiny model.gguf")' in text
    assert "MODEL" not in text and "lowbit export OUT -o DIR --to gguf" in text


def test_reports_of_older_versions_and_without_held_out_text(artifact):
    report = changed(report_of(artifact), quality=None)
    for key in ("source", "command"):
        del report[key]
    text = model_card(report)
    assert "perplexity" not in text
    assert "license" not in front(text)
    assert "lowbit quantize" not in text


@pytest.mark.parametrize(
    "content, found",
    [
        (OWN, {"license": "other", "license_name": 'no: "tiny"', "license_link": "LICENSE"}),
        ("# no front matter\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: 3\n---\n", {}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\n- a\n---\n", {}),
        (b"\xff\xfe", {}),
    ],
)
def test_terms(tmp_path, content, found):
    path = tmp_path / "README.md"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert terms_of(path) == found
    assert terms_of(None) == terms_of(Path(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    "value",
    [
        "apache-2.0",
        "no",
        "2-bit",
        "1e3",
        "null",
        "a: b",
        '"',
        "- x",
        "3.10",
        "Ünïcode\n#x",
        "llama3.1",
        "y",
    ],
)
def test_every_license_survives_yaml(artifact, value):
    found = front(
        model_card(
            changed(
                report_of(artifact),
                source={"hub": None, "license": {"license": value, "license_name": value}},
            )
        )
    )
    assert found["license"] == value and found["license_name"] == value
