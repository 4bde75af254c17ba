"""Processor seconds of a TesseraQ step on one block of a mixture: experts one by one against all at once.

    python benchmarks/experts_step.py [EXPERTS [STEPS [HIDDEN [INNER]]]]

A random qwen3_moe block on W4A16g32: hidden 256, 64 experts of inner 96, four of them a token, 4
rows of 128 tokens a step. Both ways take turns in one process; the medians are printed.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers as T
from tuning import first_block, staged

from lowbit.grid.names import parse_scheme
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._rounding import Adam
from lowbit.methods._soft import SoftBlock
from lowbit.model.block import Block
from lowbit.model.stream import ModelStream
from lowbit.recipe.presets import load_recipe

LENGTH, ROWS, BATCH = 128, 16, 4


def block_of(folder: Path, experts: int, hidden: int, inner: int) -> Block:
    config = T.Qwen3MoeConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4,
        moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=min(4, experts),
        max_position_embeddings=LENGTH, decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    T.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    source = ModelStream(folder, compute=torch.float32)
    ids = torch.randint(0, 256, (ROWS, LENGTH))
    recipe = load_recipe("rtn", scheme=parse_scheme("W4A16g32"))
    return first_block(source, recipe, staged(source, recipe, ids).entered(ids), LENGTH)


def main() -> None:
    experts, steps, hidden, inner = (
        int(sys.argv[i]) if len(sys.argv) > i else default
        for i, default in enumerate((64, 20, 256, 96), 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        block = block_of(Path(folder), experts, hidden, inner)
        soft, job = SoftBlock(block), Reconstruction(block, BATCH)
        soft.start()
        adam = Adam(1e-2)
        parts = ("weights", "gradients", "descend", "harden")
        found: dict[tuple[str, str], list[float]] = {}
        for step in range(2 * steps):
            way = ("loop", "grouped")[step % 2]
            os.environ["LOWBIT_EXPERTS"] = way
            adam = adam.next()
            marks = [time.process_time()]
            with torch.no_grad():
                weights = soft.weights()
            marks.append(time.process_time())
            _, gradients = job.gradients(weights, soft.keys, job.draw())
            marks.append(time.process_time())
            soft.descend(gradients, adam, 1e-4)
            marks.append(time.process_time())
            soft.harden(0.9)
            marks.append(time.process_time())
            for part, start, end in zip(parts, marks[:-1], marks[1:], strict=True):
                found.setdefault((way, part), []).append(end - start)
    print(f"{experts} experts, hidden {hidden}, inner {inner}, {torch.get_num_threads()} threads")
    for way in ("loop", "grouped"):
        spent = {part: statistics.median(found[way, part][1:]) for part in parts}
        said = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in spent.items())
        print(f"{way}: {said} ms; a step {1e3 * sum(list(spent.values())[:3]):.1f} ms")


if __name__ == "__main__":
    main()
