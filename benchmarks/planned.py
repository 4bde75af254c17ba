"""Plans of large models that many people use, from configs written by hand: memory, hours, sizes,
who loads the result. Nothing is downloaded and no weight is made.

    python benchmarks/planned.py [OUT.json] [--scheme W4A16g64sym] [--samples 128] [--length 2048]

Memory is of one process; hours are at the measured speed of the machine that prints them, or of a
device that it has not, whose rates are assumed:

    python benchmarks/planned.py --device cuda --rates 650e12,50e12,2.6e12

(FLOP/s of products in 16 bits and in float32, bytes a second). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T

from lowbit.grid.names import parse_scheme
from lowbit.plan import make_plan
from lowbit.plan.speed import Speed, measure_speed
from lowbit.recipe import load_recipe


def of(kind: str, **sizes: Any) -> Callable[[], Any]:
    return lambda: T.CONFIG_MAPPING[kind](**sizes, dtype="bfloat16")


MODELS = {
    "Qwen3-30B-A3B": of(
        "qwen3_moe",
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
    ),
    "Qwen3.5-35B-A3B": of(
        "qwen3_5_moe_text",
        hidden_size=2048,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=256,
        num_experts_per_tok=8,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        vocab_size=248320,
        max_position_embeddings=262144,
    ),
    "gpt-oss-20b": of(
        "gpt_oss",
        hidden_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=2880,
        num_local_experts=32,
        num_experts_per_tok=4,
        vocab_size=201088,
        max_position_embeddings=131072,
    ),
    "DeepSeek-V3": of(
        "deepseek_v3",
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=3,
        vocab_size=129280,
        max_position_embeddings=163840,
    ),
    "Gemma-4-31B": of(
        "gemma4_text",
        hidden_size=5376,
        num_hidden_layers=60,
        intermediate_size=21504,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=4,
        hidden_size_per_layer_input=0,
        vocab_size=262144,
        max_position_embeddings=262144,
        tie_word_embeddings=True,
    ),
}
RECIPES = ("rtn", "gptq", "tesseraq-fast")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?")
    parser.add_argument("--scheme", default="W4A16g64sym")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rates", type=lambda v: Speed(*map(float, v.split(","))))
    given = parser.parse_args()
    device = torch.device(given.device)
    speed = given.rates or measure_speed(device)
    gib, found = 2.0**30, {}
    print(
        "| model | parameters | 16 bits -> artifact, GiB | bits of all | GiB, hours: "
        + " | ".join(RECIPES)
        + " | closing check by block, GiB | loaded by |"
    )
    print("|---" * (6 + len(RECIPES)) + "|")
    for name, config in MODELS.items():
        plans = []
        for recipe in RECIPES:
            own = load_recipe(recipe, scheme=parse_scheme(given.scheme))
            plans.append(make_plan(config(), own, given.samples, given.length, device=device))
        plan = plans[0]
        takes = [r.runtime for r in plan.runtimes if r.accepts]
        cells = [f"{p.memory.peak / gib:.0f}, {p.seconds(speed) / 3600:.2g}" for p in plans]
        size = f"{plan.original / gib:.0f} -> {plan.artifact / gib:.1f}"
        print(
            f"| {name} | {plan.parameters / 1e9:.1f} B | {size} | {plan.model_bits_per_weight:.2f} "
            f"| {' | '.join(cells)} | {plan.check_memory_by_block / gib:.1f} "
            f"| {', '.join(takes)} |",
            flush=True,
        )
        found[name] = {r: p.as_dict(speed) for r, p in zip(RECIPES, plans, strict=True)}
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
