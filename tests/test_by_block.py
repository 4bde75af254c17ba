"""Artifacts checked with one block in memory at a time: the same answer as of the whole model."""

import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from families import config_of, wrapper_of
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit import machine
from lowbit.artifact import proof
from lowbit.artifact.proof import verify
from lowbit.artifact.proof.contents import numbers_in
from lowbit.cli import app, loading
from lowbit.errors import LowbitError, VerificationError
from lowbit.evaluate import evaluate, evaluate_by_block, load_causal_lm
from lowbit.export import export
from lowbit.runtime.by_block import ByBlock

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
    return model, out, done, loading


def test_an_evaluation_is_that_of_the_whole(made):
    source, out, done, _ = made
    vocab = load_causal_lm(str(source), "cpu").config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (3, 16), generator=torch.Generator().manual_seed(0))
    reference = load_causal_lm(str(source), "cpu", "float32")
    # Scales may be of a whole call: one window in each.
    whole = evaluate(load_causal_lm(str(out), "cpu", "float32"), ids, reference, batch=1)
    models = (ByBlock(str(m), torch.device("cpu")) for m in (out, source))
    found = evaluate_by_block(next(models), ids, next(models), room=1)
    assert (found.windows, found.tokens, found.batch) == (3, 45, 1)
    # Where inputs are rounded, a difference of float32 may be a whole step of one.
    within = 1e-5 if done.report["recipe"].get("activations") is None else 1e-3
    assert found.top1 == pytest.approx(whole.top1, abs=1.01 / 45)
    assert found.kl == pytest.approx(whole.kl, rel=1e-3, abs=1e-6)
    assert found.nll == pytest.approx(whole.nll, rel=within)


def test_the_answer_is_that_of_the_whole(made):
    _, out, done, loading = made
    found = verify(out, loading="blocks")
    assert found.loading == (loading or found.loading)
    assert done.verification.loading == "whole"
    told = "passed" if found.loading == "blocks" else proof._WHOLE
    whole = {**asdict(done.verification), "loading": found.loading, "loader": told}
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
    monkeypatch.setattr(machine, "free_memory", lambda device: free)
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


@pytest.mark.parametrize("scheme", ["W4A16g16", "W4A8KV8g16"])
def test_wrappers(tmp_path, scheme):
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
    done = lowbit.quantize(whole, scheme, "rtn", out=out, calib=text, samples=4, length=16)
    found = verify(out, loading="blocks")
    assert found.loading == "blocks" and found.logits_rms == done.verification.logits_rms
    # Blocks of the text model, not of the tower.
    ids, kind = torch.full((2, 8), 5), done.report["format"]
    told = proof.runtime_logits(out, ids, kind, 4, loading="blocks")
    assert int(told["blocks"]) == config.get_text_config().num_hidden_layers == 4


def test_one_block_has_weights_at_a_time(artifact, monkeypatch):
    """The reader's own module, in this process."""
    monkeypatch.syspath_prepend(str(Path(proof.__file__).parent.parent / "readers"))
    by_block = importlib.import_module("by_block")
    filled = []

    def settle(block):
        inside = [b for b in model._blocks if not any(p.is_meta for p in b.parameters())]
        filled.append([b is block for b in inside])
        block.float()

    given_back = []
    monkeypatch.setattr(by_block, "_give_back_memory", lambda: given_back.append(len(filled)))
    model = by_block.streamed(T.AutoModelForCausalLM, artifact, settle)
    model.logits(torch.full((2, 8), 5), 4)
    assert given_back == [n + 1 for n in range(model.blocks)]
    assert filled == [[True]] * model.blocks
    assert all(p.is_meta for b in model._blocks for p in b.parameters())


def test_other_runtimes_cannot(artifact, tmp_path, monkeypatch):
    out = tmp_path / "gptq"
    export(artifact, out, "gptq_v2")
    with pytest.raises(LowbitError, match="--load blocks is for what transformers loads"):
        verify(out, loading="blocks")
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    given = SimpleNamespace(model=str(out), reference=None, dtype="auto", load="auto")
    assert not loading.by_block(given, "cpu")


@pytest.mark.parametrize(
    "words, code, says",
    [
        (
            ("--load", "blocks"),
            0,
            "4 windows a pass, in float32, one block in memory at a time); to",
        ),
        (("--load", "whole"), 0, "4 windows a pass, in float32); to"),
        (("--load", "half"), 2, "unknown way of loading 'half'"),
        (("--load", "blocks", "--tasks", "piqa"), 2, "leave out --tasks and --integers"),
    ],
)
def test_eval_from_the_command_line(artifact, tmp_path, words, code, says):
    model = save_tiny(tmp_path / "m")
    given = ("--text", model / "text.txt", "--length", 16, "--windows", 4, "--reference", model)
    done = CliRunner().invoke(app, [str(w) for w in ("eval", artifact, *given, *words)])
    said = " ".join(done.output.split())
    assert done.exit_code == code and says in said, said


@pytest.mark.parametrize("free, want", [(None, False), (1 << 40, False), (100_000, True)])
def test_eval_takes_blocks_where_the_whole_does_not_fit(artifact, monkeypatch, free, want):
    monkeypatch.setattr(machine, "free_memory", lambda device: free)
    given = SimpleNamespace(model=str(artifact), reference=None, dtype="auto", load="auto")
    assert loading.by_block(given, "cpu") == want
