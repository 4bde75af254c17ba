"""Artifacts with quantized activations, keys and values, and online rotations: what runs from the
directory is what was tuned.
"""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import verify
from lowbit.cli import app
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats import native
from lowbit.grid import Affine, Codebook, InputQuantizer, KVGrid, PerToken, Rotation
from lowbit.runtime.linears import DecodedLinear

ARGS = dict(samples=8, length=32)


def made(model, out, scheme="W4A4KV4", recipe="quarot", **more):
    return lowbit.quantize(
        str(model), scheme, recipe, out=out, calib=str(model / "text.txt"), **{**ARGS, **more}
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "artifact"
    made(model, out)
    return out


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt-post-norm"])
@pytest.mark.parametrize("scheme, recipe", [("W4A4KV4", "quarot"), ("W8A8", "smoothquant")])
def test_the_artifact_computes_what_was_tuned_in_every_family(tmp_path, family, scheme, recipe):
    done = made(save_tiny(tmp_path / "m", family), tmp_path / "out", scheme, recipe)
    assert done.report["format"] == "lowbit"
    assert done.verification.loader == "passed"
    # Rounding flips a code here and there where a loader sums in another order; these are the same
    # sums.
    assert done.verification.logits_rms < 1e-3
    assert done.verification.top1 == 1.0


def test_every_quantized_linear_is_replaced_and_the_head_is_not(artifact):
    loaded = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    kinds = {n: m for n, m in loaded.named_modules() if isinstance(m, DecodedLinear)}
    assert len(kinds) == 14
    assert all(
        m.input_quantizer.grid == PerToken(4, symmetric=True, clip=0.9) for m in kinds.values()
    )
    assert {
        n.rsplit(".", 1)[1] for n, m in kinds.items() if m.input_quantizer.rotation is not None
    } == {
        "o_proj",
        "down_proj",
    }
    assert isinstance(loaded.lm_head, torch.nn.Linear)
    # A rotated model has a head of its own.
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_activations_keys_and_values_are_quantized_in_the_loaded_model(model, tmp_path):
    losses = {}
    ids = torch.randint(3, 280, (2, 32), generator=torch.Generator().manual_seed(1))
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    for scheme in ("W8A16KV8", "W8A16KV2", "W8A8", "W8A3"):
        made(model, tmp_path / scheme, scheme, "rtn")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype=torch.float32)
        losses[scheme] = float((loaded(ids, use_cache=False).logits - exact).pow(2).mean().detach())
    assert losses["W8A16KV2"] > 5 * losses["W8A16KV8"]
    assert losses["W8A3"] > 5 * losses["W8A8"]


def test_generation_with_and_without_a_cache_agree(artifact):
    loaded = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    ids = torch.randint(3, 280, (1, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cached, whole = (
            loaded.generate(ids, max_new_tokens=12, do_sample=False, use_cache=c, pad_token_id=0)
            for c in (True, False)
        )
    assert torch.equal(cached, whole)


@pytest.mark.parametrize(
    "order",
    [
        "import lowbit, transformers",
        "import transformers.quantizers, lowbit",
    ],
)
def test_importing_lowbit_is_enough_in_any_order(artifact, order):
    code = (
        f"{order}\nm = "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(artifact)!r})\nprint(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("DecodedLinear"), done.stderr


@pytest.mark.parametrize("what", ["import lowbit", "import lowbit.cli; lowbit.cli.make"])
def test_importing_lowbit_alone_loads_nothing_large(what):
    code = f"{what}; import sys; print({{'torch', 'transformers', 'numpy'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_everything_public_is_found_when_asked_for():
    code = "import lowbit; print(*(getattr(lowbit, n).__name__ for n in lowbit.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == lowbit.__all__, done.stderr
    assert {*lowbit.__all__} <= {*dir(lowbit)}
    with pytest.raises(AttributeError, match="module 'lowbit' has no attribute 'quantise'"):
        lowbit.quantise  # noqa: B018


def test_interrupt_after_each_block_continues_with_the_same_bytes(artifact, model, tmp_path):
    def stop(done):
        if not done.resumed:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(model, tmp_path / "again", progress=stop)
    made(model, tmp_path / "again")
    for path in artifact.rglob("*.safetensors"):
        assert (
            tmp_path / "again" / path.relative_to(artifact)
        ).read_bytes() == path.read_bytes(), path


def test_a_changed_activation_grid_fails_verification(artifact, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["activations"]["bits"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="config.json"):
        verify(copy)


def test_another_version_is_named(artifact, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_the_config_is_inverse(tmp_path):
    input_quantizers = {
        "self_attn.o_proj": InputQuantizer(Rotation.across_heads(12, 8), PerToken(4, True, 0.9)),
        "mlp.down_proj": InputQuantizer(Rotation.hadamard(172), PerToken(4, True, 0.9)),
        "mlp.up_proj": InputQuantizer(grid=PerToken(4, True, 0.9)),
    }
    kv = KVGrid(PerToken(3, clip=0.95), Rotation.hadamard(8))
    grids = {f"model.layers.0.{n}": Affine(4) for n in input_quantizers} | {
        "model.layers.0.k": Codebook(2)
    }
    outliers = {"model.layers.0.mlp.up_proj": 12}
    counts = {n: {"outliers": count} for n, count in outliers.items()}
    counts["model.layers.0.k"] = {"columns": {"4": 3, "2": 97}}
    patterns = {f"*.{n}": reading for n, reading in input_quantizers.items()}
    described = native.describe(
        grids, ["lm_head"], torch.bfloat16, patterns, (kv, ["*.self_attn"]), counts
    )
    config = json.loads(json.dumps(described))
    native.check(config)
    for name, grid in grids.items():
        assert native.grid_of(config, name) == grid
        assert native.outliers_of(config, name) == outliers.get(name)
    assert native.grid_of(config, "lm_head") is None
    assert native.columns_of(config, "model.layers.0.k") == {2: 97, 4: 3}
    x = torch.randn(3, 172)
    for name, reading in input_quantizers.items():
        found = native.input_quantizer_of(config, f"model.layers.0.{name}")
        assert asdict(found.grid) == asdict(reading.grid)
        if reading.rotation is None:
            assert found.rotation is None
        else:
            v = x[:, : reading.rotation.size]
            assert torch.equal(found.rotation(v), reading.rotation(v))
    found_kv, attention = native.kv_of(config)
    assert attention == ("*.self_attn",) and config["version"] == native.VERSION
    assert found_kv.grid == kv.grid
    assert torch.equal(found_kv.rotation(x[:, :8]), kv.rotation(x[:, :8]))
    assert native.dtype_of(config) == torch.bfloat16


@pytest.mark.parametrize("scheme", ["W8A8sym", "W4A8sym", "W4A4sym"])
def test_symmetric_activations_run_in_plain_transformers(model, tmp_path, scheme):
    done = made(model, tmp_path / "out", scheme, "smoothquant")
    assert done.report["format"] == "compressed-tensors"
    assert done.verification.loader == "passed" and done.verification.logits_rms < 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["num_bits"] == int(scheme[3])
    # Without its activation grid the same artifact gives other logits: the loader does quantize.
    ids = torch.randint(3, 280, (2, 32), generator=torch.Generator().manual_seed(1))
    active = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(
        ids, use_cache=False
    ).logits
    config["config_groups"]["group_0"]["input_activations"] = None
    whole = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({**whole, "quantization_config": config})
    )
    passive = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(
        ids, use_cache=False
    ).logits
    assert float((active - passive).pow(2).mean().detach()) > 1e-8


def test_formats_that_cannot_carry_it_say_so(model):
    plan = CliRunner().invoke(app, ["plan", str(model), "--scheme", "W4A4", "--recipe", "quarot"])
    assert plan.exit_code == 0, plan.output
    assert "import lowbit" in " ".join(plan.output.split())
    assert "vLLM" in plan.output and "refuses" in plan.output


@pytest.mark.parametrize(
    "scheme, recipe, words",
    [
        ("W4A4", "rtn", "under symmetric weights ('sym' at the end of the scheme)"),
        ("W4A16KV4", "rtn", "keys and values"),
        ("W4A16", "quarot", "online rotations"),
    ],
)
def test_what_plain_loaders_cannot_carry_is_refused_on_request(
    model, tmp_path, scheme, recipe, words
):
    args = [
        "quantize",
        model,
        "--scheme",
        scheme,
        "--recipe",
        recipe,
        "--plain",
        "-o",
        tmp_path / "out",
    ]
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert not (tmp_path / "out.partial").exists()


def test_the_recipes_own_scheme_is_the_default(model, tmp_path):
    args = [
        "quantize",
        model,
        "--recipe",
        "quarot",
        "--calib",
        model / "text.txt",
        "--samples",
        4,
        "--length",
        32,
        "-o",
        tmp_path / "out",
    ]
    assert CliRunner().invoke(app, [str(a) for a in args]).exit_code == 0
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["scheme"]
        == "W4A4KV4sym"
    )


def test_a_head_width_without_hadamard_matrix_is_named(tmp_path):
    import transformers as T

    config = T.LlamaConfig(
        vocab_size=300,
        hidden_size=4 * 67 * 2,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    T.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    from helpers import TEXT, tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "text.txt").write_text(TEXT)
    with pytest.raises(
        LowbitError, match="the width of a head is 134 = 2 x 67.*quarot.heads=false"
    ):
        made(tmp_path / "m", tmp_path / "out", settings=["quarot.residual=false"])
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_can_be_saved_again(artifact, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(artifact)
    loaded.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    ids = torch.randint(3, 280, (1, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    "scheme, recipe",
    [("W4A4", "rtn"), ("W4A4KV4", "quarot"), ("W8A8sym", "smoothquant"), ("W4A16", "awq")],
)
def test_tuning_in_16_bits_still_proves_the_artifact(model, tmp_path, scheme, recipe):
    done = made(model, tmp_path / "out", scheme, recipe, dtype="bfloat16")
    assert done.report["compute"] == "torch.bfloat16"
    assert done.verification.logits_rms < 1e-3


def test_a_size_that_cannot_be_rotated_is_refused_before_work(tmp_path):
    import transformers as T
    from helpers import TEXT, tiny_tokenizer

    config = T.LlamaConfig(
        vocab_size=300,
        hidden_size=112,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    T.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "text.txt").write_text(TEXT)
    for call in (
        ["quantize", tmp_path / "m", "--recipe", "quarot", "-o", tmp_path / "out"],
        ["plan", tmp_path / "m", "--recipe", "quarot"],
    ):
        result = CliRunner().invoke(app, [str(a) for a in call])
        assert result.exit_code == 2
        assert (
            "14 = 2 x 7" in (text := " ".join(result.output.split()))
            and "--set quarot.across_heads=false" in text
        )
    assert not (tmp_path / "out.partial").exists()
    made(tmp_path / "m", tmp_path / "out", "W4A16", settings=["quarot.online=false"])
