"""Rotated artifacts rewritten for vLLM: compressed-tensors' own transforms reproduce the tuned logits from what was written."""

import json

import helpers
import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.errors import VerificationError
from lowbit.proof import compare_logits, loader_logits, verify

PLAIN_GRID = ["activations.symmetric=true", "activations.full_range=true", "activations.clip=1"]


def artifact(model, out, scheme="W4A16", recipe="quarot", settings=("quarot.across_heads=false",)):
    lowbit.quantize(str(model), scheme, recipe, out=out, calib=str(model / "text.txt"), samples=8, length=32, settings=list(settings))
    return out


def export(folder, out):
    result = CliRunner().invoke(app, ["export", str(folder), "-o", str(out)])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("scheme, inner, kind", [("W4A16", 64, "hadamard"), ("W4A4sym", 96, "random-hadamard"), ("W8A8sym", 96, "random-hadamard")])
def test_the_exported_model_computes_what_was_tuned(tmp_path, monkeypatch, scheme, inner, kind):
    monkeypatch.setitem(helpers.LLAMA, "intermediate_size", inner)
    model = save_tiny(tmp_path / "m")
    more = PLAIN_GRID if scheme != "W4A16" else []
    made = artifact(model, tmp_path / "a", scheme, settings=["quarot.across_heads=false", *more])
    code, text = export(made, tmp_path / "v")
    assert code == 0, text
    config = json.loads((tmp_path / "v" / "config.json").read_text())["quantization_config"]
    (scheme_,) = config["transform_config"]["config_groups"].values()
    assert config["quant_method"] == "compressed-tensors" and scheme_["type"] == kind
    assert scheme_["apply"][0]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    done = verify(tmp_path / "v")
    assert done.loader == "passed" and done.logits_rms < 1e-5 and done.top1 == 1.0
    if scheme == "W8A8sym":  # quantized activations included, against what was tuned
        proof = load_file(made / "proof" / "logits.safetensors")
        assert compare_logits(proof["logits"], loader_logits(tmp_path / "v", proof["ids"])[:, -proof["logits"].shape[1] :])[0] < 2e-2
    for shard in made.glob("model-*-of-*.safetensors"):
        before, after = load_file(shard), load_file(tmp_path / "v" / shard.name)
        assert before.keys() == after.keys() and all(torch.equal(t, after[k]) for k, t in before.items())
    assert not list(tmp_path.glob("*.partial"))


def test_the_check_sees_a_missing_rotation(tmp_path):
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a")
    assert export(made, tmp_path / "v")[0] == 0
    path, report = tmp_path / "v" / "config.json", tmp_path / "v" / "report.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["transform_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"config.json' is not what was written"):
        verify(tmp_path / "v")
    from lowbit.artifact import file_hash

    report.write_text(json.dumps({**(r := json.loads(report.read_text())), "files": {**r["files"], "config.json": file_hash(path)}}))
    with pytest.raises(VerificationError, match="logits differ"):
        verify(tmp_path / "v")


@pytest.mark.parametrize(
    "scheme, recipe, settings, words",
    [
        ("W4A16", "quarot", [], "rotated across heads, which compressed-tensors cannot say: quantize with --set quarot.across_heads=false"),
        ("W4A16KV4", "quarot", ["quarot.across_heads=false"], "quantizes keys and values"),
        ("W4A4", "quarot", ["quarot.across_heads=false"], "--set activations.full_range=true"),
        ("W2A16", "claq", [], "codebooks"),
        ("W4A16", "rtn", [], "is in the format compressed-tensors already"),
    ],
)
def test_what_cannot_be_exported_says_what_to_do(tmp_path, scheme, recipe, settings, words):
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a", scheme, recipe, settings)
    code, text = export(made, tmp_path / "v")
    assert code == 2 and words in text.replace("\n", " ")
    assert not (tmp_path / "v").exists() and not (tmp_path / "v.partial").exists()


def test_nothing_is_overwritten(tmp_path):
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine").write_text("")
    assert "exists and is not empty. Choose another -o" in export(made, tmp_path / "v")[1]
    assert "it is not an artifact of lowbit" in export(tmp_path / "m", tmp_path / "w")[1]
    (tmp_path / "v" / "mine").unlink()
    (tmp_path / "v").rmdir()
    (tmp_path / "v.partial").mkdir()
    (tmp_path / "v.partial" / "mine").write_text("")
    assert "Remove it first" in export(made, tmp_path / "v")[1] and (tmp_path / "v.partial" / "mine").is_file()


def test_biases_are_refused_where_the_server_would(tmp_path):
    made = artifact(save_tiny(tmp_path / "m", "opt"), tmp_path / "a")
    assert "has a bias and a rotated input" in export(made, tmp_path / "v")[1]
