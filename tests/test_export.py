"""Artifacts rewritten for other runtimes: the same codes, and logits where a runtime, or a
stand-in, computes them.
"""

import importlib.util
import json
import sys

import helpers
import pytest
import torch
import transformers as T
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import compare_logits, loader_logits, verify
from lowbit.cli import app
from lowbit.errors import VerificationError
from lowbit.export import for_mlx
from lowbit.formats.by_name import FORMATS
from lowbit.formats.packing import local_tensors, unpack
from lowbit.grid.names import parse_scheme

PLAIN_GRID = ["activations.symmetric=true", "activations.full_range=true", "activations.clip=1"]


def artifact(model, out, scheme="W4A16", recipe="quarot", settings=("quarot.across_heads=false",)):
    lowbit.quantize(
        str(model),
        scheme,
        recipe,
        out=out,
        calib=str(model / "text.txt"),
        samples=8,
        length=32,
        settings=list(settings),
    )
    return out


def export(folder, out, *options):
    result = CliRunner().invoke(app, ["export", str(folder), "-o", str(out), *options])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    "scheme, inner, kind",
    [
        ("W4A16", 64, "hadamard"),
        ("W4A4sym", 96, "random-hadamard"),
        ("W8A8sym", 96, "random-hadamard"),
    ],
)
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
        assert (
            compare_logits(
                proof["logits"],
                loader_logits(tmp_path / "v", proof["ids"], proof["logits"].shape[1]),
            )[0]
            < 2e-2
        )
    for shard in made.glob("model-*-of-*.safetensors"):
        before, after = load_file(shard), load_file(tmp_path / "v" / shard.name)
        assert before.keys() == after.keys() and all(
            torch.equal(t, after[k]) for k, t in before.items()
        )
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
    from lowbit.artifact.files import file_hash

    report.write_text(
        json.dumps(
            {
                **(r := json.loads(report.read_text())),
                "files": {**r["files"], "config.json": file_hash(path)},
            }
        )
    )
    with pytest.raises(VerificationError, match="logits differ"):
        verify(tmp_path / "v")


@pytest.mark.parametrize(
    "scheme, recipe, settings, words",
    [
        (
            "W4A16",
            "quarot",
            [],
            "rotated across heads, which compressed-tensors cannot say: quantize with --set "
            "quarot.across_heads=false",
        ),
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
    assert (
        "Remove it first" in export(made, tmp_path / "v")[1]
        and (tmp_path / "v.partial" / "mine").is_file()
    )


def test_biases_are_refused_where_the_server_would(tmp_path):
    made = artifact(save_tiny(tmp_path / "m", "opt"), tmp_path / "a")
    assert "has a bias and a rotated input" in export(made, tmp_path / "v")[1]


def test_activations_that_transformers_would_get_wrong_are_said_to_vllm(tmp_path):
    made = artifact(save_tiny(tmp_path / "m", "opt"), tmp_path / "a", "W8A8sym", "rtn", PLAIN_GRID)
    assert json.loads((made / "report.json").read_text())["format"] == "lowbit"
    code, text = export(made, tmp_path / "v")
    assert code == 0, text
    config = json.loads((tmp_path / "v" / "config.json").read_text())["quantization_config"]
    assert (
        config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
        and "transform_config" not in config
    )
    assert (
        verify(tmp_path / "v").loader == "passed"
        and len(list((tmp_path / "v").glob("*.safetensors"))) == 3
    )


# --- other layouts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Symmetric and asymmetric 4-bit artifacts, and a 2-bit one, of one model with 64- and 96-wide
    linears.
    """
    root = tmp_path_factory.mktemp("plain")
    model = save_tiny(root / "m")
    return {
        scheme: artifact(model, root / scheme, scheme, "rtn", ())
        for scheme in ("W4A16g32sym", "W4A16g32", "W2A16")
    }


def grouped_bias(q):
    """scale * zero_point of each weight, (out, in)."""
    return (q.params.scale * q.params.zero_point).repeat_interleave(
        q.codes.shape[1] // q.params.scale.shape[1], 1
    )


@pytest.mark.parametrize(
    "to, scheme, biases",
    [
        ("gptq", "W4A16g32sym", 0),
        ("gptq_v2", "W2A16", 0),
        ("awq", "W4A16g32", 0),
        ("mlx", "W4A16g32", 1),
        ("mlx", "W2A16", 1),
    ],
)
def test_the_same_codes_in_another_layout(tmp_path, plain, to, scheme, biases):
    """Exact but for MLX's biases, scale * zero_point rounded to bfloat16."""
    source = plain[scheme]
    code, text = export(source, tmp_path / "e", "--to", to)
    assert code == 0 and "14 linears as tuned" in text, text
    report, before = (json.loads((f / "report.json").read_text()) for f in (tmp_path / "e", source))
    assert (
        report["format"] == to and report["exported_from"] == before["hash"] and "run" not in report
    )
    entries = {e["name"]: e for e in report["linears"]}
    stored = sum(s["bytes"] for s in report["shards"].values())
    assert report["size"]["after"] == stored and entries["lm_head"]["skipped"]
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    layout, tensors = FORMATS[to], {}
    for shard in report["shards"]:
        tensors |= load_file(tmp_path / "e" / shard)
    original = {}
    for shard in before["shards"]:
        original |= load_file(source / shard)
    quantized = [n for n, e in entries.items() if "skipped" not in e]
    assert len(quantized) == 14
    for name in quantized:
        tuned, held = (
            unpack(local_tensors(original, name), parse_scheme(scheme).weights, name),
            layout.read(tensors, name, config),
        )
        assert torch.equal(tuned.codes, held.codes)
        delta = held.decode().double() - tuned.decode().double()
        assert bool(
            (
                delta.abs()
                <= (grouped_bias(tuned) * 2**-8 if biases else 0)
                + 1e-6 * float(tuned.params.scale.max())
            ).all()
        )
        noise = float(tuned.params.scale.double().square().mean()) / 12
        assert entries[name]["extra_error"] == pytest.approx(
            float(delta.square().mean()) / noise, rel=1e-3, abs=1e-9
        )
        assert entries[name]["bytes"] == sum(t.nbytes for t in layout.local(tensors, name).values())
    other = {k for k in original if ".weight_" not in k}
    assert other == {k for k in tensors if k.rpartition(".")[0] not in quantized}
    assert all(torch.equal(original[k], tensors[k]) for k in other)
    assert (
        not (to == "mlx" and "quantization_config" in config)
        and (tmp_path / "e" / "tokenizer.json").is_file()
    )


def test_a_changed_export_is_found(tmp_path, plain):
    assert export(plain["W4A16g32sym"], tmp_path / "e", "--to", "gptq")[0] == 0
    shard = sorted((tmp_path / "e").glob("*.safetensors"))[1]
    held = load_file(shard)
    key = next(k for k in held if k.endswith("up_proj.qzeros"))
    held[key][0, 0] += 1
    save_file(held, shard)
    with pytest.raises(VerificationError, match=f"'{key}'"):
        verify(tmp_path / "e")
    assert "is an export itself (gptq)" in export(tmp_path / "e", tmp_path / "f", "--to", "awq")[1]


def test_a_missing_runtime_is_said_and_no_interpreter_is_an_error(tmp_path, plain):
    code, text = export(
        plain["W4A16g32"], tmp_path / "e", "--to", "mlx", "--python", sys.executable
    )
    if importlib.util.find_spec("mlx") is None:
        assert code == 0 and "loader check not run: no mlx, mlx-lm here" in text
    code, text = export(
        plain["W4A16g32"], tmp_path / "f", "--to", "mlx", "--python", str(tmp_path / "none")
    )
    assert (
        code == 2
        and "cannot run" in text
        and not (tmp_path / "f").exists()
        and not (tmp_path / "f.partial").exists()
    )


def test_a_runtime_that_computes_something_else_fails_the_export(tmp_path, plain):
    """A stand-in interpreter that answers with the tuned logits, then with others."""
    proof = load_file(plain["W4A16g32"] / "proof" / "logits.safetensors")["logits"]
    for factor, expected in ((1.0, 0), (1.5, 1)):
        save_file({"logits": (proof * factor).contiguous()}, tmp_path / "answer.safetensors")
        fake = tmp_path / "python"
        fake.write_text(f"#!/bin/sh\ncat {tmp_path}/answer.safetensors\n")
        fake.chmod(0o755)
        code, text = export(
            plain["W4A16g32"], tmp_path / f"e{expected}", "--to", "awq", "--python", str(fake)
        )
        assert code == expected, text
        assert (tmp_path / f"e{expected}").exists() == (not expected) and not list(
            tmp_path.glob("*.partial")
        )
    assert "logits differ from the tuned model's" in text


@pytest.mark.parametrize(
    "to, scheme, words",
    [
        ("gptq", "W4A16g32", "Export to gptq_v2"),
        ("awq", "W2A16", "AWQ's layout takes 4 bits"),
        ("gguf9", "W2A16", "choose one of compressed-tensors, gptq, gptq_v2, awq, mlx"),
    ],
)
def test_what_a_layout_cannot_say(tmp_path, plain, to, scheme, words):
    code, text = export(plain[scheme], tmp_path / "e", "--to", to)
    assert (
        code == 2
        and words in text
        and not (tmp_path / "e").exists()
        and not (tmp_path / "e.partial").exists()
    )


@pytest.mark.parametrize(
    "scheme, recipe, settings, words",
    [
        ("W2A16", "claq", [], "codebooks"),
        ("W8A8sym", "rtn", PLAIN_GRID, "quantizes activations"),
        ("W4A16KV4", "rtn", [], "keys and values"),
        ("W4A16", "quarot", [], "--set quarot.online=false"),
    ],
)
def test_what_only_the_format_of_lowbit_carries(tmp_path, scheme, recipe, settings, words):
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a", scheme, recipe, settings)
    code, text = export(made, tmp_path / "e", "--to", "gptq_v2")
    assert code == 2 and words in text


# --- mlx-lm ---------------------------------------------------------------------------------------

LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


@pytest.mark.parametrize(
    "config, said",
    [
        ({"rope_theta": 5e5}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_parameters": LINEAR},
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            {
                "model_type": "gemma3_text",
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "rope_parameters": {"full_attention": LINEAR, **LOCAL},
            },
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
                "sliding_window_pattern": 2,
            },
        ),
    ],
)
def test_mlx_lm_finds_rotary_embeddings_where_it_looks(config, said):
    assert for_mlx.settings({"model_type": "llama", **config}) == said


@pytest.mark.parametrize(
    "family, more, words",
    [
        ("llama", {}, None),
        ("granite", {}, None),
        ("mixtral", {}, "wants the experts of a block stacked"),
        ("gemma2", {}, "attends to all tokens where this model has windows"),
        ("opt", {}, "of 'opt' models: it has no such model; it reads those of llama"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}, None),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
            "every n-th block",
        ),
    ],
)
def test_mlx_lm_reads_a_family_or_why_not(family, more, words):
    config = T.CONFIG_MAPPING[family](**({"num_hidden_layers": 6} | more))
    said = for_mlx.misread(config)
    assert said is None if words is None else words in said


def test_what_mlx_lm_does_not_read_is_not_written(tmp_path):
    made = artifact(save_tiny(tmp_path / "m", "opt"), tmp_path / "a", "W4A16g32", "rtn", ())
    code, text = export(made, tmp_path / "e", "--to", "mlx")
    assert code == 2 and "cannot go to MLX: mlx-lm does not read" in text, text
    assert not (tmp_path / "e").exists()
