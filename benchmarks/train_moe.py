"""Train a small mixture of experts on this Python's standard library, for benchmarks/moe.py.

    python benchmarks/train_moe.py FOLDER [STEPS]

A Qwen3-MoE of 8 experts, 2 active, on the embedded model's tokenizer. Deterministic on one machine.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers as T

import lowbit
from lowbit.model.stdlib import stdlib_files

DEMO = Path(lowbit.__file__).parent / "demo_model"
ROWS, LENGTH, RATE = 16, 128, 3e-3


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 600
    tokenizer = T.AutoTokenizer.from_pretrained(DEMO)
    config = T.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=1e-2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = T.Qwen3MoeForCausalLM(config)
    text = "\n".join(text for _, text in stdlib_files("calibration"))
    ids = torch.tensor(tokenizer(text).input_ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    generator, started, loss = torch.Generator().manual_seed(0), time.time(), 0.0
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (ROWS,), generator=generator)]
        out = model(input_ids=batch, labels=batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = 0.95 * loss + 0.05 * float(out.loss.detach()) if step else float(out.loss.detach())
        if step % 50 == 49:
            print(f"step {step + 1} loss {loss:.3f} {time.time() - started:.0f} s", flush=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {"steps": steps, "rows": ROWS, "length": LENGTH, "rate": RATE, "loss": loss}
    (folder / "train.json").write_text(json.dumps(said, indent=1))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, loss {loss:.3f}")


if __name__ == "__main__":
    main()
