"""What may be quantized, which of its files are read, and that nothing of it is lost: odd
checkpoints, each with the right answer.
"""

import json
import shutil
from functools import partial

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import verify
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.evaluate import evaluate, load_causal_lm
from lowbit.model.carried import source_files
from lowbit.model.checkpoint import Checkpoint, Stored
from lowbit.model.stream import ModelStream
from lowbit.run.identity import Original

Q = "model.layers.1.self_attn.q_proj.weight"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plain"))  # bfloat16, tied


@pytest.fixture
def source(plain, tmp_path):
    """A copy to change: ``source(tensors=..., config=...)`` edits both in place and writes them."""
    folder = tmp_path / "source"
    shutil.copytree(plain, folder)

    def change(tensors=None, config=None):
        held = load_file(folder / "model.safetensors")
        if tensors is not None:
            tensors(held)
            save_file(
                {k: v.contiguous() for k, v in held.items()},
                folder / "model.safetensors",
                metadata={"format": "pt"},
            )
        if config is not None:
            data = json.loads((folder / "config.json").read_text())
            config(data)
            (folder / "config.json").write_text(json.dumps(data))
        return folder

    return change


@pytest.fixture(autouse=True)
def contents_alone(request, monkeypatch):
    """The closing check in these tests looks at bytes and codes; only those marked so load the
    result in a process of its own.
    """
    if "loaded" not in request.keywords:
        monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))


def rtn(model, out, **options):
    text = str(next(model.glob("text.txt")))
    return lowbit.quantize(
        str(model), "W4A16g16", "rtn", out=out, calib=text, samples=4, length=32, **options
    )


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def said(result):
    return " ".join(result.output.split())


def weights_of(folder):
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


# --- what is refused, before any work -------------------------------------------------------------


def as_fp8(name):
    def change(t):
        t[name] = t[name].to(torch.float8_e4m3fn)

    return change


def with_scale(name, dtype):
    def change(t):
        t[name] = t[name].to(dtype)
        t[name.replace(".weight", ".weight_scale")] = torch.ones(1)

    return change


def packed_as(*names):
    def change(t):
        prefix = UP.removesuffix("weight")
        del t[UP]
        for name in names:
            t[prefix + name] = torch.zeros(4, 4, dtype=torch.int32)

    return change


def drop(*names):
    def change(t):
        for name in names:
            del t[name]

    return change


def untie(c):
    c["tie_word_embeddings"] = False


REFUSED = {
    "fp8 in a later block": (as_fp8(UP), None, f"tensor '{UP}' of .* is stored as F8_E4M3"),
    "fp8 with its scale": (
        with_scale(UP, torch.float8_e4m3fn),
        None,
        f"'{UP}' of .* is stored as F8_E4M3",
    ),
    "fp8 embedding": (as_fp8(EMBEDDING), None, f"'{EMBEDDING}' of .* is stored as F8_E4M3"),
    "fp8 norm": (
        as_fp8("model.layers.1.input_layernorm.weight"),
        None,
        "input_layernorm.weight' of .* is stored as F8_E4M3",
    ),
    "int8 in the first block": (
        with_scale(DOWN, torch.int8),
        None,
        f"'{DOWN}' of .* is stored as I8",
    ),
    "one in float64": (
        lambda t: t.update({UP: t[UP].double()}),
        None,
        f"'{UP}' of .* is stored as F64: .* Save the model in one of these",
    ),
    "codes in 16-bit floats": (
        with_scale(UP, torch.bfloat16),
        None,
        "is quantized already: it holds 'model.layers.1.mlp.up_proj.weight_scale'",
    ),
    "gptq": (
        packed_as("qweight", "qzeros", "scales", "g_idx"),
        lambda c: c.update(quantization_config={"quant_method": "gptq"}),
        r"is quantized already \(quantization_config says gptq\): it holds 'model.layers.1.mlp.up_proj.(g_idx|qweight|qzeros|scales)'",
    ),
    "mlx": (
        lambda t: t.update(
            {
                UP: torch.zeros(4, 4, dtype=torch.uint32),
                UP.replace("weight", "scales"): torch.ones(4, 1),
            }
        ),
        lambda c: c.update(quantization={"bits": 4, "group_size": 64}),
        rf"'{UP}' of .* is stored as U32 \(quantization\)",
    ),
    "bitsandbytes": (
        lambda t: t.update(
            {UP: torch.zeros(64, 1, dtype=torch.uint8), f"{UP}.absmax": torch.ones(1)}
        ),
        lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}),
        rf"'{UP}' of .* is stored as U8 .*bitsandbytes",
    ),
    "rounded at load": (
        None,
        lambda c: c.update(quantization_config={"quant_method": "bitnet"}),
        "rounds to three values while it loads",
    ),
    "no head": (None, untie, "tensor 'lm_head.weight' is missing"),
    "no final norm": (drop(NORM), None, f"tensor '{NORM}' is missing"),
    "no embedding": (drop(EMBEDDING), None, f"tensor '{EMBEDDING}' is missing"),
    "a norm in a block": (
        drop("model.layers.1.input_layernorm.weight"),
        None,
        "input_layernorm.weight' is missing",
    ),
    "another vocabulary": (
        None,
        lambda c: c.update(vocab_size=301),
        r"'model.embed_tokens.weight' of .* has shape \(300, 64\), config.json wants \(301, 64\)",
    ),
    "architectures that are none": (
        drop(NORM),
        lambda c: c.update(architectures=5),
        "is missing|config",
    ),
    "a classifier": (
        lambda t: t.update({"score.weight": torch.zeros(2, 64)}),
        lambda c: c.update(architectures=["LlamaForSequenceClassification"]),
        "is a LlamaForSequenceClassification",
    ),
    "padding beyond the vocabulary": (
        None,
        lambda c: c.update(pad_token_id=4096),
        "cannot build.*Padding_idx must be within",
    ),
    "an unknown activation": (
        None,
        lambda c: c.update(hidden_act="swiglu7"),
        "cannot build.*swiglu7",
    ),
    "no heads": (None, lambda c: c.update(num_attention_heads=0), "config"),
    "another family": (
        None,
        lambda c: c.update(model_type="gemma3_text"),
        "'model.layers.0.self_attn.q_norm.weight' is missing from .*: the checkpoint does not fit",
    ),
    "weights in a file that is not there": (
        None,
        lambda c: c.update(transformers_weights="other.safetensors"),
        "no 'other.safetensors', which its config.json names",
    ),
    "weights outside the folder": (
        None,
        lambda c: c.update(transformers_weights="../model.safetensors"),
        "is no file of this folder",
    ),
}


@pytest.mark.parametrize("tensors, config, words", REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(source, tmp_path, tensors, config, words):
    folder = source(tensors, config)
    with pytest.raises(LowbitError, match=words) as refused:
        rtn(folder, tmp_path / "out")
    assert "did you mean" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "case", ["padding beyond the vocabulary", "an unknown activation", "no heads"]
)
@pytest.mark.parametrize("command", ["plan", "eval"])
def test_what_transformers_cannot_build_is_a_sentence_in_every_command(source, case, command):
    folder = source(*REFUSED[case][:2])
    more = ["--text", folder / "text.txt"] if command == "eval" else ["--scheme", "W4A16g16"]
    result = run(command, folder, *more)
    assert (
        result.exit_code == 2
        and said(result).startswith("error: ")
        and "Traceback" not in result.output
    ), result.output


def test_an_artifact_is_no_source(plain, tmp_path):
    made = rtn(plain, tmp_path / "out").folder
    (made / "text.txt").write_text((plain / "text.txt").read_text())
    with pytest.raises(
        LowbitError, match="is an artifact of lowbit .* start from the model it was made of"
    ):
        rtn(made, tmp_path / "again")


@pytest.mark.parametrize("model", [True, False])
def test_an_adapter_is_refused_by_every_command(source, model):
    folder = source()
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/base"})
    )
    if not model:
        for name in ("config.json", "model.safetensors"):
            (folder / name).unlink()
    for command in (
        ("quantize", folder, "-o", folder / "out", "--recipe", "rtn"),
        ("eval", folder, "--text", folder / "text.txt"),
    ):
        result = run(*command)
        assert (
            result.exit_code == 2
            and "adapter_config.json" in said(result)
            and "merge it into the model first" in said(result)
        )
        assert ("adapter of 'owner/base' and no model" in said(result)) != model


def test_eval_refuses_raw_codes_too(source):
    folder = source(as_fp8(UP))
    with pytest.raises(LowbitError, match=f"'{UP}' of .* is stored as F8_E4M3"):
        load_causal_lm(str(folder), "cpu")


# --- what runs all the same -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "said_of", [{"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "fp8"}]
)
def test_a_leftover_quantization_config_is_a_remark(plain, source, tmp_path, said_of):
    folder = source(None, lambda c: c.update(quantization_config=said_of))
    made = rtn(folder, tmp_path / "out")
    assert made.report["remarks"] == [
        f"config.json has a quantization_config of {said_of['quant_method']}, but all weights are "
        "floats: it is left out"
    ]
    assert made.report["hash"] == rtn(plain, tmp_path / "plain").report["hash"]
    ids = torch.arange(3, 67).view(2, 32)
    assert evaluate(load_causal_lm(str(folder), "cpu"), ids) == evaluate(
        load_causal_lm(str(plain), "cpu"), ids
    )


def shard(folder, weight_map=None):
    """The weights in two files, with their index."""
    held = load_file(folder / "model.safetensors")
    parts = {"a.safetensors": list(held)[:7], "b.safetensors": list(held)[7:]}
    for name, keys in parts.items():
        save_file({k: held[k].contiguous() for k in keys}, folder / name, metadata={"format": "pt"})
    full = {k: name for name, keys in parts.items() for k in keys}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map or full})
    )
    return full


def q_plus_one(t):
    t[Q] += 1


def test_a_single_file_comes_before_an_index_as_in_transformers(source, plain):
    folder = source()
    shard(folder)
    source(q_plus_one)  # of the single file alone
    theirs = load_causal_lm(str(folder), "cpu").get_parameter(Q)
    ours = ModelStream(folder).block_weights(1)["self_attn.q_proj.weight"]
    assert torch.equal(ours, theirs.float()) and not torch.equal(
        ours, load_file(plain / "model.safetensors")[Q].float()
    )


def test_a_stale_index_does_not_stand_in_the_way(source, plain):
    folder = source()
    shard(folder)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).unlink()
    assert (
        Original.of(Checkpoint(folder)).hashed().hashes["model.safetensors"]
        == Original.of(Checkpoint(plain)).hashed().hashes["model.safetensors"]
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        LowbitError, match=r"'a.safetensors', which model.safetensors.index.json names, is missing"
    ):
        ModelStream(folder)


def test_an_index_that_misses_a_tensor_of_its_shards_is_no_hindrance(source):
    folder = source()
    full = shard(folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(folder / "model.safetensors.index.json", folder / "x")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: v for k, v in full.items() if k != Q}})
    )
    assert Q in ModelStream(folder).stored


def test_a_tensor_in_two_shards_is_refused(source):
    folder = source()
    full = shard(folder)
    extra = load_file(folder / "b.safetensors")
    extra[next(k for k, v in full.items() if v == "a.safetensors")] = torch.zeros(2)
    save_file(extra, folder / "b.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LowbitError, match=r"lies in 'a.safetensors' and 'b.safetensors'"):
        ModelStream(folder)


def test_a_file_that_config_names_is_the_one(source):
    folder = source()
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    data = json.loads((folder / "config.json").read_text()) | {
        "transformers_weights": "mine.safetensors"
    }
    (folder / "config.json").write_text(json.dumps(data))
    assert ModelStream(folder).checkpoint.shards == ("mine.safetensors",)


# --- heads ----------------------------------------------------------------------------------------


def head_alone(t):
    t[HEAD] = t.pop(EMBEDDING)


def both_same(t):
    t[HEAD] = t[EMBEDDING].clone()


def both_differ(t):
    t[HEAD] = t[EMBEDDING].clone()
    t[HEAD][299, 63] += 1


@pytest.mark.loaded
@pytest.mark.parametrize(
    "change, tied", [(head_alone, True), (both_same, True), (both_differ, False)]
)
def test_a_head_is_tied_as_transformers_ties_it(plain, source, tmp_path, change, tied):
    folder = source(change)
    made, held = rtn(folder, tmp_path / "out"), weights_of(tmp_path / "out")
    config = json.loads((made.folder / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) is tied
    (head,) = (e for e in made.report["linears"] if "skipped" in e)
    assert ("tied to the embedding" in head["skipped"]) is tied and bool(
        made.report["remarks"]
    ) is not tied
    assert (HEAD in held) is not tied and EMBEDDING in held
    assert (made.report["hash"] == rtn(plain, tmp_path / "plain").report["hash"]) is tied
    assert (HEAD in made.report["left_out"]) is (change is both_same)
    theirs = load_causal_lm(str(folder), "cpu")
    assert torch.equal(held[HEAD if not tied else EMBEDDING].float(), theirs.lm_head.weight)
    kept = sum(
        t.numel()
        for n, t in load_file(folder / "model.safetensors").items()
        if n not in made.report["left_out"]
    )
    assert made.report["size"]["model_bits_per_weight"] == pytest.approx(
        8 * made.report["size"]["after"] / kept
    )


# --- dtypes ---------------------------------------------------------------------------------------


def only(dtype, *names):
    def change(t):
        for name in names:
            t[name] = t[name].to(dtype)

    return change


def everything(dtype, but=()):
    def change(t):
        for name in t:
            if name not in but:
                t[name] = t[name].to(dtype)

    return change


@pytest.mark.parametrize(
    "tensors, config, dtype",
    [
        (only(torch.float32, "model.layers.0.self_attn.q_proj.weight"), None, torch.bfloat16),
        (
            everything(torch.float32, but=("model.layers.0.self_attn.q_proj.weight",)),
            None,
            torch.float32,
        ),
        (everything(torch.float32), lambda c: c.update(dtype="bfloat16"), torch.float32),
        (everything(torch.float16), lambda c: c.pop("dtype"), torch.float16),
        (None, lambda c: c.update(dtype="float32"), torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_most_linears_everywhere(source, tmp_path, tensors, config, dtype):
    folder = source(tensors, config)
    made = rtn(folder, tmp_path / "out")
    held, original = weights_of(made.folder), load_file(folder / "model.safetensors")
    assert {t.dtype for n, t in held.items() if n.endswith("weight_scale")} == {dtype}
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == str(
        dtype
    ).removeprefix("torch.")
    for name in held.keys() & original.keys():
        assert held[name].dtype == original[name].dtype and torch.equal(
            held[name], original[name]
        ), name
    assert load_causal_lm(str(made.folder), "cpu", "auto").get_parameter(EMBEDDING).shape == (
        300,
        64,
    )


def test_what_no_method_changed_keeps_its_bits_and_what_one_changed_loses_none(source, tmp_path):
    def wide_norms(t):
        for name in t:
            if "norm" in name:
                t[name] = t[name].float() * 1.0001

    folder = source(wide_norms)
    original = load_file(folder / "model.safetensors")
    assert not torch.equal(original[NORM], original[NORM].bfloat16().float())
    for recipe in ("rtn", "awq"):
        text = str(folder / "text.txt")
        lowbit.quantize(
            str(folder), "W4A16g16", recipe, out=tmp_path / recipe, calib=text, samples=4, length=32
        )
        held = weights_of(tmp_path / recipe)
        norms = [n for n in original if "norm" in n]
        assert all(held[n].dtype == torch.float32 for n in norms)
        assert all(
            torch.equal(held[n], original[n]) for n in (norms if recipe == "rtn" else [NORM])
        )


# --- nothing is lost ------------------------------------------------------------------------------


def more_layers(t):
    for name in [n for n in t if n.startswith("model.layers.1.")]:
        t[name.replace("layers.1", "layers.2")] = t[name].clone()
    t["model.layers.2.eh_proj.weight"] = torch.full((64, 128), torch.inf)


EXTRA = {
    "more layers": (more_layers, "model.layers.2.eh_proj.weight"),
    "a bias that config denies": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "model.layers.0.self_attn.q_proj.bias",
    ),
    "frequencies": (
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
    "fp8 elsewhere": (
        lambda t: t.update({"mtp.proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}),
        "mtp.proj.weight",
    ),
    "an index": (lambda t: t.update({"position_ids": torch.arange(4)}), "position_ids"),
    "a scalar": (lambda t: t.update({"step": torch.tensor(3.5)}), "step"),
}


@pytest.mark.loaded
@pytest.mark.parametrize("tensors, name", EXTRA.values(), ids=EXTRA)
def test_tensors_that_the_class_does_not_know_are_copied(source, tmp_path, tensors, name):
    folder = source(tensors)
    made, original = rtn(folder, tmp_path / "out"), load_file(folder / "model.safetensors")
    held = weights_of(made.folder)
    assert name in made.report["copied"] and held[name].dtype == original[name].dtype
    for n in made.report["copied"]:
        assert (
            held[n].view(-1).view(torch.uint8).tolist()
            == original[n].view(-1).view(torch.uint8).tolist()
        )
    packed = {e["name"] for e in made.report["linears"]}
    assert all(n in held or n.removesuffix(".weight") in packed for n in original), (
        "every tensor is quantized or copied"
    )
    size = made.report["size"]
    assert size["before"] == sum(t.nbytes for t in original.values())
    assert size["model_bits_per_weight"] == pytest.approx(
        8 * size["after"] / sum(t.numel() for t in original.values())
    )


def test_files_are_carried_or_named(source, tmp_path):
    folder = source(None, lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_my.My"}))
    carried = {
        "modeling_my.py": "x = 1\n",
        "additional_chat_templates/tool_use.jinja": "TOOLS",
        "chat_template.jinja": "D",
        "LICENSE": "words",
        "preprocessor_config.json": "{}",
    }
    left = {
        "model.safetensors.bak": "x",
        "model-00002-of-00002.safetensors.part": "x",
        "shard-00001.json": "{}",
        "lowbit.lock": "",
        "pytorch_model.bin": "x",
        "model.gguf": "x",
        "quantize_config.json": "{}",
        ".gitattributes": "x",
        "README.md": "---\n---\n",
        "onnx/model.txt": "x",
    }
    for name, text in {**carried, **left}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "note.txt").symlink_to("/nowhere/at/all")
    made = rtn(folder, tmp_path / "out")
    for name in (*carried, "tokenizer.json", "text.txt"):
        assert (made.folder / name).read_bytes() == (
            folder / name
        ).read_bytes() and name in made.report["carried"]
    assert set(made.report["left_out"]) == {*(n for n in left if "/" not in n), "onnx/", "note.txt"}
    assert (
        not any((made.folder / n).exists() for n in left if n != "README.md")
        and "lowbit" in (made.folder / "README.md").read_text()
    )
    assert any("auto_map" in r for r in made.report["remarks"])
    shown = said(run("inspect", made.folder))
    assert (
        "pytorch_model.bin: left out" in shown and "note: the model brings code of its own" in shown
    )


@pytest.mark.parametrize(
    "kind, bits",
    [
        ("F8_E4M3FNUZ", 8),
        ("F6_E2M3", 6),
        ("F32", 32),
        ("BF16", 16),
        ("F8_E4M3", 8),
        ("I64", 64),
        ("U8", 8),
        ("BOOL", 8),
        ("F8_E8M0", 8),
        ("F4", 4),
        ("C64", 64),
    ],
)
def test_bytes_of_every_type_of_safetensors(kind, bits):
    assert Stored((3, 8), kind).nbytes == 3 * 8 * bits // 8


# --- identity -------------------------------------------------------------------------------------


def another_row(folder):
    held = load_file(folder / "model.safetensors")
    held[EMBEDDING][200, 5] += 1
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def another_byte(name):
    def change(folder):
        (folder / name).write_text((folder / name).read_text() + " ")

    return change


CHANGES = {
    "a row": another_row,
    "config": another_byte("config.json"),
    "tokenizer": another_byte("tokenizer.json"),
    "its settings": another_byte("tokenizer_config.json"),
    "generation": another_byte("generation_config.json"),
    "a new file": lambda f: (f / "added_tokens.json").write_text("{}"),
    "one less": lambda f: (f / "generation_config.json").unlink(),
    "code": lambda f: (f / "modeling_my.py").write_text("x = 1"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_changed_byte_is_another_model(source, change):
    folder = source()
    before = Original.of(Checkpoint(folder)).hashed().sha256
    assert Original.of(Checkpoint(folder)).hashed().sha256 == before
    change(folder)
    assert Original.of(Checkpoint(folder)).hashed().sha256 != before


def test_a_log_beside_the_model_is_no_part_of_it(source):
    folder = source()
    before = Original.of(Checkpoint(folder)).hashed()
    (folder / "nohup.out").write_text("block 1")
    (folder / "caf\udce9.txt").write_text("a name that is not UTF-8")
    (folder / "tokenizer.json").touch()
    before.check_unchanged()
    assert Original.of(Checkpoint(folder)).hashed().sha256 == before.sha256


def test_a_finished_artifact_knows_its_model(source, tmp_path):
    folder = source()
    text = tmp_path / "text.txt"
    (folder / "text.txt").rename(text)
    out = tmp_path / "out"
    command = (
        "quantize",
        folder,
        "--scheme",
        "W4A16g16",
        "--recipe",
        "rtn",
        "--calib",
        text,
        "--samples",
        "4",
        "--length",
        "32",
        "-o",
        out,
    )
    assert run(*command).exit_code == 0 and "already made" in said(run(*command))
    assert run("verify", out, "--source", folder).exit_code == 0
    another_row(folder)
    again = run(*command)
    assert again.exit_code == 2 and "exists and is not empty" in said(again)
    differs = run("verify", out, "--source", folder)
    assert differs.exit_code == 1 and "'model.safetensors' has other bytes" in said(differs)
    (folder / "tokenizer_config.json").unlink()
    assert "was not made of" in said(run("verify", out, "--source", folder))


def test_an_unfinished_run_is_not_continued_with_other_weights(source, tmp_path):
    folder = source()

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rtn(folder, tmp_path / "out", progress=stop)
    another_row(folder)
    with pytest.raises(
        LowbitError, match=r"holds an unfinished run with another model than this one"
    ):
        rtn(folder, tmp_path / "out")


def test_a_model_that_changes_under_a_run_is_noticed(source, plain, tmp_path):
    folder = source()

    def touch(done):
        if done.index == 0:
            another_row(folder)

    kept = (folder / "model.safetensors").read_bytes()
    with pytest.raises(
        LowbitError, match=r"'model.safetensors' of .* has changed since this command began"
    ):
        rtn(folder, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "shard-00002.json").exists(), (
        "no block of the other model is noted"
    )
    (folder / "model.safetensors").write_bytes(kept)
    assert (
        rtn(folder, tmp_path / "out").report["hash"]
        == rtn(plain, tmp_path / "plain").report["hash"]
    )


@pytest.mark.parametrize("seed", [-1, 2**63, 10**20])
def test_a_seed_that_torch_does_not_take_is_refused(plain, tmp_path, seed):
    with pytest.raises(LowbitError, match=f"seed {seed}: give a whole number from 0 to"):
        rtn(plain, tmp_path / "out", seed=seed)


def test_the_largest_seed_runs(plain, tmp_path):
    text = str(plain / "text.txt")
    done = lowbit.quantize(
        str(plain),
        "W4A16g16",
        "awq",
        out=tmp_path / "out",
        calib=text,
        samples=4,
        length=32,
        seed=2**63 - 1,
    )
    assert done.report["seed"] == 2**63 - 1


@pytest.mark.parametrize("change", [{"recipe": "gptq"}, {"scheme": "W3A16g16"}, {"seed": 1}])
def test_another_command_is_refused_before_the_model_is_read_whole(
    plain, tmp_path, monkeypatch, change
):
    rtn(plain, tmp_path / "out")
    monkeypatch.setattr(Original, "hashed", lambda *args: pytest.fail("read"))
    options = {"scheme": "W4A16g16", "recipe": "rtn", "seed": 0} | change
    with pytest.raises(LowbitError, match="exists and is not empty"):
        lowbit.quantize(
            str(plain),
            out=tmp_path / "out",
            calib=str(plain / "text.txt"),
            samples=4,
            length=32,
            **options,
        )


def test_a_mask_of_bytes_that_transformers_ignores_is_no_code(tmp_path):
    import transformers as T

    small = T.GPTNeoXConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    T.GPTNeoXForCausalLM(small).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_causal_lm(str(tmp_path), "cpu").config.model_type == "gpt_neox"


def test_files_of_a_hub_repository_are_those_that_it_lists(server, plain):
    server.files["some/tiny", "main"] = {
        p.name: p.read_bytes() for p in plain.iterdir() if p.name != "text.txt"
    } | {"original/a.pth": b"x", "LICENSE": b"words"}
    found = source_files(Checkpoint("some/tiny"))
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json"} <= set(
        found.carried
    ) and "original/" in found.left_out
