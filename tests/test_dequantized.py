"""Sources in FP8 and MXFP4: what is read of them, bit for bit, and what their artifacts say."""

import json
import math
import shutil

import pytest
import safetensors
import torch
from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from families import config_of, model_of
from helpers import save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.evaluate import load_causal_lm
from lowbit.model.dequantized import Dequantized
from lowbit.model.experts import replace_fused
from lowbit.model.naming import Names
from lowbit.model.stream import ModelStream

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 48]}
UP = "model.layers.1.mlp.up_proj.weight"
INPUT = "model.layers.1.mlp.up_proj.input_scale"
VALUES = "model.layers.1.self_attn.v_scale"


def compressed(**weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


def put(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def grown(scale, shape, steps):
    """A scale for each element, one at a time."""
    out = torch.empty(shape)
    for at in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
        out[tuple(at)] = scale[tuple(i // s for i, s in zip(at, steps, strict=True))]
    return out


# Shape of the weight, of its scales, their dtype and name, how many elements of each dimension
# share one, and what config.json says.
LAYOUTS = {
    "blocks": ((64, 96), (2, 2), torch.float32, "_scale_inv", (32, 48), FP8),
    "blocks that are cut": ((50, 100), (2, 3), torch.float32, "_scale_inv", (32, 48), FP8),
    "one block": ((20, 30), (1, 1), torch.float32, "_scale_inv", (32, 48), FP8),
    "powers of two": ((64, 50), (2, 2), torch.float8_e8m0fnu, "_scale_inv", (32, 48), FP8),
    "their exponents": ((64, 50), (2, 2), torch.uint8, "_scale_inv", (32, 48), FP8),
    "experts in blocks": ((3, 40, 50), (3, 2, 2), torch.float32, "_scale_inv", (1, 32, 48), FP8),
    "a scale an expert": ((3, 4, 5), (3,), torch.float32, "_scale_inv", (1, 4, 5), FP8),
    "a tensor": ((6, 8), (1,), torch.bfloat16, "_scale", (6, 8), compressed(strategy="tensor")),
    "channels": ((6, 8), (6, 1), torch.float16, "_scale", (1, 8), compressed(strategy="channel")),
    "channels in a row": ((6, 8), (6,), torch.float32, "_scale", (1, 8), compressed()),
    "named blocks": (
        *((50, 70), (4, 3), torch.float32, "_scale", (16, 32)),
        compressed(strategy="block", block_structure="16x32"),
    ),
    "groups": (
        *((6, 64), (6, 4), torch.bfloat16, "_scale", (1, 16)),
        compressed(strategy="group", group_size=16),
    ),
    "groups of powers of two": (
        *((6, 64), (6, 2), torch.uint8, "_scale", (1, 32)),
        compressed(strategy="group", group_size=32, scale_dtype="torch.uint8"),
    ),
    "channels beside groups": (
        *((6, 64), (6, 1), torch.float32, "_scale", (1, 64)),
        compressed(strategy="group", group_size=32),
    ),
    "modelopt": ((6, 8), (), torch.float32, "_scale", (6, 8), {"quant_method": "modelopt"}),
    "fbgemm": ((6, 8), (6, 1), torch.float32, "_scale", (1, 8), {"quant_method": "fbgemm_fp8"}),
}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_fp8(tmp_path, layout, kind):
    shape, sizes, dtype, end, steps, said = layout
    torch.manual_seed(0)
    weight = torch.randn(shape).to(kind)
    scale = torch.rand(sizes) + 0.1
    if dtype == torch.uint8:
        scale = torch.randint(100, 140, sizes, dtype=torch.uint8)
    scale = scale.to(dtype)
    number = torch.exp2(scale.float() - 127) if dtype == torch.uint8 else scale.float()
    counts = [math.ceil(n / s) for n, s in zip(shape, steps, strict=True)]
    expected = (weight.float() * grown(number.reshape(counts), shape, steps)).bfloat16()
    norm = torch.randn(7)
    folder = put(
        tmp_path / "m",
        {"a.weight": weight, f"a.weight{end}": scale, "a.input_scale": torch.ones(1), "n": norm},
        {"quantization_config": said, "model_type": "llama"},
    )
    source = Dequantized(folder)
    stored = source.stored()
    assert set(stored) == {"a.weight", "n"} and stored["a.weight"].kind == "BF16"
    assert stored["a.weight"].shape == shape
    read = source.read(["n", "a.weight"])
    assert torch.equal(read["a.weight"], expected) and torch.equal(read["n"], norm)
    parts = [(slice(1, 4),), (2,), (slice(0, 2), slice(3, 5)), (1, slice(2, 4)), ()]
    for at in parts:
        assert torch.equal(source.read_part("a.weight", at), expected[at])
    assert torch.equal(source.rows(["a.weight"], 1, 3)[0], expected[1:3])
    assert set(source.left_out) == {f"a.weight{end}", "a.input_scale"}
    assert source.nbytes == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())


def test_blocks_bit_for_bit_as_transformers(tmp_path):
    torch.manual_seed(0)
    weight, scale = torch.randn(96, 144).to(torch.float8_e4m3fn), torch.rand(3, 3)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    folder = put(tmp_path / "m", tensors, {"quantization_config": FP8, "dtype": "float16"})
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float16)
    assert torch.equal(Dequantized(folder).read(["a.weight"])["a.weight"], theirs)


@pytest.mark.parametrize("kind", [FloatQuantizationCompressor, MXFP8QuantizationCompressor])
@pytest.mark.parametrize("size", [16, 32, 96])
def test_groups_bit_for_bit_as_compressed_tensors(tmp_path, kind, size):
    torch.manual_seed(0)
    exact = kind is FloatQuantizationCompressor
    dtype, stored = (torch.float32, {}) if exact else (torch.uint8, {"scale_dtype": "torch.uint8"})
    weight = torch.randn(64, 96)
    steps = weight.view(64, -1, size).abs().amax(-1) / 448
    scale = steps if exact else torch.exp2(steps.log2().ceil())
    said = compressed(strategy="group", group_size=size, symmetric=True, **stored)
    scheme = QuantizationScheme(**said["config_groups"]["group_0"])
    held = kind.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert held["weight_scale"].dtype == dtype
    theirs = kind.decompress(held, scheme)["weight"].bfloat16()
    folder = put(
        tmp_path / "m",
        {"a.weight": held["weight"], "a.weight_scale": held["weight_scale"]},
        {"quantization_config": said},
    )
    source = Dequantized(folder)
    assert torch.equal(source.read(["a.weight"])["a.weight"], theirs)
    what = "channel" if size == 96 else "group"
    assert source.remarks[0].startswith(f"weights were FP8 with a scale per {what}: ")


@pytest.mark.parametrize(
    "config, kind",
    [
        ({"dtype": "float16"}, "F16"),
        ({"torch_dtype": "float32"}, "F32"),
        ({"text_config": {"dtype": "float16"}}, "F16"),
        ({}, "BF16"),
    ],
)
def test_the_dtype_is_that_of_the_config(tmp_path, config, kind):
    tensors = {"a": torch.ones(4, 4).to(torch.float8_e4m3fn), "a_scale": torch.ones(1)}
    folder = put(tmp_path / "m", tensors, {"quantization_config": FP8, **config})
    assert Dequantized(folder).stored()["a"].kind == kind


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path):
    tensors = {"a": torch.ones(4, 4).to(torch.float8_e4m3fn), "a_scale": torch.tensor(0.5)}
    folder = put(tmp_path / "m", tensors, {})
    assert Dequantized(folder).stored()["a"].kind == "F8_E4M3"
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    assert torch.equal(Dequantized(folder).read(["a"])["a"], torch.full((4, 4), 0.5).bfloat16())


# --- whole models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plain") / "m")


def with_quantization(folder, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


@pytest.fixture
def fp8(plain, tmp_path):
    """The model with its linears in FP8, and the same dequantized: ``fp8(change)`` edits the
    tensors of the first.
    """
    both = [shutil.copytree(plain, tmp_path / n) for n in ("fp8", "floats")]

    def made(change=lambda tensors: None, said=FP8):
        torch.manual_seed(0)
        ours, floats = {}, {}
        for name, weight in load_file(plain / "model.safetensors").items():
            floats[name] = ours[name] = weight
            if name.endswith("_proj.weight"):
                steps = (32, 48)
                scale = torch.rand([math.ceil(n / s) for n, s in zip(weight.shape, steps)])  # noqa: B905
                ours[name] = weight.to(torch.float8_e4m3fn)
                ours[f"{name}_scale_inv"] = scale
                number = grown(scale, weight.shape, steps)
                floats[name] = (ours[name].float() * number).bfloat16()
        change(ours)
        for folder, tensors in zip(both, (ours, floats), strict=True):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with_quantization(both[0], said)
        return both

    return made


def rtn(model, out):
    text = str(model / "text.txt")
    return lowbit.quantize(str(model), "W4A16g16", "rtn", out=out, calib=text, samples=4, length=32)


def test_an_fp8_model_is_quantized_as_its_floats(fp8, tmp_path):
    extra = torch.full((4, 4), 1.5).to(torch.float8_e4m3fn)

    def change(tensors):
        tensors |= {INPUT: torch.ones(1), VALUES: torch.ones(1)}
        tensors["mtp.proj.weight"] = extra
        tensors["mtp.proj.weight_scale_inv"] = torch.full((1, 1), 0.5)

    source, floats = fp8(change)
    held = load_file(floats / "model.safetensors")
    held["mtp.proj.weight"] = torch.full((4, 4), 0.75).bfloat16()
    save_file(held, floats / "model.safetensors", metadata={"format": "pt"})
    made, expected = rtn(source, tmp_path / "a"), rtn(floats, tmp_path / "b")
    report = made.report
    assert report["hash"] == expected.report["hash"]
    for side in ("float", "quantized"):
        assert report["quality"][side] == expected.report["quality"][side]
    remark = "weights were FP8 with block scales: figures are against their dequantized values"
    assert report["remarks"] == [remark]
    assert remark in (made.folder / "README.md").read_text()
    assert "dequantized values" not in (expected.folder / "README.md").read_text()
    assert report["left_out"][f"{UP}_scale_inv"] == f"the scale of '{UP}', which is dequantized"
    assert "activations" in report["left_out"][INPUT] and VALUES in report["left_out"]
    assert report["copied"]["mtp.proj.weight"].endswith("copied dequantized")
    assert expected.report["copied"]["mtp.proj.weight"].endswith("copied bit for bit")
    sizes = [p.report["size"]["before"] for p in (made, expected)]
    assert sizes[0] == sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    assert sizes[0] < sizes[1]
    said = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "pack-quantized"


def test_transformers_reads_the_same_numbers(plain, tmp_path):
    """Its own loader, which takes blocks that divide the weight."""
    folder = shutil.copytree(plain, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.rand(rows // 32, columns // 32)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with_quantization(folder, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    theirs = load_causal_lm(str(folder), "cpu", "bfloat16").state_dict()
    stream = ModelStream(str(folder))
    for i in range(len(stream)):
        for name, tensor in stream.block_weights(i).items():
            assert torch.equal(tensor.bfloat16(), theirs[f"{stream.block_name(i)}.{name}"])


SCALE = f"{UP}_scale_inv"
REFUSED = {
    "no scale": (
        lambda t: t.pop(SCALE),
        FP8,
        rf"'{UP}' of .* is stored as F8_E4M3 without its scale: neither '{SCALE}' nor",
    ),
    "too few blocks": (
        lambda t: t.update({SCALE: torch.ones(3, 1)}),
        FP8,
        rf"'{SCALE}' of .* \(F32 of shape \(3, 1\)\) does not fit '{UP}' of shape \(96, 64\) \(blocks of 32 x 48\)",
    ),
    "too many dimensions": (
        lambda t: t.update({SCALE: torch.ones(3, 2, 1)}),
        FP8,
        rf"'{SCALE}' of .* does not fit '{UP}'",
    ),
    "scales that are codes": (
        lambda t: t.update({SCALE: torch.ones(3, 2, dtype=torch.int32)}),
        FP8,
        rf"'{SCALE}' of .* \(I32 of shape \(3, 2\)\) does not fit",
    ),
    "no size of blocks": (lambda t: None, {"quant_method": "fp8"}, "names no size of blocks"),
    "NaN in a scale": (
        lambda t: t[SCALE].fill_(float("nan")),
        FP8,
        rf"tensor '{UP}' of .* holds 6144 NaN or infinite values",
    ),
    "another quantizer's": (
        lambda t: None,
        {"quant_method": "quark"},
        r"is stored as F8_E4M3 \(quantization_config says quark\)",
    ),
    "integers in compressed-tensors": (
        lambda t: t.update({UP: torch.ones(96, 64, dtype=torch.int8)}),
        {**compressed(block_structure=[32, 48])},
        rf"'{UP}' of .* is stored as I8 \(quantization_config says compressed-tensors, float-quantized\)",
    ),
    "zero points": (
        lambda t: t.update({f"{UP}_zero_point": torch.ones(1)}),
        FP8,
        r"is quantized already \(quantization_config says fp8\): it holds .*_zero_point'",
    ),
}


def nvfp4(end, *scales):
    """Codes of all linears, two a byte, with FP8 scales of 16 each, and theirs."""

    def change(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            del tensors[f"{name}_scale_inv"]
            tensors[name + end] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            tensors[f"{name}_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
            tensors |= {name.removesuffix("weight") + s: torch.ones(1) for s in scales}

    return change


ROTATED = {"R4": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
REFUSED |= {
    "compressed-tensors": (
        nvfp4("_packed", "weight_global_scale", "input_global_scale"),
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        r"quantized already \(quantization_config says compressed-tensors, nvfp4-pack-quantized\): it holds .*Start from the model in 16",
    ),
    "modelopt": (
        nvfp4("", "weight_scale_2", "input_scale"),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        r"_proj.weight' of .* is stored as U8 \(quantization_config says modelopt, NVFP4\).* Start from the model in 16",
    ),
    "modelopt in a file": (
        nvfp4("", "weight_scale_2", "input_scale"),
        None,
        r"_proj.weight' of .* is stored as U8 \(hf_quant_config.json says modelopt, NVFP4\).* Start from the model in 16",
    ),
    "transforms": (
        lambda t: None,
        {**compressed(strategy="block"), "transform_config": {"config_groups": ROTATED}},
        r"transforms around its linears \(quantization_config has a transform_config\).*is another function",
    ),
    "sparse": (
        lambda t: None,
        {**compressed(strategy="block"), "sparsity_config": {"format": "sparse-24-bitmask"}},
        r"is stored sparse \(quantization_config has a sparsity_config",
    ),
    "fewer experts": (
        lambda t: None,
        {**compressed(strategy="block"), "moe_sparsity_config": {"method": "novice"}},
        r"is stored sparse \(quantization_config has a moe_sparsity_config",
    ),
}


@pytest.mark.parametrize("change, said, words", REFUSED.values(), ids=REFUSED)
def test_fp8_that_cannot_be_read_is_named(fp8, tmp_path, change, said, words):
    source, _ = fp8(change, said)
    made = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    if said is None:
        (source / "hf_quant_config.json").write_text(json.dumps(made))
    with pytest.raises(LowbitError, match=words):
        rtn(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"transform_config": {}, "sparsity_config": {}},
        {"transform_config": {"config_groups": {}}, "sparsity_config": {"format": "dense"}},
        {"transform_config": None, "sparsity_config": None, "moe_sparsity_config": None},
    ],
)
def test_what_says_that_nothing_is_done_is_no_reason(fp8, more):
    source, floats = fp8(said={**compressed(block_structure=[32, 48]), **more})
    ours, expected = ModelStream(str(source)), ModelStream(str(floats))
    for name, tensor in ours.block_weights(1).items():
        assert torch.equal(tensor, expected.block_weights(1)[name])


# --- MXFP4 ----------------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def random_experts(experts=3, inputs=64, outputs=10, least=100, most=140):
    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(least, most, blocks.shape[:-1], dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("least, most", [(112, 130), (0, 20), (235, 253)])
def test_mxfp4_bit_for_bit_as_transformers(tmp_path, dtype, least, most):
    blocks, scales = random_experts(least=least, most=most)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    named = str(dtype).removeprefix("torch.")
    folder = put(tmp_path / "m", tensors, {"quantization_config": MXFP4, "dtype": named})
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    source = Dequantized(folder)
    (name,) = source.stored()
    assert source.stored()[name].shape == (3, 64, 10)
    for at in [(), (1,), (2, slice(None), slice(0, 10)), (0, slice(3, 40), slice(1, 4))]:
        ours = source.read_part(name, at, finite=False)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs[at]) and ours.is_contiguous()


def packed_gpt_oss(folder):
    """A tiny gpt_oss with its experts in MXFP4, and the same in floats."""
    config = config_of("gpt_oss", vocab_size=300)
    model = model_of(config).bfloat16()
    floats, ours = folder / "floats", folder / "mxfp4"
    model.save_pretrained(floats)
    held = load_file(floats / "model.safetensors")
    packed = dict(held)
    for name in [n for n in held if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = held[name].shape
        blocks, scales = random_experts(experts, inputs, outputs, 118, 124)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        held[name] = convert_moe_packed_tensors(blocks, scales)
    tiny_tokenizer().save_pretrained(floats)
    (floats / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 400)
    shutil.copytree(floats, ours)
    save_file(held, floats / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, ours / "model.safetensors", metadata={"format": "pt"})
    with_quantization(ours, MXFP4)
    return ours, floats


def opened(folder):
    """The checkpoint, and where the skeleton's parameters lie in it."""
    checkpoint = Dequantized(folder)
    config = config_of("gpt_oss", vocab_size=300)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    replace_fused(skeleton)
    return checkpoint, Names.of(skeleton, config, checkpoint.stored(), str(folder))


def test_gpt_oss_in_mxfp4_is_read_as_its_floats(tmp_path):
    (ours, names), (floats, others) = map(opened, packed_gpt_oss(tmp_path))
    assert names.places == others.places and names.unread == others.unread == ()
    got, expected = names.read(ours, names.places), names.read(floats, names.places)
    assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in expected.items())
    assert ours.remarks == ("weights were MXFP4: figures are against their dequantized values",)
    left = ours.left_out
    assert left[f"{EXPERTS}.down_proj_scales"].startswith(f"the scales of '{EXPERTS}.down_proj'")
    assert left[f"{EXPERTS}.down_proj_blocks"].startswith(f"the codes of '{EXPERTS}.down_proj'")


def test_one_expert_in_mxfp4_is_read_without_the_others(tmp_path, monkeypatch):
    checkpoint, names = opened(packed_gpt_oss(tmp_path)[0])
    read, parts = safetensors.safe_open, []

    class Opened:
        def __init__(self, path, **options):
            self.file = read(path, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def get_slice(self, name):
            whole = self.file.get_slice(name)

            class Part:
                def __getitem__(self, at):
                    parts.append(whole[at])
                    return parts[-1]

            return Part()

    monkeypatch.setattr("lowbit.model.checkpoint.safe_open", Opened)
    names.read(checkpoint, [f"{EXPERTS}.1.down_proj.weight"])
    assert len(parts) == 2 and {len(p) for p in parts} == {1}


def fp8_deepseek(folder):
    """A tiny deepseek_v3 with its linears in FP8 and a block more for several tokens at once, which
    no class knows; and its floats.
    """
    config = config_of(
        "deepseek_v3",
        vocab_size=300,
        num_hidden_layers=2,
        moe_intermediate_size=64,
        kv_lora_rank=32,
    )
    floats = save_tiny(folder / "floats", config)
    ours = shutil.copytree(floats, folder / "fp8")
    held = load_file(floats / "model.safetensors")
    held |= {n.replace(".1.", ".2.", 1): t.clone() for n, t in held.items() if ".layers.1." in n}
    stored = dict(held)
    for name, weight in held.items():
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            steps = (32, 32)
            scale = torch.rand([math.ceil(n / s) for n, s in zip(weight.shape, steps, strict=True)])
            each = grown(scale, weight.shape, steps)
            stored[name] = (weight.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            held[name] = (stored[name].float() * each).bfloat16()
    for at, tensors in ((floats, held), (ours, stored)):
        save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    with_quantization(ours, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    return ours, floats


@pytest.mark.parametrize("made", [packed_gpt_oss, fp8_deepseek])
def test_quantized_mixtures_from_the_command_line(made, tmp_path):
    source, floats = made(tmp_path)
    out, text = tmp_path / "out", source / "text.txt"

    def run(*options):
        found = CliRunner().invoke(app, list(map(str, options)))
        assert found.exit_code == 0, found.output
        return " ".join(found.output.split())

    asked = ("--scheme", "W4A16g32", "--recipe", "rtn", "--samples", 4, "--length", 32)
    said = run("quantize", source, *asked, "--calib", text, "--device", "cpu", "-o", out)
    assert "figures are against their dequantized values" in said and "logits by" in said
    assert said.count("left out:") <= 2
    assert "verified" in run("verify", out)
    windows = ("--text", text, "--length", 16, "--windows", 2, "--device", "cpu")
    figures = [
        run("eval", model, *windows, "--reference", reference).partition("perplexity")[2]
        for model, reference in ((out, source), (out, floats), (source, floats))
    ]
    assert figures[0].partition(";")[0] == figures[1].partition(";")[0]
    assert figures[0].partition("KL")[2] == figures[1].partition("KL")[2]
    assert "KL 0.00000 +- 0 (" in figures[2] and "top-1 100.00% +- 0.00%" in figures[2]
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = load_causal_lm(str(out), "cpu")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)


MXFP4_REFUSED = {
    "no scales": (
        lambda t: t.pop(f"{EXPERTS}.down_proj_scales"),
        rf"'{EXPERTS}.down_proj_blocks' of .* is MXFP4 without its scales",
    ),
    "scales of another shape": (
        lambda t: t.update({f"{EXPERTS}.down_proj_scales": torch.ones(1, 2, 3, dtype=torch.uint8)}),
        rf"'{EXPERTS}.down_proj_scales' of .* does not fit '{EXPERTS}.down_proj_blocks'",
    ),
    "scales that are floats": (
        lambda t: t.update(
            {f"{EXPERTS}.down_proj_scales": t[f"{EXPERTS}.down_proj_scales"].float()}
        ),
        rf"'{EXPERTS}.down_proj_scales' of .* \(F32 of shape .* does not fit",
    ),
}


@pytest.mark.parametrize("change, words", MXFP4_REFUSED.values(), ids=MXFP4_REFUSED)
def test_mxfp4_that_cannot_be_read_is_named(tmp_path, change, words):
    folder = packed_gpt_oss(tmp_path)[0]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(
        app, ["quantize", str(folder), "--recipe", "rtn", "-o", str(tmp_path / "out")]
    )
    with pytest.raises(LowbitError, match=words):
        ModelStream(str(folder))
    assert result.exit_code == 2 and "Traceback" not in result.output
