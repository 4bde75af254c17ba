"""Tiny GGUF files, written as llama.cpp's converter does, by the gguf package alone."""

import json

import gguf as package
import numpy as np
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}


def written(model, tokenizer, path, kind="f16", split=0, change=None, scaling=None, more=()):
    """Write a model as llama.cpp's converter does, by the gguf package alone.

    Args:
        change: edits the tensors. more: entries of the header, without the architecture.
    """
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = package.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_name("tiny")
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    for key, value in (header_of(config, arch) | dict(more)).items():
        add(writer, f"{arch}.{key}", value)
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.get)
    words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if w.startswith("<") else 1 for w in words])
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    tensors = dict(tensors_of(model, arch))
    if change is not None:
        change(tensors)
    for own, array in tensors.items():
        put(writer, own, array, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer, name, array, kind):
    if array.dtype != np.float32 or array.ndim == 1 or kind == "f32":
        writer.add_tensor(name, array)
    else:
        chosen = Type[kind.upper()]
        writer.add_tensor(name, package.quantize(array, chosen), raw_dtype=chosen)


def tensors_of(model, arch):
    config = model.config
    known = {v: k for k, v in package.MODEL_ARCH_NAMES.items()}[arch]
    names = package.get_tensor_name_map(known, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                yield f"blk.{block}.ffn_{part}_exps.weight", np.ascontiguousarray(half)
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("experts.down_proj"):
            own += ".weight"
        if name.endswith("e_score_correction_bias"):
            own = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        yield own, np.ascontiguousarray(as_stored(name, array, config, arch))


def as_stored(name, array, config, arch):
    """A parameter as the converter stores it."""
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    if arch in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return array + 1
    if arch == "nemotron" and name.endswith("layernorm.weight"):
        return array + 1
    if arch == "gpt2" and array.ndim == 2 and ".h." in name:
        return array.T
    if name.endswith("A_log"):
        return -np.exp(array)
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        return array[:, 0]
    return array[0] if name.endswith("shared_expert_gate.weight") else array


def header_of(config, arch):
    """The entries that the converter writes of a model."""
    blocks, hidden = config.num_hidden_layers, config.hidden_size
    out = {"block_count": blocks, "embedding_length": hidden}
    if arch == "mamba":
        same = ("conv_kernel", "state_size", "time_step_rank")
        out |= {f"ssm.{key}": getattr(config, key) for key in same}
        out |= {"ssm.inner_size": config.intermediate_size, "ssm.dt_b_c_rms": False}
        out |= {"context_length": 2**20, "feed_forward_length": 0, "attention.head_count": 0}
        return {**out, "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon}
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    out |= {
        "context_length": getattr(config, "max_position_embeddings", 2048),
        "attention.head_count": heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
    }
    inner = [getattr(config, n, None) for n in ("intermediate_size", "ffn_hidden_size", "n_inner")]
    out["feed_forward_length"] = next(n for n in inner if n)
    named = {f"attention.{key}": value for key, value in named_entries(config, arch).items()}
    rope = getattr(config, "rope_parameters", None) or {}
    if arch not in ("falcon", "stablelm") and "rope_theta" in rope:
        out["rope.freq_base"] = rope["rope_theta"]
    out["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    out |= {k: v for k, v in named.items() if v is not None}
    return out | entries_of_family(config, arch)


def named_entries(config, arch):
    groups = ("num_key_value_heads", "num_kv_heads")
    rms, layer = ("rms_norm_eps",), ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    found = {
        "head_count_kv": groups,
        "layer_norm_rms_epsilon": (*rms, *(("norm_eps",) if arch == "lfm2" else ())),
        "layer_norm_epsilon": (*layer, *(("norm_eps",) if arch == "nemotron" else ())),
    }
    return {
        key: next((v for n in names if (v := getattr(config, n, None)) is not None), None)
        for key, names in found.items()
    }


def entries_of_family(config, arch):
    own = vars(config)
    out = {}
    if arch.startswith("gemma"):
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        out = {key: own[key] for key in caps if own.get(key)}
    if arch in ("gemma2", "gemma3", "phi3"):
        out["attention.sliding_window"] = config.sliding_window or 0
    if arch == "gemma3":
        out["rope.freq_base"] = config.rope_parameters["full_attention"]["rope_theta"]
    if arch == "lfm2":
        full = [kind == "full_attention" for kind in config.layer_types]
        out["attention.head_count_kv"] = [config.num_key_value_heads * kind for kind in full]
        out |= {"shortconv.l_cache": config.conv_L_cache, "vocab_size": config.vocab_size}
    count = own.get("num_experts") or own.get("num_local_experts")
    if count:
        out |= {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
        width = own.get("moe_intermediate_size") or config.intermediate_size
        out["expert_feed_forward_length"] = width
    if arch == "qwen2moe":
        out["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if arch == "minimax-m2":
        out |= {"expert_gating_func": 2, "rope.dimension_count": config.rotary_dim}
    return out


def add(writer, key, value):
    """Write an entry of the header in the type of its value."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
