"""GGUF headers: a model in a file is the original, with numbers that no config class has by default."""

import pytest
import torch
import transformers as T
from gguf_files import written
from helpers import COMMON, LLAMA, save_tiny

from lowbit.errors import LowbitError
from lowbit.evaluate import load_causal_lm
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.gguf_header import Header
from lowbit.model.gguf_names import Translated, architectures
from lowbit.model.source import open_source
from lowbit.model.stream import ModelStream

IDS = torch.arange(3, 35)[None]
LAYERS = dict(LLAMA, num_hidden_layers=3, tie_word_embeddings=False)
ROPE = {"rope_type": "default", "rope_theta": 777.0}
PARTIAL = {**ROPE, "partial_rotary_factor": 0.75}
GEMMA = dict(
    LAYERS, tie_word_embeddings=True, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
)
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40)
SHARED = dict(MOE, shared_expert_intermediate_size=24)
MODELS = {
    "llama": lambda: T.LlamaConfig(**LAYERS, rope_parameters=ROPE, rms_norm_eps=1e-3),
    "qwen2": lambda: T.Qwen2Config(**LAYERS, rope_parameters=ROPE, rms_norm_eps=1e-3),
    "qwen3": lambda: T.Qwen3Config(**LAYERS, head_dim=32, rope_parameters=ROPE),
    "qwen2moe": lambda: T.Qwen2MoeConfig(**LAYERS, **SHARED, rope_parameters=ROPE),
    "qwen3moe": lambda: T.Qwen3MoeConfig(**LAYERS, **MOE, head_dim=32, norm_topk_prob=True),
    "gemma2": lambda: T.Gemma2Config(
        **GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=2.0, rope_parameters=ROPE
    ),
    "gemma3": lambda: T.Gemma3TextConfig(
        **GEMMA,
        rope_parameters={"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 10.0}},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: T.Phi3Config(
        **LAYERS, sliding_window=8, rope_parameters=PARTIAL, rms_norm_eps=1e-3
    ),
    "phi3 without a window": lambda: T.Phi3Config(**LAYERS, rope_parameters=PARTIAL),
    "starcoder2": lambda: T.Starcoder2Config(**LAYERS, rope_parameters=ROPE, norm_epsilon=1e-3),
    "stablelm": lambda: T.StableLmConfig(
        **LAYERS,
        rope_parameters={**PARTIAL, "rope_theta": 10000.0},
        layer_norm_eps=1e-3,
        use_qkv_bias=True,
    ),
    "nemotron": lambda: T.NemotronConfig(
        **LAYERS, head_dim=32, rope_parameters=PARTIAL, norm_eps=1e-3
    ),
    "lfm2": lambda: T.Lfm2Config(
        **{**LAYERS, "tie_word_embeddings": True},
        rope_parameters=ROPE,
        norm_eps=1e-3,
        conv_L_cache=4,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "falcon": lambda: T.FalconConfig(
        **COMMON, layer_norm_epsilon=1e-3, num_kv_heads=1, ffn_hidden_size=160
    ),
    "gpt2": lambda: T.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=48, n_inner=96
    ),
    "mamba": lambda: T.MambaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        expand=3,
        state_size=8,
        conv_kernel=3,
        time_step_rank=6,
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=False,
    ),
    "minimax_m2": lambda: T.MiniMaxM2Config(
        **LAYERS, num_local_experts=5, num_experts_per_tok=2, head_dim=32, rotary_dim=16
    ),
}
PERIODS = {"gemma3": {"attention.sliding_window_pattern": [True, False, True]}}
PERIODS["gemma3"]["rope.freq_base_swa"] = 10.0


@pytest.fixture
def made(tmp_path):
    """``made(config, more)``: a model and a file of it in float32."""

    def make(config, more=()):
        folder = save_tiny(tmp_path / "m", config, torch.float32)
        model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = T.AutoTokenizer.from_pretrained(folder)
        return model, written(model, tokenizer, tmp_path / "m.gguf", "f32", more=more)

    return make


@pytest.mark.parametrize("case", MODELS)
def test_the_model_in_a_file_is_the_original(made, case):
    model, path = made(MODELS[case](), PERIODS.get(case, {}))
    source = open_source(path)
    assert source.left_out == {} and "entries are not read" not in " ".join(source.remarks)
    with torch.no_grad():
        ours, theirs = load_causal_lm(str(path), "cpu")(IDS).logits, model(IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family, blocks, width", [("gemma2", 46, 16), ("gemma3", 62, 16), ("gemma2", 26, 32)]
)
def test_scores_are_scaled_as_llama_cpp_scales_them(made, family, blocks, width):
    """By the hidden width of a head in the largest models, which no entry says."""
    path = made(MODELS[family](), {"block_count": blocks})[1]
    config = Translated.of(GGUFFile(path)).config
    assert config.num_hidden_layers == blocks and config.query_pre_attn_scalar == width


@pytest.mark.parametrize("more, width", [({}, None), ({"attention.key_length_swa": 16}, 16)])
def test_gemma4_has_two_widths_of_heads(made, more, width):
    path = made(MODELS["llama"](), {"attention.key_length": 512, **more})[1]
    header = Header(GGUFFile(path), vars(T.Gemma4TextConfig()))
    found = header.added({"global_head_dim": 512})
    assert found.get("head_dim") == width


def test_a_mixture_with_a_shared_expert_is_opened(made):
    model, path = made(MODELS["qwen2moe"]())
    stream = ModelStream(path)
    assert stream.config.shared_expert_intermediate_size == 24
    name = "mlp.shared_expert.gate_proj.weight"
    assert torch.equal(stream.block_weights(1)[name], model.model.layers[1].get_parameter(name))


def test_entries_that_are_not_read_are_named(made):
    more = {"logit_scale": 0.5, "attention.clamp_kqv": 3.0, "rope.scaling.type": "none"}
    remarks = open_source(made(MODELS["llama"](), more)[1]).remarks
    assert "of its header 2 entries are not read ('logit_scale')" in remarks


@pytest.mark.parametrize(
    "config, more, words",
    [
        (
            lambda: T.MixtralConfig(**LLAMA, num_local_experts=5),
            {},
            "is a 'llama' model with 5 experts, which transformers does not read from GGUF",
        ),
        (
            lambda: T.FalconConfig(**COMMON, num_kv_heads=2, new_decoder_architecture=True),
            {},
            "is a 'falcon' model with 2 heads of keys and values, which transformers does not",
        ),
        (MODELS["mamba"], {"ssm.dt_b_c_rms": True}, "is a 'mamba' model with norms inside its"),
    ],
)
def test_what_transformers_takes_for_another_model_is_refused(made, config, more, words):
    path = made(config(), more)[1]
    with pytest.raises(LowbitError, match=words):
        open_source(path)


def test_what_is_named_is_read():
    known = architectures()
    assert not {"deci", "gpt_oss", "t5", "umt5", "general", "tokenizer"} & set(known)
    assert set(known) <= set(T.CONFIG_MAPPING)
