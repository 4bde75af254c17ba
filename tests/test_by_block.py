"""Artifacts checked with one block in memory at a time: the same answer as of the whole model."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import transformers as T
from families import config_of, wrapper_of
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit.artifact import proof
from lowbit.artifact.proof import verify
from lowbit.artifact.proof.contents import numbers_in
from lowbit.cli import app
from lowbit.errors import LowbitError, VerificationError

CASES = {  # model, scheme, recipe, format, how it was loaded
    "llama": ("llama", "W4A16g16", "rtn", "compressed-tensors", "blocks"),
    "opt": ("opt", "W3A16g16", "rtn", "compressed-tensors", "blocks"),
    "inputs": ("llama", "W8A8sym", "crossquant-deploy", "compressed-tensors", "blocks"),
    "keys": ("llama", "W4A8KV4", "rtn", "lowbit", "blocks"),
    "codebooks": ("llama", "W3A16", "claq-ap", "lowbit", "blocks"),
    "rows and columns": ("llama", "W4A8", "crossquant", None, "blocks"),
    "rotated": ("llama", "W4A16", "quarot", None, None),
    "experts": (lambda: config_of("mixtral", vocab_size=300), "W3A16g8", "rtn", "lowbit", "blocks"),
    "fused experts": (
        lambda: config_of("gpt_oss", vocab_size=300),
        "W4A16g8",
        "rtn",
        "lowbit",
        "blocks",
    ),
    "state beside": (
        *(lambda: config_of("gemma4 with shared keys"), "W4A16g16", "rtn"),
        *("compressed-tensors", "blocks"),
    ),
    "hybrid": (
        *(lambda: config_of("qwen3_5_text", vocab_size=300), "W4A16g16", "rtn"),
        *("compressed-tensors", "blocks"),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    family, scheme, recipe, kind, loading = CASES[request.param]
    source = tmp_path_factory.mktemp("m") / "m"
    model = save_tiny(source, family if isinstance(family, str) else family())
    out = tmp_path_factory.mktemp("o") / "out"
    text = model / "text.txt"
    done = lowbit.quantize(model, scheme, recipe, out=out, calib=text, samples=4, length=16)
    assert kind in (None, done.report["format"]), request.param
    return out, done, loading


def test_the_answer_is_that_of_the_whole(made):
    out, done, loading = made
    found = verify(out, loading="blocks")
    assert found.loading == (loading or found.loading)
    assert done.verification.loading == "whole"
    whole = {**asdict(done.verification), "loading": found.loading}
    # Of several rows each passes alone, so not even rounding differs.
    assert asdict(found) == whole


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("m") / "m")
    out = tmp_path_factory.mktemp("o") / "out"
    text = model / "text.txt"
    lowbit.quantize(model, "W4A16g16", "rtn", out=out, calib=text, samples=4, length=16)
    return out


@pytest.mark.parametrize("free, want", [(None, "whole"), (1 << 40, "whole"), (100_000, "blocks")])
def test_auto_is_whole_where_that_fits(artifact, monkeypatch, free, want):
    monkeypatch.setattr(proof, "free_memory", lambda device: free)
    found = verify(artifact)
    assert found.loading == want and ("one block in memory" in found.summary) == (want == "blocks")


def test_the_numbers_of_an_artifact(artifact, tmp_path):
    report = json.loads((artifact / "report.json").read_text())
    model = T.AutoModelForCausalLM.from_pretrained(artifact)
    assert numbers_in(artifact, report) == sum(p.numel() for p in model.parameters())


def test_from_the_command_line(artifact):
    done = CliRunner().invoke(app, ["verify", str(artifact), "--load", "blocks"])
    assert done.exit_code == 0 and "one block in memory at a time" in done.output.replace("\n", " ")
    done = CliRunner().invoke(app, ["verify", str(artifact), "--load", "half"])
    assert done.exit_code == 2 and "unknown way of loading 'half'" in done.output


@pytest.mark.parametrize("name", ["layers.1.self_attn.q_proj.weight_scale", "layers.1.mlp.down"])
def test_a_tensor_that_is_not_there_is_named(artifact, tmp_path, name):
    """By the reader itself: `verify` compares tensors before it runs one."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    gone = {n for n in index["weight_map"] if name in n}
    assert gone
    for file in {index["weight_map"][n] for n in gone}:
        held = {n: t for n, t in load_file(copy / file).items() if n not in gone}
        save_file(held, copy / file, metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n not in gone}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises((VerificationError, LowbitError), match=r"layers\.1\."):
        proof.runtime_logits(copy, ids, "compressed-tensors", 4, loading="blocks")


def test_wrappers(tmp_path):
    model = save_tiny(tmp_path / "text", config_of("gemma3_text", vocab_size=300))
    config = wrapper_of("gemma3", "gemma3_text")
    config.get_text_config().vocab_size = 300
    torch.manual_seed(0)
    whole = tmp_path / "whole"
    T.AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "text.txt"):
        shutil.copy(model / name, whole / name)
    out = tmp_path / "out"
    text = whole / "text.txt"
    done = lowbit.quantize(whole, "W4A16g16", "rtn", out=out, calib=text, samples=4, length=16)
    found = verify(out, loading="blocks")
    assert found.loading == "blocks" and found.logits_rms == done.verification.logits_rms
