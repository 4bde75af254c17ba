"""From the command line to the artifact and back: proof, resume, determinism, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from helpers import EVALUATED, FAMILIES, save_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.files import tensor_hash
from lowbit.artifact.proof import runtime_logits
from lowbit.cli import app
from lowbit.errors import LowbitError, VerificationError

ARGS = dict(samples=8, length=32)
FAST = ["tesseraq.schedule=exponential-4-4", "tesseraq.iters=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "artifact"
    lowbit.quantize(
        str(model),
        "W2A16g16",
        "tesseraq",
        out=out,
        calib=str(model / "text.txt"),
        settings=FAST,
        **ARGS,
    )
    return out


def shards(folder):
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "report.json"
    }


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def said(result):
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    "family, scheme",
    [(f, "W2A16g16") for f in FAMILIES]
    + [("llama", s) for s in ("W3A16g32", "W4A16", "W4A16g16sym", "W8A16g32sym")],
)
def test_plain_transformers_computes_the_tuned_models_logits(tmp_path, family, scheme):
    source = save_tiny(tmp_path / "m", family)
    done = lowbit.quantize(
        str(source), scheme, "awq", out=tmp_path / "out", calib=str(source / "text.txt"), **ARGS
    )
    assert done.verification.loader == "passed"
    # Symmetric artifacts are decoded in float32 by the loader, without the 16-bit rounding of the
    # tuned weights.
    assert done.verification.logits_rms < (2e-2 if scheme.endswith("sym") else 1e-4)
    linears = {e["name"] for e in done.report["linears"]}
    assert len(linears) == len(done.report["linears"])
    assert any("skipped" in e for e in done.report["linears"])


def test_report_counts_bits_from_bytes(artifact):
    report = json.loads((artifact / "report.json").read_text())
    held = [load_file(p) for p in artifact.glob("*.safetensors")]
    stored = sum(t.nbytes for s in held for k, t in s.items() if ".weight_" in k)
    weights = sum(a * b for e in report["linears"] if "skipped" not in e for a, b in [e["shape"]])
    assert report["size"]["bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert report["quality"]["quantized"]["kl"] > 0
    assert set(report["shards"]) == {p.name for p in artifact.glob("*.safetensors")}


def test_same_seed_same_bytes_and_a_moved_copy_verifies(artifact, model, tmp_path):
    lowbit.quantize(
        str(model),
        "W2A16g16",
        "tesseraq",
        out=tmp_path / "again",
        calib=str(model / "text.txt"),
        settings=FAST,
        **ARGS,
    )
    assert shards(tmp_path / "again") == shards(artifact)
    os.rename(tmp_path / "again", tmp_path / "moved")
    assert run("verify", tmp_path / "moved").exit_code == 0


def test_a_killed_run_continues_and_ends_with_the_same_bytes(artifact, model, tmp_path):
    rng = random.Random(0)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "lowbit",
        "quantize",
        str(model),
        "--scheme",
        "W2A16g16",
        "-o",
        str(out),
        "--calib",
        str(model / "text.txt"),
    ]
    command += ["--samples", "8", "--length", "32", *(x for s in FAST for x in ("--set", s))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(3 + 3 * rng.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert shards(out) == shards(artifact)


def test_interrupt_after_each_block_continues_with_the_same_bytes(artifact, model, tmp_path):
    def stop(done):
        if not done.resumed:
            raise KeyboardInterrupt

    arguments = dict(out=tmp_path / "out", calib=str(model / "text.txt"), settings=FAST, **ARGS)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lowbit.quantize(str(model), "W2A16g16", "tesseraq", progress=stop, **arguments)
    lowbit.quantize(str(model), "W2A16g16", "tesseraq", progress=stop, **arguments)
    assert shards(tmp_path / "out") == shards(artifact)


def test_a_resume_with_another_recipe_is_refused(model, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    arguments = dict(out=tmp_path / "out", calib=str(model / "text.txt"), **ARGS)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(str(model), "W2A16g16", "rtn", progress=stop, **arguments)
    with pytest.raises(LowbitError, match="unfinished run with another recipe"):
        lowbit.quantize(str(model), "W3A16g16", "rtn", **arguments)


@pytest.mark.parametrize(
    "kind", ["weight_packed", "weight_scale", "weight_zero_point", "layernorm.weight"]
)
def test_a_flipped_bit_is_found_and_named(artifact, tmp_path, kind):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    path = sorted(copy.glob("*.safetensors"))[1]
    held = load_file(path)
    name = next(k for k in held if kind in k)
    raw = held[name].contiguous().view(torch.uint8)
    raw.view(-1)[3] ^= 1
    save_file(held, path, metadata={"format": "pt"})
    result = run("verify", copy)
    assert result.exit_code == 1
    assert name in said(result)


def test_a_truncated_shard_fails_verification(artifact, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    path = sorted(copy.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    result = run("verify", copy)
    assert result.exit_code == 1 and path.name in said(result)


def test_generate_inspect_eval_and_plan(artifact, model, tmp_path):
    assert run("generate", artifact, "--prompt", "def add", "--tokens", "4").exit_code == 0
    assert "W2A16g16" in said(run("inspect", artifact))
    result = run(
        "eval",
        artifact,
        "--text",
        model / "text.txt",
        "--length",
        "32",
        "--windows",
        "8",
        "--reference",
        model,
        "--json",
        tmp_path / "e.json",
    )
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "e.json").read_text())
    assert list(data) == [*EVALUATED, "dtype", "bytes"]
    assert data["dtype"] == "float32" and data["bytes"] > 0
    assert (
        data["tokens"] == 8 * 31
        and data["kl"] > 0
        and data["batch"] == 8
        and "8 windows a pass" in said(result)
    )
    assert run("plan", model, "--scheme", "W2A16g16").exit_code == 0


def test_recipe_toml_round_trip_and_overrides(artifact, model, tmp_path):
    text = (artifact / "recipe.toml").read_text()
    recipe = lowbit.Recipe.from_toml(text)
    assert lowbit.Recipe.from_toml(recipe.to_toml()) == recipe
    (tmp_path / "r.toml").write_text(
        'scheme = "W2A16g16sym"\nmethods = ["rtn"]\n[overrides]\n"*.down_proj" = "W4A16g32sym"\n'
    )
    done = lowbit.quantize(
        str(model),
        None,
        str(tmp_path / "r.toml"),
        out=tmp_path / "out",
        calib=str(model / "text.txt"),
        **ARGS,
    )
    schemes = {
        e["name"].rsplit(".", 1)[1]: e["scheme"] for e in done.report["linears"] if "scheme" in e
    }
    assert schemes["down_proj"] == "W4A16g32sym" and schemes["q_proj"] == "W2A16g16sym"
    with pytest.raises(LowbitError, match="only if all are symmetric"):
        lowbit.quantize(
            str(model),
            "W2A16g16",
            str(tmp_path / "r.toml"),
            out=tmp_path / "no",
            calib=str(model / "text.txt"),
            **ARGS,
        )


@pytest.mark.parametrize(
    "text, words",
    [
        ("calibration = 3", "'calibration' must be a table"),
        ("scheme = 2", "'scheme' must be a string"),
        ("overrides = 'x'", "'overrides' must be a table"),
        ("[calibration]\nsample = 3", "did you mean 'samples'?"),
        ("[calibration]\nsamples = 0", "at least 1 sample"),
    ],
)
def test_bad_recipes_are_explained(text, words):
    with pytest.raises(LowbitError, match=words.replace("?", r"\?")):
        lowbit.Recipe.from_toml(text)


def test_a_report_of_another_version_and_a_plan_without_samples_are_refused(
    artifact, model, tmp_path
):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    (copy / "report.json").write_text("{}")
    result = run("verify", copy)
    assert result.exit_code == 1 and "not a complete report" in said(result)
    assert run("plan", model, "--scheme", "W2A16g16", "--samples", "0").exit_code == 2


def broken(tmp_path, change):
    source = save_tiny(tmp_path / "broken")
    change(source)
    return source


def _edit(source, name, value):
    held = load_file(source / "model.safetensors")
    held[name].view(-1)[5] = value
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.mlp.up_proj.weight"
BAD_MODELS = {
    "truncated": (
        lambda s: (s / "model.safetensors").write_bytes(
            (s / "model.safetensors").read_bytes()[:-50]
        ),
        "truncated",
    ),
    "no safetensors": (lambda s: (s / "model.safetensors").unlink(), "Only safetensors"),
    "no config": (lambda s: (s / "config.json").unlink(), "no config.json"),
    "nan": (lambda s: _edit(s, Q, float("nan")), Q),
    "inf": (lambda s: _edit(s, Q, float("inf")), Q),
    "no tokenizer": (lambda s: [p.unlink() for p in s.glob("tokenizer*")], "tokenizer"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_by_name(tmp_path, case):
    change, words = BAD_MODELS[case]
    source = broken(tmp_path, change)
    result = run(
        "quantize",
        source,
        "--scheme",
        "W2A16g16",
        "-o",
        tmp_path / "out",
        "--calib",
        source / "text.txt",
        "--recipe",
        "rtn",
        "--samples",
        4,
        "--length",
        32,
    )
    assert result.exit_code == 2, result.output
    assert words in said(result)
    assert not (tmp_path / "out").exists()


def test_missing_shard_is_named(tmp_path):
    source = save_tiny(tmp_path / "m", max_shard_size="40KB")
    victim = sorted(source.glob("model-*.safetensors"))[1]
    victim.unlink()
    result = run("quantize", source, "-o", tmp_path / "out", "--scheme", "W2A16g16")
    assert result.exit_code == 2 and victim.name in said(result)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--scheme", "W2A16g24"],
            "group size 24 does not divide the 64 inputs of 'model.layers.0.self_attn.q_proj'",
        ),
        (["--scheme", "2bit"], "unknown scheme '2bit'"),
        (["--scheme", "W4A1"], "2 to 8"),
        (["--recipe", "teseraq"], "did you mean 'tesseraq'?"),
        (["--set", "tesseraq.itters=3"], "did you mean 'iters'?"),
        (["--set", "tesseraq.iters=many"], "must be of type int"),
        (["--set", "awk.rows=3"], "did you mean 'awq'?"),
        (["--samples", "100000"], "100000"),
        (["--length", "4096"], "context of 128"),
        (["--calib", "nowhere.txt"], "nowhere.txt"),
        (["--device", "gpu9"], "gpu9"),
    ],
)
def test_bad_options_are_explained(model, tmp_path, arguments, words):
    base = [
        "quantize",
        model,
        "--scheme",
        "W2A16g16",
        "-o",
        tmp_path / "out",
        "--calib",
        model / "text.txt",
        "--samples",
        "4",
        "--length",
        "32",
    ]
    result = run(*base, *arguments)
    assert result.exit_code == 2, result.output
    assert words in said(result)
    assert not (tmp_path / "out").exists()


def test_empty_text_and_full_output_are_refused(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    result = run(
        "quantize",
        model,
        "--scheme",
        "W2A16g16",
        "-o",
        tmp_path / "out",
        "--calib",
        tmp_path / "empty.txt",
    )
    assert result.exit_code == 2 and "empty.txt" in said(result)
    result = run(
        "quantize",
        model,
        "--scheme",
        "W2A16g16",
        "-o",
        tmp_path,
        "--calib",
        model / "text.txt",
        "--samples",
        "4",
        "--length",
        "32",
    )
    assert result.exit_code == 2 and "not empty" in said(result)


def test_a_full_disk_is_one_sentence_and_the_run_continues_afterwards(
    artifact, model, tmp_path, monkeypatch
):
    calls = []

    def refuse_the_third(tensors, path, **options):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr("lowbit.artifact.files.save_file", refuse_the_third)
    out = tmp_path / "out"
    command = [
        "quantize",
        model,
        "--scheme",
        "W2A16g16",
        "-o",
        out,
        "--calib",
        model / "text.txt",
        "--samples",
        "8",
        "--length",
        "32",
    ]
    command += [x for s in FAST for x in ("--set", s)]
    result = run(*command)
    assert result.exit_code == 2 and "no space left on disk" in said(result)
    assert not list(tmp_path.rglob("*.tmp")) and not out.exists()
    assert run(*command).exit_code == 0
    assert shards(out) == shards(artifact)


def test_repeating_a_finished_command_verifies_it_and_changes_nothing(artifact, model):
    before = shards(artifact)
    (artifact / "run.json").write_text("{}")  # as if killed between the rename and the tidying up
    again = lowbit.quantize(
        str(model),
        "W2A16g16",
        "tesseraq",
        out=artifact,
        calib=str(model / "text.txt"),
        settings=FAST,
        **ARGS,
    )
    assert again.repeated and again.verification.loader == "passed"
    assert shards(artifact) == before
    with pytest.raises(LowbitError, match="not empty"):
        lowbit.quantize(
            str(model), "W2A16g16", "rtn", out=artifact, calib=str(model / "text.txt"), **ARGS
        )


def test_a_resume_on_another_model_is_refused(model, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    other = save_tiny(tmp_path / "other")
    arguments = dict(out=tmp_path / "out", calib=str(model / "text.txt"), **ARGS)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(str(other), "W2A16g16", "rtn", progress=stop, **arguments)
    _edit(other, "model.layers.1.mlp.up_proj.weight", 0.25)
    with pytest.raises(LowbitError, match="unfinished run with another model"):
        lowbit.quantize(str(other), "W2A16g16", "rtn", **arguments)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "recipe.toml", "proof/logits.safetensors"],
)
def test_a_changed_file_is_found_and_named(artifact, tmp_path, name):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    raw = bytearray((copy / name).read_bytes())
    raw[-2] ^= 1
    (copy / name).write_bytes(raw)
    result = run("verify", copy)
    assert result.exit_code == 1 and name in said(result)


def test_an_unwritable_output_and_an_unsupported_architecture_are_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    base = [
        "--scheme",
        "W2A16g16",
        "--calib",
        model / "text.txt",
        "--samples",
        "4",
        "--length",
        "32",
    ]
    result = run("quantize", model, "-o", tmp_path / "file" / "out", *base)
    assert result.exit_code == 2 and "cannot write" in said(result)
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    save_file({"wte.weight": torch.zeros(2)}, tmp_path / "gpt2" / "model.safetensors")
    result = run("quantize", tmp_path / "gpt2", "-o", tmp_path / "out", *base)
    assert result.exit_code == 2 and "no block of" in said(result)
    assert "has a linear that can be quantized" in said(result)
    assert not (tmp_path / "out.partial").exists()


def test_not_an_artifact(model):
    with pytest.raises(LowbitError, match=r"has no report\.json"):
        lowbit.verify(model)
    with pytest.raises(VerificationError):
        raise VerificationError("kept distinct from other errors")


@pytest.mark.skipif(sys.platform != "linux", reason="the quirk is Linux's")
def test_peak_memory_is_the_process_own_not_what_its_parent_held():
    held = torch.ones(200_000_000)  # 800 MB
    code = (
        "import torch; from lowbit.machine import peak_memory; "
        "print(peak_memory(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.nbytes


def test_a_hash_is_of_the_numbers_and_not_of_how_they_lie_in_memory():
    wide = torch.randint(0, 99, (6, 4), dtype=torch.int32)
    for t in (
        wide[:, :1],
        wide[:1, :1],
        wide.T,
        wide[::2],
        torch.tensor(3.0),
        torch.empty(0, 3),
        wide[:, 1].bfloat16(),
    ):
        assert tensor_hash(t) == tensor_hash(torch.empty(t.shape, dtype=t.dtype).copy_(t))
    assert tensor_hash(wide[:, :1]) != tensor_hash(wide[:, 1:2])


INTERPRETERS = {  # what stands for the interpreter, what is said of it
    "no memory": ('ulimit -v 300000; exec {python} "$@"', "could not be run on"),
    "killed": ("kill -9 $$", "ended by SIGKILL"),
    "killed by a real-time signal": ("kill -35 $$", "ended by signal 35"),
    "a module that cannot be imported": (
        'PYTHONPATH={broken} exec {python} "$@"',
        "no compressed-tensors here",
    ),
    "another failure before the model": ("echo 'cannot start' >&2; exit 1", "cannot start"),
    "silence": ("exit 0", "sent no logits"),
}


@pytest.mark.parametrize("case", INTERPRETERS)
def test_what_the_machine_lacks_is_no_fault_of_the_artifact(artifact, tmp_path, case):
    line, words = INTERPRETERS[case]
    (tmp_path / "broken" / "compressed_tensors").mkdir(parents=True)
    (tmp_path / "broken" / "compressed_tensors" / "__init__.py").write_text(
        "raise ImportError('no compressed-tensors here')"
    )
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n" + line.format(python=sys.executable, broken=tmp_path / "broken") + "\n"
    )
    python.chmod(0o755)
    result = run("verify", artifact, "--python", python)
    assert result.exit_code == 2 and words in said(result), said(result)


@pytest.mark.anew
def test_verification_needs_no_room_for_temporary_files(artifact, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    for made in ("mkstemp", "mkdtemp", "TemporaryDirectory", "TemporaryFile", "NamedTemporaryFile"):
        monkeypatch.setattr(f"tempfile.{made}", refuse)
    monkeypatch.setenv("TMPDIR", "/proc")
    assert lowbit.verify(artifact).loader == "passed"


@pytest.mark.parametrize("damage", ["gone", "cut", "config"])
def test_a_model_that_its_runtime_cannot_read_is_broken(artifact, tmp_path, damage):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", artifact, copy], check=True)
    path = sorted(copy.glob("*.safetensors"))[0]
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (copy / "config.json").write_text("{")
    with pytest.raises(VerificationError, match="transformers cannot load"):
        runtime_logits(copy, torch.zeros(1, 4, dtype=torch.int64), "compressed-tensors", 2)


def test_a_reader_sends_the_positions_that_are_compared(artifact):
    ids = torch.randint(3, 280, (2, 16), generator=torch.Generator().manual_seed(1))
    few, all_ = (
        runtime_logits(artifact, ids, "compressed-tensors", last)["logits"] for last in (3, 16)
    )
    assert few.shape == (2, 3, all_.shape[2]) and torch.allclose(few, all_[:, -3:], atol=1e-5)
