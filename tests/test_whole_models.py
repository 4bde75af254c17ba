"""Models of which only a part is quantized: mixtures of experts, text models inside of others,
hybrids. What is not quantized goes out bit for bit, and the class of the whole loads the artifact.
"""

import json
import shutil
import tracemalloc

import pytest
import torch
import transformers as T
from families import config_of, wrapper_of
from helpers import LLAMA, TEXT, save_tiny, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as safetensors_save

import lowbit
from lowbit.artifact.files import raw_hash, read_shard, save_shard, shard_hashes, tensor_hash
from lowbit.artifact.safetensors_file import save_file
from lowbit.errors import LowbitError
from lowbit.evaluate.loading import load_causal_lm
from lowbit.formats.packing import packed_linears
from lowbit.grid.names import parse_scheme
from lowbit.model import raw
from lowbit.model.raw import raw_tensors
from lowbit.model.wrapper import class_for, text_config
from lowbit.plan import make_plan, read_config
from lowbit.recipe import load_recipe

# By model type, what is stored in float32 in a model of bfloat16.
FLOAT32 = {"llama": "layers.1.input_layernorm.weight", "qwen3_5_text": "A_log"}


def made(folder, config, auto):
    """A random model of a config in bfloat16, some of it in float32, with a tokenizer."""
    text = config.get_text_config()
    text.vocab_size = 300
    torch.manual_seed(0)
    model = auto.from_config(config).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.1) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
            if name.endswith(FLOAT32.get(config.model_type, " ")):
                p.data = torch.randn(p.shape)
        for name, b in model.named_buffers():
            if "bias" in name:
                b.normal_(0, 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def with_extras(tensors):
    """What nobody knows, in dtypes that no float model has."""
    return {
        **tensors,
        "steps": torch.tensor([7, -9]),
        "model.layers.0.self_attn.flags": torch.tensor([True, False]),
        "mtp.layers.0.weight": torch.randn(3, 5),
        "scale": torch.tensor(3.5, dtype=torch.float64),
        "odd/näme.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "nothing": torch.zeros(0, 3, dtype=torch.float16),
    }


CASES = {  # case: config, automatic class, scheme, format
    "llama": (
        lambda: T.LlamaConfig(**LLAMA), T.AutoModelForCausalLM, "W4A16g16sym", "compressed-tensors"
    ),
    "qwen3_moe": (
        lambda: config_of("qwen3_moe"), T.AutoModelForCausalLM, "W4A16g8sym", "lowbit"
    ),
    "mixtral": (
        lambda: config_of("mixtral"), T.AutoModelForCausalLM, "W3A16g8", "lowbit"
    ),
    "gpt_oss": (
        lambda: config_of("gpt_oss"), T.AutoModelForCausalLM, "W4A16g8sym", "lowbit"
    ),
    "qwen3_5_text": (
        lambda: config_of("qwen3_5_text"), T.AutoModelForCausalLM, "W4A16g16sym",
        "compressed-tensors",
    ),
    "gemma3": (
        lambda: wrapper_of("gemma3", "gemma3_text"), T.AutoModelForImageTextToText, "W4A16g16sym",
        "compressed-tensors",
    ),
    "gemma3 own format": (
        lambda: wrapper_of("gemma3", "gemma3_text"), T.AutoModelForImageTextToText, "W4A8KV8g16",
        "lowbit",
    ),
    "gemma4 with shared keys": (
        lambda: wrapper_of("gemma4", "gemma4 with shared keys"), T.AutoModelForImageTextToText,
        "W4A16g16sym", "compressed-tensors",
    ),
    "qwen3_vl": (
        lambda: wrapper_of("qwen3_vl", "qwen3_vl_text"), T.AutoModelForImageTextToText,
        "W4A16g16", "compressed-tensors",
    ),
    "llava of mixtral": (
        lambda: wrapper_of("llava", "mixtral"), T.AutoModelForImageTextToText, "W4A16g8sym",
        "lowbit",
    ),
}  # fmt: skip


# In the library's own format, without activations that dequantizing leaves out.
OWN = [n for n, (_, _, scheme, kind) in CASES.items() if kind == "lowbit" and "KV" not in scheme]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model, what was quantized of it, and the format that is expected."""
    config, auto, scheme, kind = CASES[request.param]
    folder = made(tmp_path_factory.mktemp("m"), config(), auto)
    if request.param == "llama":
        path = folder / "model.safetensors"
        safetensors_save(with_extras(load_file(path)), path)
    out = tmp_path_factory.mktemp("o") / "out"
    text = str(folder / "text.txt")
    result = lowbit.quantize(str(folder), scheme, "rtn", out=out, calib=text, samples=8, length=32)
    return folder, out, kind, result


def stored(folder):
    return {
        n: r for path in sorted(folder.glob("*.safetensors")) for n, r in raw_tensors(path).items()
    }


def data(tensor):
    return b"".join(tensor.pieces())


def test_every_other_tensor_is_copied_bit_for_bit(case):
    source, out, _, result = case
    before, after = stored(source), stored(out)
    packed = set(packed_linears(after))
    # Linears in 3-D tensors have none of their own; what they hold goes out one by one.
    cut = {n for n in before if ".mlp.experts.gate_up" in n or ".mlp.experts.down" in n}
    kept = [n for n in before if n.removesuffix(".weight") not in packed and n not in cut]
    assert len(kept) > 5 and packed
    for name in kept:
        a, b = before[name], after[name]
        assert (a.kind, a.shape, data(a)) == (b.kind, b.shape, data(b)), name
    own = {n for n in after if n.rpartition(".")[0] not in packed or n.endswith(".bias")}
    new = {n for n in own if n not in before}
    assert new == {n for n in own if cut and ".experts." in n and n.endswith("bias")}
    assert {e["name"] for e in result.report["linears"] if "skipped" not in e} == packed


def test_experts_biases_are_those_of_the_fused_tensor(case):
    source, out, _, _ = case
    fused = {n for n in stored(source) if ".experts." in n and n.endswith("_proj_bias")}
    before = {n: r for n, r in stored(source).items() if n in fused}
    after = stored(out)
    for name, held in before.items():
        with safe_open(held.path, "pt") as f:
            whole = f.get_tensor(name)
        at = name.rpartition(".")[0]
        parts = {"gate_proj": whole[:, ::2], "up_proj": whole[:, 1::2]}
        if "down" in name:
            parts = {"down_proj": whole}
        for linear, biases in parts.items():
            for i, bias in enumerate(biases):
                found = after[f"{at}.{i}.{linear}.bias"]
                assert data(found) == bias.contiguous().view(torch.uint8).numpy().tobytes()


def test_the_class_of_the_whole_loads_it(case):
    source, out, kind, result = case
    assert result.report["format"] == kind and result.verification.loader == "passed"
    config = T.AutoConfig.from_pretrained(out)
    # transformers rounds what is wider than the model, as it does of the original.
    within = 5e-3 if config.model_type in FLOAT32 else 1e-5
    assert result.verification.top1 == 1 and result.verification.logits_rms < within
    whole, found = class_for(config).from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not found["missing_keys"] and not found["mismatched_keys"]
    original = class_for(config).from_pretrained(source)
    assert type(whole) is type(original)
    # A tower computes what it did.
    held = dict(original.named_parameters())
    for name, p in whole.named_parameters():
        if "vision" in name or "visual" in name or "projector" in name:
            assert torch.equal(p, held[name]), name
    wanted = type(original).__name__
    assert result.report.get("class") in (None, class_for(config).__name__), wanted


def test_config_comes_out_as_it_went_in(case):
    source, out, _, _ = case
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after.pop("quantization_config") and after == before


def test_a_plan_of_the_folder_is_of_the_same_linears(case):
    source, _, _, result = case
    scheme = result.report["recipe"]["scheme"]
    recipe = load_recipe("rtn", scheme=parse_scheme(scheme))
    plan = make_plan(read_config(str(source)), recipe, 8, 32)
    count = sum(1 for e in result.report["linears"] if "skipped" not in e)
    assert len(plan.outline.shapes) == count
    assert bool(plan.beyond) is (result.report["format"] == "lowbit")


@pytest.mark.parametrize("case", OWN, indirect=True)
@pytest.mark.parametrize("again", ["saved", "dequantized", "dequantized and saved"])
def test_a_loaded_model_is_saved_and_dequantized(case, again, tmp_path):
    _, out, _, _ = case
    model = load_causal_lm(str(out), "cpu")
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        if "dequantized" in again:
            model = model.dequantize()
            assert not [n for n, _ in model.named_modules() if ".experts.0" in n]
        if "saved" in again:
            model.save_pretrained(tmp_path)
            model = load_causal_lm(str(tmp_path), "cpu")
        torch.testing.assert_close(model(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [T.CLIPConfig(), T.ViTConfig(), T.CLIPVisionConfig()], ids=lambda c: c.model_type
)
def test_a_model_without_a_text_model_is_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    recipe = load_recipe("rtn", scheme=parse_scheme("W4A16g32"))
    with pytest.raises(LowbitError, match=r"config.json|without a text model") as e:
        make_plan(read_config(str(tmp_path)), recipe)
    assert str(e.value).count("\n") == 0


def test_a_wrapper_of_another_kind_of_text_model_is_named():
    with pytest.raises(LowbitError, match="'x' is a 'clip' model without a text model"):
        text_config(T.CLIPConfig(), "x")


# --- bytes ----------------------------------------------------------------------------------------

KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16),
    *(torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def test_a_file_is_what_safetensors_writes(tmp_path):
    tensors = {
        f'{"ab"[i % 2]}"{i}é': torch.arange(12).reshape(3, 4).to(dtype)
        for i, dtype in enumerate(KINDS)
    }
    tensors |= {"z": torch.zeros(0, 2), "s": torch.tensor(2.0)}
    said = {"format": "pt"}
    safetensors_save(tensors, tmp_path / "theirs", metadata=said)
    save_file(tensors, tmp_path / "ours", metadata=said)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    held = raw_tensors(tmp_path / "ours")
    save_file(held, tmp_path / "copy", metadata=said)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "theirs").read_bytes()
    want = {n: tensor_hash(t) for n, t in read_shard(tmp_path / "ours").items()}
    assert {n: raw_hash(r) for n, r in held.items()} == want == shard_hashes(tmp_path / "ours")


def test_large_tensors_are_copied_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "PIECE", 1 << 16)
    folder = save_tiny(tmp_path / "m")
    path = folder / "model.safetensors"
    large = torch.randint(0, 256, (1 << 26,), dtype=torch.uint8)
    safetensors_save({**load_file(path), "extra": large}, path)
    del large
    copied = raw_tensors(path)["extra"]
    tracemalloc.start()
    save_shard(tmp_path / "copy", {"extra": copied})
    hashes = shard_hashes(tmp_path / "copy")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20
    assert hashes == {"extra": raw_hash(copied)}
    # A run hands over nothing larger.
    monkeypatch.setattr(
        "lowbit.model.checkpoint.Checkpoint.read",
        refusing("extra", lowbit.model.checkpoint.Checkpoint.read),
    )
    lowbit.quantize(
        str(folder), "W4A16g16sym", "rtn", out=tmp_path / "out",
        calib=str(folder / "text.txt"), samples=8, length=32,
    )  # fmt: skip
    assert data(stored(tmp_path / "out")["extra"]) == data(copied)


def refusing(name, read):
    def checked(self, names, **options):
        names = list(names)
        assert name not in names
        return read(self, names, **options)

    return checked


def test_a_source_that_is_cut_short_while_it_is_copied(tmp_path):
    safetensors_save({"a": torch.zeros(1000)}, tmp_path / "a")
    held = raw_tensors(tmp_path / "a")
    shutil.copyfile(tmp_path / "a", tmp_path / "b")
    with open(tmp_path / "a", "rb+") as f:
        f.truncate(500)
    with pytest.raises(LowbitError, match="a ends before its tensors do"):
        save_shard(tmp_path / "out", held)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
