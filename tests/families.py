"""Tiny random models of many families of transformers, made from one set of sizes."""

from __future__ import annotations

import torch
import transformers as T

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=40,
    num_hidden_layers=4,
    num_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=128,
    num_experts=5,
    num_local_experts=5,
    n_routed_experts=5,
    moe_num_experts=5,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    moe_top_k=2,
    top_k_experts=2,
    n_shared_experts=1,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    expert_ffn_hidden_size=32,
    ffn_hidden_size=96,
    zero_expert_num=2,
    moe_num_shared_experts=1,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    moe_layer_start_index=1,
    moe_layer_end_index=3,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    mamba_n_heads=4,
    mamba_d_head=32,
    mamba_d_state=16,
    mamba_n_groups=1,
    mamba_dt_rank=8,
    use_mamba_kernels=False,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=8,
    global_head_dim=16,
    num_global_key_value_heads=2,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=256,
    num_kv_shared_layers=0,
    enable_moe_block=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sliding_window=16,
    moe_layer_frequency=1,
    o_lora_rank=16,
    o_groups=2,
    max_window_layers=2,
    kv_channels=16,
)
# Model types with fused experts and a causal language model of their own.
MIXTURES = [
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
    "solar_open",
    "zaya",
]
HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"] * 2)
# What the sizes alone do not say of a family.
MORE = {
    "nemotron_h": dict(layers_block_type=["mamba", "moe", "attention", "moe"]),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "qwen3_next": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "gpt_oss": SLIDING,
    "gemma4_text": SLIDING,
    "gemma4_unified_text": SLIDING,
    "exaone_moe": SLIDING,
    "qwen4_exp_text": dict(
        **HYBRID,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
        ngram_vocab_size_base=64,
        split_ngram_parts=2,
        hc_lowrank=8,
    ),
    "longcat_flash": dict(num_layers=2, head_dim=8, qk_head_dim=16),
    "zaya": dict(num_experts_per_tok=1),
}


PER_LAYER = dict(
    **SLIDING,
    num_kv_shared_layers=0,
    enable_moe_block=False,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=300,
    global_head_dim=32,
    vocab_size=300,
)
INDEXED = dict(
    mlp_layer_types=["dense"] * 4,
    indexer_types=["full", "shared"] * 2,
    index_topk=8,
    index_head_dim=16,
    index_n_heads=2,
    vocab_size=300,
)
COMPRESSED = dict(
    layer_types=[
        "sliding_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "sliding_attention",
    ],
    mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    moe_intermediate_size=48,
    head_dim=32,
    num_key_value_heads=1,
    partial_rotary_factor=0.25,
    o_groups=2,
    o_lora_rank=32,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=2,
    hc_mult=3,
    vocab_size=300,
)
ALTERNATING = dict(
    **SLIDING,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=300,
    altup_num_inputs=3,
    laurel_rank=16,
    activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    intermediate_size=[96] * 4,
    vocab_size=300,
)
# Models whose blocks are given more than the hidden state: model type, and what makes it one.
BESIDE = {
    "gemma4 with per-layer inputs": ("gemma4_text", PER_LAYER),
    "gemma4 with shared keys": ("gemma4_text", dict(PER_LAYER, num_kv_shared_layers=2)),
    "glm_moe_dsa with shared indices": ("glm_moe_dsa", INDEXED),
    "hy_v4": (
        "hy_v4",
        dict(
            INDEXED,
            hc_mult=3,
            moe_intermediate_size=48,
            mlp_layer_types=["dense", "dense", "dense", "sparse"],
        ),
    ),
    "deepseek_v4": ("deepseek_v4", COMPRESSED),
    "gemma3n": ("gemma3n_text", ALTERNATING),
}


def config_of(family, **more):
    """A tiny config of a model type, or of a name in `BESIDE`."""
    family, own = BESIDE.get(family, (family, {}))
    return _config_of(family, **{**own, **more})


def _config_of(family, **more):
    kind = T.CONFIG_MAPPING[family]
    known = vars(kind())
    known = {**known, **{k: known[v] for k, v in kind.attribute_map.items() if v in known}}
    wanted = {k: v for k, v in SIZES.items() if k in known}
    if "kv_lora_rank" in wanted:  # latent attention has its own head sizes, and no groups
        wanted.pop("head_dim", None)
        wanted["num_key_value_heads"] = 4
    return kind(**{**wanted, **MORE.get(family, {}), **more})


# Tiny towers of wrappers.
TOWER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    depth=2,
    num_layers=2,
    num_attention_heads=2,
    num_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=16,
    image_size=28,
    patch_size=14,
    out_hidden_size=64,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
    vision_output_dim=64,
    projector_input_dim=64,
    projector_output_dim=64,
)


def wrapper_of(family, text):
    """A tiny config of a wrapper whose text model is of another model type."""
    kind = T.CONFIG_MAPPING[family]
    plain = kind()
    tower = (
        T.CONFIG_MAPPING[f"{family}_vision"]
        if plain.vision_config is None
        else type(plain.vision_config)
    )
    known = vars(tower())
    towers = tower(**{k: v for k, v in TOWER.items() if k in known})
    config = kind(text_config=config_of(text), vision_config=towers)
    auto = T.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    config.architectures = [auto[kind].__name__]
    return config


def model_of(config, auto=T.AutoModelForCausalLM):
    """A model with random numbers in float64, attention and experts eager."""
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager")
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
        for b in model.buffers():
            if b.is_floating_point() and b.dtype == torch.float64 and not b.any():
                b.normal_(0, 0.2)
    return model
