"""A small mixture of experts under every method: KL to the float model on held-out text, with and
without what is done for routers and for experts that few tokens reach; seconds a block beside a
dense block of the same active size.

    python benchmarks/train_moe.py MODEL
    python benchmarks/moe.py MODEL OUT.json [ROWS]

ROWS calibration rows (64) of 128 tokens from the standard library; KL on 32 x 128 held-out tokens.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as T
from tuning import staged, tuned

from lowbit.grid.names import parse_scheme
from lowbit.model.block import Block
from lowbit.model.stream import ModelStream
from lowbit.recipe.presets import load_recipe

LENGTH, HELD_OUT = 128, 32
RECIPES = ("rtn", "awq", "gptq", "tesseraq-fast")
SCHEMES = ("W2A16g64", "W3A16g64", "W4A16g64")


def rows_of(tokenizer: Any, split: str, count: int) -> torch.Tensor:
    from lowbit.model.stdlib import stdlib_files

    text = "\n".join(text for _, text in stdlib_files(split))
    ids = torch.tensor(tokenizer(text).input_ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def measured(
    source: ModelStream, recipe_name: str, scheme: str, ids: torch.Tensor, learned: int
) -> dict[str, Any]:
    recipe = load_recipe(recipe_name, scheme=parse_scheme(scheme))
    model = staged(source, recipe, ids[:learned])
    streams = replace(model.entered(ids), tuned_rows=learned)
    seconds: list[float] = []
    experts: list[list[int]] = []
    mark = time.process_time()

    def show(i: int, block: Block) -> None:
        nonlocal mark
        now = time.process_time()
        seconds.append(now - mark)
        mark = now
        for counts in block.notes.get("tokens_per_expert", {}).values():
            experts.append(counts)

    last = streams
    for after in tuned(model, streams, show):
        last = after
    with torch.no_grad():
        logits = source.readout()
        p = logits(last.x[learned:]).log_softmax(-1)
        q = logits(last.xq[learned:]).log_softmax(-1)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
    return {"kl": kl, "seconds_a_block": sum(seconds) / len(seconds), "experts": experts}


def without_routers(source: ModelStream) -> ModelStream:
    """The same, as if nothing but linears read a norm."""
    kinds = tuple(
        replace(g, sites=tuple(replace(s, beside=()) for s in g.sites))
        for g in source.described.kinds
    )
    source.described = replace(source.described, kinds=kinds)
    return source


def plain_moments(graph: Any, found: Any, everyone: Any) -> dict[str, torch.Tensor]:
    return {n: s.value / max(1, s.tokens) for n, s in found.items()}


def dense(folder: Path) -> Path:
    """A dense model of the same active size, random."""
    config = T.AutoConfig.from_pretrained(folder)
    inner = config.moe_intermediate_size * config.num_experts_per_tok
    like = {k: getattr(config, k) for k in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
    )}  # fmt: skip
    torch.manual_seed(0)
    model = T.Qwen3ForCausalLM(T.Qwen3Config(**like, intermediate_size=inner))
    out = folder.parent / f"{folder.name}-dense"
    model.to(torch.bfloat16).save_pretrained(out)
    T.AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    learned = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    ids = torch.cat(
        [rows_of(tokenizer, "calibration", learned), rows_of(tokenizer, "eval", HELD_OUT)]
    )
    found: list[dict[str, Any]] = []

    def add(what: str, scheme: str, recipe: str, source: ModelStream) -> None:
        said = measured(source, recipe, scheme, ids, learned)
        found.append({"what": what, "scheme": scheme, "recipe": recipe, **said})
        took = f"{said['seconds_a_block']:.2f}"
        print(f"| {what} | {scheme} | {recipe} | {said['kl']:.4f} | {took} |", flush=True)

    print("| what | scheme | recipe | KL | processor seconds a block |")
    for scheme in SCHEMES:
        for recipe in RECIPES:
            add("as it is", scheme, recipe, ModelStream(folder))
        add("router not compensated", scheme, "awq", without_routers(ModelStream(folder)))
        with mock.patch("lowbit.methods._hessian.second_moments", plain_moments):
            add("no prior for rare experts", scheme, "gptq", ModelStream(folder))
    alike = dense(folder)
    for recipe in RECIPES:
        add("dense, random", SCHEMES[0], recipe, ModelStream(alike))
    out.write_text(json.dumps(found, indent=1))
    counts = found[0]["experts"]
    print("tokens per expert:", *(f"block {i}: {c}" for i, c in enumerate(counts)), sep="\n  ")


if __name__ == "__main__":
    main()
