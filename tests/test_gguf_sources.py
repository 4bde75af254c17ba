"""GGUF files as sources: every tensor as transformers loads it, and what is refused by name."""

import json
import shutil

import gguf as package
import helpers
import numpy as np
import pytest
import torch
import transformers as T
from gguf_files import written
from helpers import save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.evaluate import load_causal_lm
from lowbit.model.gguf_names import architectures
from lowbit.model.source import open_source
from lowbit.model.stream import ModelStream

IDS = torch.arange(3, 35)[None]
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
MOE = dict(
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
FAMILIES = {
    "llama": lambda: T.LlamaConfig(**helpers.LLAMA, tie_word_embeddings=True),
    "llama-untied": lambda: T.LlamaConfig(**helpers.LLAMA, tie_word_embeddings=False),
    "qwen2": lambda: T.Qwen2Config(**helpers.LLAMA),
    "qwen3": lambda: T.Qwen3Config(**helpers.LLAMA, head_dim=16),
    "qwen3moe": lambda: T.Qwen3MoeConfig(**{**helpers.LLAMA, **MOE}),
    "phi3": lambda: T.Phi3Config(**{**helpers.LLAMA, "num_key_value_heads": 4}),
    "gemma2": lambda: T.Gemma2Config(**helpers.LLAMA, **GEMMA),
    "gemma3": lambda: T.Gemma3TextConfig(**helpers.LLAMA, **GEMMA),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> its tiny model and tokenizer, made once."""
    made = {}

    def model(family):
        if family not in made:
            folder = save_tiny(
                tmp_path_factory.mktemp(family) / "m", FAMILIES[family](), torch.float32
            )
            loaded = T.AutoModelForCausalLM.from_pretrained(folder)
            made[family] = loaded, T.AutoTokenizer.from_pretrained(folder)
        return made[family]

    return model


def theirs(path):
    """What transformers makes of the file, in float32; ours of what it does not read."""
    config = T.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    ours = open_source(path).config_json
    for size in ("head_dim", "moe_intermediate_size", "query_pre_attn_scalar"):
        if size in ours:
            setattr(config, size, ours[size])
    return T.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    ).eval()


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_as_transformers_loads_it(models, tmp_path, family, kind):
    path = written(*models(family), tmp_path / "m.gguf", kind)
    expected, source = theirs(path), open_source(path)
    held = expected.state_dict()
    if expected.config.tie_word_embeddings:
        del held["lm_head.weight"]
    stored = source.stored()
    assert set(stored) == set(held) and source.left_out == {}
    wide = {"f32": "F32", "f16": "F16"}.get(kind, "BF16")
    for name, tensor in source.read(stored).items():
        assert stored[name].kind == ("F32" if tensor.ndim == 1 else wide)
        assert stored[name].shape == tuple(tensor.shape)
        assert torch.equal(tensor, held[name].to(tensor.dtype)), name
        at = (1, slice(0, 2)) if tensor.ndim > 1 else (slice(1, 3),)
        assert torch.equal(source.read_part(name, at), tensor[at])
        held[name].copy_(tensor)  # rounded as ours
    loaded = load_causal_lm(str(path), "cpu")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert source.nbytes == sum(t.n_bytes for t in package.GGUFReader(path).tensors)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_model_in_the_file_is_the_original(models, tmp_path, family):
    """Metadata included: the logits of a file in float32 are those of the model it was made of."""
    model, tokenizer = models(family)
    path = written(model, tokenizer, tmp_path / "m.gguf", "f32")
    with torch.no_grad():
        ours = load_causal_lm(str(path), "cpu")(IDS).logits
        assert torch.allclose(ours, model(IDS).logits, atol=1e-4, rtol=1e-4)
    text = "def push(self, item):"
    source = open_source(path)
    made = T.AutoTokenizer.from_pretrained(source.folder)
    assert made(text, add_special_tokens=False) == tokenizer(text, add_special_tokens=False)


def test_one_expert_is_dequantized_without_the_others(models, tmp_path, monkeypatch):
    path = written(*models("qwen3moe"), tmp_path / "m.gguf", "q8_0")
    stream, counts, dequantize = ModelStream(str(path)), [], package.dequantize
    monkeypatch.setattr(
        package, "dequantize", lambda d, k: counts.append(len(d)) or dequantize(d, k)
    )
    stream.names.read(stream.checkpoint, ["model.layers.0.mlp.experts.1.up_proj.weight"])
    assert counts == [1, 1]  # gate and up are one tensor in transformers


# --- from file to artifact ------------------------------------------------------------------------


def quantized(model, out, text, scheme="W4A16g32"):
    return lowbit.quantize(
        str(model), scheme, "rtn", out=out, calib=str(text), samples=4, length=32
    )


@pytest.mark.parametrize("kind, scheme", [("gguf:q8_0", "W8A16g32sym"), ("gguf:q4_k", "gguf:q4_k")])
def test_a_file_of_our_own_exporter_is_quantized(tmp_path, monkeypatch, kind, scheme):
    monkeypatch.setitem(helpers.LLAMA, "hidden_size", 256)
    monkeypatch.setitem(helpers.LLAMA, "intermediate_size", 512)
    folder = save_tiny(tmp_path / "m")
    text = folder / "text.txt"
    made = quantized(folder, tmp_path / "a", text, scheme)
    code, said = run("export", made.folder, "--to", kind, "-o", tmp_path / "g")
    assert code == 0, said
    (path,) = (tmp_path / "g").glob("*.gguf")
    expected, stream = theirs(path), ModelStream(str(path))
    state = expected.state_dict()
    for i in range(len(stream)):
        for name, tensor in stream.block_weights(i).items():
            full = f"{stream.block_name(i)}.{name}"
            rounded = state[full].to(stream.block_dtypes(i)[name])
            assert torch.equal(tensor, rounded.float())
    again = quantized(path, tmp_path / "b", text)
    report, config = again.report, json.loads((again.folder / "config.json").read_text())
    assert report["model"] == str(path) and list(report["original"]["files"])[1] == path.name
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(report["carried"])
    quant = "Q8_0" if "q8" in kind else "Q4_K"
    (remark,) = report["remarks"]
    assert remark.startswith(f"weights were GGUF ({quant}, ") and "dequantized values" in remark
    assert (
        remark.replace("_", "\\_")
        in (again.folder / "README.md").read_text().replace("\\\\_", "\\_")
        or remark in (again.folder / "README.md").read_text()
    )
    names = {n for s in report["shards"].values() for n in s["tensors"]}
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    assert T.AutoModelForCausalLM.from_pretrained(again.folder).config.model_type == "llama"
    code, said = run("verify", again.folder, "--no-loader", "--source", path)
    assert code == 0 and "have the bytes that were quantized" in said, said


def test_a_run_is_repeated_from_the_same_file(models, tmp_path):
    path = written(*models("llama"), tmp_path / "m.gguf", "q8_0")
    text = tmp_path / "text.txt"
    text.write_text(helpers.TEXT)
    first = quantized(path, tmp_path / "out", text)
    assert quantized(path, tmp_path / "out", text).repeated and not first.repeated


def test_commands_read_a_file(models, tmp_path):
    path = written(*models("llama"), tmp_path / "m.gguf", "q8_0")
    text = tmp_path / "text.txt"
    text.write_text(helpers.TEXT)
    for command in (
        ("plan", path, "--scheme", "W4A16g32", "--recipe", "rtn", "--length", "32"),
        ("eval", path, "--text", text, "--length", "32"),
        ("generate", path, "--prompt", "def", "--tokens", "4"),
    ):
        code, said = run(*command)
        assert code == 0, said


# --- split files ----------------------------------------------------------------------------------


def parts(models, tmp_path, family="llama-untied"):
    written(*models(family), tmp_path / "m.gguf", "q8_0", split=8)
    found = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(found) > 2
    return found


@pytest.mark.parametrize("given", [0, -1])
def test_a_split_file_is_read_whole(models, tmp_path, given):
    (tmp_path / "split").mkdir()
    found = parts(models, tmp_path / "split")
    whole = open_source(written(*models("llama-untied"), tmp_path / "m.gguf", "q8_0"))
    split = open_source(found[given])
    assert split.shards == tuple(p.name for p in found)
    assert split.config_json == whole.config_json
    expected = whole.read(whole.stored())
    assert all(torch.equal(t, expected[n]) for n, t in split.read(whole.stored()).items())


def test_parts_that_are_missing_are_named(models, tmp_path):
    found = parts(models, tmp_path)
    renamed = shutil.copy(found[0], tmp_path / "other.gguf")
    with pytest.raises(LowbitError, match=r"is one of the \d parts of a split file, and its name"):
        open_source(renamed)
    found[1].unlink()
    with pytest.raises(LowbitError, match=f"parts, of which '{found[1].name}' is missing"):
        open_source(found[0])
    shutil.copy(found[2], found[1])
    with pytest.raises(LowbitError, match="tensors: download them again"):
        open_source(found[0])


# --- what is refused ------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def of_unknown_type(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    data[at : at + 4] = (250).to_bytes(4, "little")
    path.write_bytes(data)


def integers(tensors):
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"].astype(np.int8)


DAMAGED = {
    "no gguf": (lambda p: p.write_bytes(b"PK\3\4" * 99), "is not a GGUF file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a GGUF file"),
    "a magic alone": (lambda p: p.write_bytes(b"GGUF"), "cannot be read as a GGUF file"),
    "cut short": (cut, r"cannot be read as a GGUF file \(truncated download\?\)"),
    "cut in its header": (
        lambda p: p.write_bytes(p.read_bytes()[:300]),
        "cannot be read as a GGUF file",
    ),
    "a type of the future": (of_unknown_type, "of a type that the installed gguf package does not"),
    "no such file": (lambda p: p.unlink(), "no such file: '.*m.gguf'"),
}


@pytest.mark.parametrize("command", ["quantize", "plan", "eval"])
@pytest.mark.parametrize("change, words", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_one_sentence(models, tmp_path, command, change, words):
    path = written(*models("llama"), tmp_path / "m.gguf", "q8_0")
    change(path)
    with pytest.raises(LowbitError, match=words):
        ModelStream(str(path))
    more = {"quantize": ("-o", tmp_path / "out"), "eval": ("--text", "stdlib"), "plan": ()}
    code, said = run(command, path, *more[command])
    assert code == 2 and said.startswith("error: ") and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_types_that_cannot_be_dequantized_are_named(models, tmp_path):
    path = written(*models("llama"), tmp_path / "m.gguf", change=integers)
    with pytest.raises(LowbitError, match="'blk.0.attn_q.weight' of .* is of type I8, which the"):
        open_source(path)


def test_a_missing_tensor_is_named(models, tmp_path):
    path = written(
        *models("llama"), tmp_path / "m.gguf", change=lambda t: t.pop("blk.1.ffn_up.weight")
    )
    with pytest.raises(LowbitError, match="'model.layers.1.mlp.up_proj.weight' is missing from"):
        ModelStream(str(path))


def test_a_tensor_of_another_shape_is_named(models, tmp_path):
    def narrow(tensors):
        tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][:64]

    path = written(*models("llama"), tmp_path / "m.gguf", change=narrow)
    words = r"'model.layers.1.mlp.up_proj.weight' of .* has shape \(64, 64\), config.json wants"
    with pytest.raises(LowbitError, match=words):
        ModelStream(str(path))


@pytest.mark.parametrize("arch", ["mamba2", "qwen35", "bert", "gpt-oss", "deci", "t5"])
def test_architectures_that_transformers_does_not_read_are_named(models, tmp_path, arch):
    path = tmp_path / "m.gguf"
    writer = package.GGUFWriter(path, arch)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = f"is a '{arch}' model, of which transformers cannot read GGUF files. It reads .*llama"
    with pytest.raises(LowbitError, match=words):
        open_source(path)
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"} <= set(
        architectures()
    )


def test_tensors_that_are_not_read_are_named(models, tmp_path):
    extra = {
        "rope_freqs.weight": np.ones(8, np.float32),
        "blk.0.odd.weight": np.ones(8, np.float32),
    }
    path = written(*models("llama"), tmp_path / "m.gguf", change=lambda t: t.update(extra))
    stream = ModelStream(str(path))
    assert set(stream.outer.left_out) == set(extra) and stream.copied() == {}
    said = " ".join(stream.remarks)
    assert "rotary frequencies ('rope_freqs.weight')" in said and "('blk.0.odd.weight')" in said


@pytest.mark.parametrize(
    "scaling, remarked", [(None, False), ("NONE", False), ("LINEAR", True), ("YARN", True)]
)
def test_rotary_scaling_that_is_not_read_is_a_remark(models, tmp_path, scaling, remarked):
    kind = None if scaling is None else package.RopeScalingType[scaling]
    path = written(*models("llama"), tmp_path / "m.gguf", scaling=kind)
    said = " ".join(open_source(path).remarks)
    assert ("rotary frequencies ('llama.rope.scaling.type')" in said) == remarked


def test_a_folder_with_a_file_names_it(models, tmp_path):
    written(*models("llama"), tmp_path / "m.gguf")
    with pytest.raises(LowbitError, match="no config.json: to quantize 'm.gguf' in it, give that"):
        open_source(tmp_path)


def test_the_package_is_asked_for(models, tmp_path, monkeypatch):
    path = written(*models("llama"), tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[llamacpp\]'"):
        open_source(path)
