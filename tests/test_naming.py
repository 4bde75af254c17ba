"""Every parameter of a skeleton is found in what transformers writes and in what hubs hold."""

import json
import re

import pytest
import torch
import transformers as T
from families import MIXTURES, config_of, model_of, wrapper_of
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.errors import LowbitError
from lowbit.model import conversion
from lowbit.model.checkpoint import Checkpoint, Stored
from lowbit.model.experts import replace_fused
from lowbit.model.naming import Names, Place

CAUSAL = T.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
WRAPPERS = [
    ("gemma3", "gemma3_text"),
    ("gemma4", "gemma4_text"),
    ("glm4v_moe", "glm4v_moe_text"),
    ("internvl", "qwen2"),
    ("kimi_k25", "deepseek_v3"),
    ("lfm2_vl", "lfm2"),
    ("llama4", "llama4_text"),
    ("llava", "llama"),
    ("llava", "mixtral"),
    ("minimax_m3_vl", "minimax_m3_vl_text"),
    ("mistral3", "mistral"),
    ("mistral3", "mistral4"),
    ("mistral_large4", "mistral_large4_text"),
    ("paligemma", "gemma"),
    ("qwen2_5_vl", "qwen2_5_vl_text"),
    ("qwen3_5", "qwen3_5_text"),
    ("qwen3_5_moe", "qwen3_5_moe_text"),
    ("qwen3_vl", "qwen3_vl_text"),
    ("qwen3_vl_moe", "qwen3_vl_moe_text"),
]


def skeleton_of(config):
    """The text model of a config on meta, its experts unfused."""
    text = config.get_text_config()
    with torch.device("meta"):
        # A few text models have no causal class of their own: their wrapper holds the head.
        model = (T.AutoModelForCausalLM if type(text) in CAUSAL else T.AutoModel).from_config(text)
    replace_fused(model)
    return model


def saved(model, folder):
    """What save_pretrained writes, by name."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def put(tensors, folder):
    """Replace the tensors of a saved model."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def names_of(config, folder):
    checkpoint = Checkpoint(folder)
    return Names.of(skeleton_of(config), config, checkpoint.stored(), str(folder)), checkpoint


def assert_found(config, model, folder):
    """All of a model's numbers are read, bit for bit."""
    names, checkpoint = names_of(config, folder)
    replace_fused(model)
    theirs = model.state_dict()
    skeleton = skeleton_of(config)
    assert set(names.places) == set(skeleton.state_dict())
    for name, tensor in names.read(checkpoint, names.places).items():
        inner = "model.language_model." + name.removeprefix("model.")
        spelled = inner, f"language_model.{name}", name, "model.embed_tokens.weight"
        mine = next(
            n for n in (*spelled, "model.language_model.embed_tokens.weight") if n in theirs
        )
        assert mine in spelled[:3] or name == "lm_head.weight"
        assert torch.equal(tensor, theirs[mine]), name
        assert tensor.is_contiguous()
    return names


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures(family, tmp_path):
    config = config_of(family)
    model = model_of(config)
    model.save_pretrained(tmp_path)
    names = assert_found(config, model, tmp_path)
    # Rows that transformers keeps for choices that are no experts, and never reads.
    assert all(re.search(r"experts\.[56]\.", n) for n in names.unread)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len({names.module(n) for n in linears}) == len(linears)


@pytest.mark.parametrize("family", ["bitnet", "gemma2", "gpt2", "llama", "olmo2", "opt", "phi3"])
def test_dense(family, tmp_path):
    config = config_of(family)
    model = model_of(config)
    model.save_pretrained(tmp_path)
    assert names_of(config, tmp_path)[0].unread == ()
    assert_found(config, model, tmp_path)


@pytest.mark.parametrize(("wrapper", "text"), WRAPPERS)
def test_wrappers(wrapper, text, tmp_path):
    config = wrapper_of(wrapper, text)
    model = model_of(config, T.AutoModelForImageTextToText)
    model.save_pretrained(tmp_path)
    names = assert_found(config, model, tmp_path)
    assert any("vis" in n for n in names.unread)
    # A wrapper that cannot be built leaves the names themselves.
    config.architectures = None
    assert names_of(config, tmp_path)[0].places == names.places
    assert not any(".layers.0.input_layernorm" in n for n in names.unread if "vis" not in n)


@pytest.mark.parametrize("family", ["mixtral", "lfm2_moe", "granitemoe", "deepseek_v4", "jamba"])
def test_channels_that_are_too_many_to_be_numbered(family, tmp_path, monkeypatch):
    config = config_of(family)
    model = model_of(config)
    model.save_pretrained(tmp_path)
    want = names_of(config, tmp_path)[0].places
    monkeypatch.setattr(conversion, "_SMALL", 0)
    assert names_of(config, tmp_path)[0].places == want


EXPERT = "model.layers.0.mlp.experts.3.gate_proj"


@pytest.mark.parametrize(
    ("family", "place", "module"),
    [
        (
            "mixtral",
            Place("model.layers.0.block_sparse_moe.experts.3.w1.weight"),
            "model.layers.0.block_sparse_moe.experts.3.w1",
        ),
        ("qwen3_moe", Place(f"{EXPERT}.weight"), EXPERT),
        (
            "gpt_oss",
            Place("model.layers.0.mlp.experts.gate_up_proj", 3, (0, 192, 2), True),
            EXPERT,
        ),
        (
            "aria_text",
            Place("model.layers.0.mlp.experts.fc1.weight", 3, (0, 96, 1), True),
            EXPERT,
        ),
    ],
)
def test_places_and_names_out(family, place, module, tmp_path):
    config = config_of(family)
    model_of(config).save_pretrained(tmp_path)
    names = names_of(config, tmp_path)[0]
    assert names.places[f"{EXPERT}.weight"] == (place,)
    assert names.module(EXPERT) == module


def fused_qwen(tensors):
    """As the hub's Qwen3.5-MoE lies: experts in 3-D tensors."""
    out = {n: t for n, t in tensors.items() if ".experts." not in n}
    for i in range(4):
        at = f"model.language_model.layers.{i}.mlp.experts"
        part = {
            k: torch.stack([tensors[f"{at}.{e}.{k}_proj.weight"] for e in range(5)])
            for k in ("gate", "up", "down")
        }
        out[f"{at}.gate_up_proj"] = torch.cat((part["gate"], part["up"]), dim=1)
        out[f"{at}.down_proj"] = part["down"]
    return out


def turned_qwen_vl(tensors):
    """As older Qwen3-VL-MoE checkpoints lie: experts (experts, in, out)."""
    return {n: t.mT if ".experts." in n else t for n, t in tensors.items()}


def old_prefix(tensors):
    """As wrappers were written: the whole text model inside."""
    return {
        n.replace("model.language_model.", "language_model.model.")
        .replace("model.visual.", "visual.")
        .replace("lm_head", "language_model.lm_head"): t
        for n, t in tensors.items()
    }


def new_prefix(tensors):
    """As transformers calls them in memory."""
    return {n.replace("language_model.model.", "model.language_model."): t
            for n, t in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("wrapper", "text", "change"),
    [
        ("qwen3_5_moe", "qwen3_5_moe_text", fused_qwen),
        ("qwen3_vl_moe", "qwen3_vl_moe_text", turned_qwen_vl),
        ("qwen3_5", "qwen3_5_text", old_prefix),
        ("gemma3", "gemma3_text", new_prefix),
    ],
)
@pytest.mark.parametrize("small", [2**22, 0])
def test_layouts_that_hubs_hold(wrapper, text, change, small, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_SMALL", small)
    config = wrapper_of(wrapper, text)
    model = model_of(config, T.AutoModelForImageTextToText)
    tensors = saved(model, tmp_path)
    changed = change(tensors)
    assert {n: t.shape for n, t in changed.items()} != {n: t.shape for n, t in tensors.items()}
    put(changed, tmp_path)
    assert_found(config, model, tmp_path)


def without_prefix(tensors):
    return {n.removeprefix("model."): t for n, t in tensors.items()}


def with_a_talker(tensors):
    """Another decoder, deeper and narrower, whose names are the same."""
    out = {f"thinker.{n}": t for n, t in tensors.items()}
    for n, t in tensors.items():
        for add in (0, 4):
            deeper = re.sub(r"layers\.(\d)", lambda m, add=add: f"layers.{int(m[1]) + add}", n)
            out[f"talker.{deeper}"] = t[..., : t.shape[-1] // 2].clone()
    return out


def one_by_one(tensors):
    """As artifacts of runtimes lie: experts of gpt_oss in two dimensions."""
    out = {n: t for n, t in tensors.items() if ".experts." not in n}
    for n, t in tensors.items():
        at, _, leaf = n.rpartition(".")
        kind = "bias" if leaf.endswith("bias") else "weight"
        for e in range(5) if ".experts." in n else ():
            one = t[e].mT if kind == "weight" else t[e]
            if leaf.startswith("down"):
                out[f"{at}.{e}.down_proj.{kind}"] = one
            else:
                out[f"{at}.{e}.gate_proj.{kind}"] = one[::2]
                out[f"{at}.{e}.up_proj.{kind}"] = one[1::2]
    return out


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", without_prefix),
        ("mixtral", without_prefix),
        ("gpt_oss", one_by_one),
        ("gpt_oss", with_a_talker),
        ("mixtral", with_a_talker),
        ("llama", with_a_talker),
    ],
)
def test_other_layouts(family, change, tmp_path):
    config = config_of(family)
    model = model_of(config)
    put(change(saved(model, tmp_path)), tmp_path)
    assert_found(config, model, tmp_path)


def test_one_expert_is_read_without_the_others(tmp_path, monkeypatch):
    config = config_of("gpt_oss")
    model_of(config).save_pretrained(tmp_path)
    names, checkpoint = names_of(config, tmp_path)
    whole, parts = [], []
    read, read_part = checkpoint.read, checkpoint.read_part
    monkeypatch.setattr(checkpoint, "read", lambda n: whole.extend(n) or read(n))

    def part_of(name, at):
        parts.append(read_part(name, at))
        return parts[-1]

    monkeypatch.setattr(checkpoint, "read_part", part_of)
    names.read(checkpoint, [f"{EXPERT}.weight", f"{EXPERT}.bias", "model.norm.weight"])
    assert whole == ["model.norm.weight"]
    assert [tuple(p.shape) for p in parts] == [(64, 192), (192,)]


def test_nan_in_an_expert_is_named(tmp_path):
    config = config_of("gpt_oss")
    tensors = saved(model_of(config), tmp_path)
    tensors["model.layers.0.mlp.experts.gate_up_proj"][3, 0, 0] = float("nan")
    put(tensors, tmp_path)
    names, checkpoint = names_of(config, tmp_path)
    names.read(checkpoint, [EXPERT.replace(".3.", ".2.") + ".weight"])
    with pytest.raises(LowbitError, match=r"'model.layers.0.mlp.experts.gate_up_proj' .* 1 NaN"):
        names.read(checkpoint, [f"{EXPERT}.weight"])


def drop(*ends):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ends)}


def shortened(tensors):
    return {n: t[:3] if ".experts." in n else t for n, t in tensors.items()}


def narrowed(tensors):
    return {n: t[:-1] if n == "model.layers.1.self_attn.q_proj.weight" else t
            for n, t in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("mixtral", drop("layers.1.block_sparse_moe.experts.4.w1.weight"),
         r"holds 4 of the 5 experts that its config.json asks for in 'model.layers.1.mlp.experts': "
         r"the 'gate_proj.weight' of expert 4 is missing"),
        ("mixtral", drop("layers.1.block_sparse_moe.experts.2.w2.weight"),
         r"holds 4 of the 5 experts .* 'down_proj.weight' of expert 2 is missing. Tensors with "
         r"similar names: model.layers"),
        ("mixtral", drop("w3.weight"), r"holds 0 of the 5 experts .* of expert 0 is missing"),
        ("qwen3_moe", drop("layers.0.mlp.experts.4.up_proj.weight"),
         r"holds 4 of the 5 experts .* 'up_proj.weight' of expert 4 is missing"),
        ("gpt_oss", shortened, r"holds 3 of the 5 experts .* of expert 3 is missing"),
        ("qwen3_moe", drop("layers.2.mlp.gate.weight"),
         r"the router 'model.layers.2.mlp.gate.weight' is missing from"),
        ("mixtral", drop("layers.2.block_sparse_moe.gate.weight"),
         r"the router 'model.layers.2.mlp.gate.weight' is missing from"),
        ("gemma4_text", drop("layers.2.router.proj.weight"),
         r"the router 'model.layers.2.router.proj.weight' is missing from"),
        ("mixtral", drop("layers.3.input_layernorm.weight"),
         r"tensor 'model.layers.3.input_layernorm.weight' is missing from .* similar names: "
         r"model.layers.\d.input_layernorm.weight"),
        ("mixtral", narrowed,
         r"'model.layers.1.self_attn.q_proj.weight' of .* shape \(63, 64\), .* wants \(64, 64\)"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(family, change, said, tmp_path):
    config = config_of(family)
    put(change(saved(model_of(config), tmp_path)), tmp_path)
    with pytest.raises(LowbitError, match=said):
        names_of(config, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_more_experts_than_the_config_says(family, tmp_path):
    model_of(config_of(family)).save_pretrained(tmp_path)
    config = config_of(family)
    setattr(config, "num_experts" if "qwen" in family else "num_local_experts", 4)
    with pytest.raises(LowbitError, match=r"router|gate.weight' of .* shape \(5, 64\).* \(4, 64\)"):
        names_of(config, tmp_path)


def test_order_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    config = config_of("llama")
    model_of(config).save_pretrained(tmp_path)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    mixed = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Interleave(dim=0)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [mixed])
    with pytest.raises(
        LowbitError, match=r"'model.layers.0.mlp.down_proj.weight' has its channels"
    ):
        names_of(config, tmp_path)


def test_mixtral_in_its_own_sizes():
    config = T.MixtralConfig(num_hidden_layers=1, num_local_experts=8)
    skeleton = skeleton_of(config)
    stored = {}
    for name, tensor in skeleton.state_dict().items():
        for mine, theirs in {
            "mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
        }.items():  # fmt: skip
            name = name.replace(f".{mine}.", f".{theirs}.")
        stored[name] = Stored(tuple(tensor.shape), "BF16")
    names = Names.of(skeleton, config, stored, "mixtral")
    assert names.places["model.layers.0.mlp.experts.7.up_proj.weight"] == (
        Place("model.layers.0.block_sparse_moe.experts.7.w3.weight"),
    )
    assert names.unread == () and json.dumps(names.apart) == "{}"
