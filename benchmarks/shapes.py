"""Random Llamas of given sizes, for benchmarks whose time and memory do not depend on what the
weights are.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from lowbit.demo import demo_model


def random_llama(
    folder: Path,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int | None = None,
    kv_heads: int | None = None,
    seed: int = 0,
    vocab: int | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """A bfloat16 checkpoint with the embedded model's tokenizer; 128 inputs a head, or 64 below 512
    hidden units.

    Args:
        vocab: words, the embedded model's unless told otherwise. device: where weights are drawn.
    """
    config = transformers.LlamaConfig.from_pretrained(demo_model())
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, hidden, ffn
    config.num_attention_heads = heads or max(1, hidden // (128 if hidden >= 512 else 64))
    config.num_key_value_heads = kv_heads or config.num_attention_heads
    config.head_dim = hidden // config.num_attention_heads
    config.max_position_embeddings = 4096
    config.vocab_size = vocab or config.vocab_size
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.cpu().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_model() / name).read_bytes())
    return folder
