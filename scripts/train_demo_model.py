#!/usr/bin/env python3
"""Train the embedded demo model: a small Llama on the sources of the Python standard library.

    python scripts/train_demo_model.py --minutes 60 --out src/lowbit/demo_model

The learning rate follows wall time, so a run always ends fully decayed, whatever the machine's
speed. The held-out files of `lowbit.model.stdlib` are never read. Writes config.json,
model.safetensors (bf16), tokenizer.json and train.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit.model.stdlib import stdlib_files

LENGTH = 512


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(texts, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=60)
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--hidden", type=int, default=256)
    ap.add_argument("--ffn", type=int, default=768)
    ap.add_argument("--vocab", type=int, default=4096)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument(
        "--bench", type=int, default=0, help="stop after this many steps, write nothing"
    )
    args = ap.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    own = [text for _, text in stdlib_files("train")]
    extra = [text for name, text in stdlib_files("train", with_tests=True) if "test" in name]
    tokenizer = train_tokenizer(own, args.vocab)
    # Tests are half of the library's text but a tenth of its style: once per epoch, the rest twice.
    ids = torch.tensor(
        [i for t in (*own, *own, *extra) for i in tokenizer(t)["input_ids"]], dtype=torch.int64
    )
    print(
        f"{len(own)}+{len(extra)} files, {len(ids) / 1e6:.2f}M tokens in the mixed stream",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    # A third faster per step on a CPU, for half a minute of compilation.
    compiled = torch.compile(model)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    generator = torch.Generator().manual_seed(0)
    window = torch.arange(LENGTH + 1)
    start = last = time.time()
    step, smooth = 0, 0.0
    while True:
        progress = (time.time() - start) / (args.minutes * 60)
        if progress >= 1 or (args.bench and step >= args.bench):
            break
        # Warm up, hold, then decay linearly to zero over the last 45 % of the time.
        lr = args.lr * min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.45)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
        at = torch.randint(len(ids) - LENGTH - 1, (args.batch, 1), generator=generator)
        x = ids[at + window]
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(input_ids=x[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if time.time() - last > 30 or step in (1, 10):
            last = time.time()
            rate = step * args.batch * LENGTH / (last - start)
            print(
                f"step {step} {last - start:.0f}s lr {lr:.1e} loss {loss.item():.3f} mean "
                f"{smooth:.3f} {rate:.0f} tok/s",
                flush=True,
            )
    if args.bench:
        return

    model.eval()
    held = torch.tensor([i for _, t in stdlib_files("eval") for i in tokenizer(t)["input_ids"]])
    rows = held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH)[:200]
    with torch.no_grad():
        nll = sum(
            torch.nn.functional.cross_entropy(
                model(input_ids=r[None]).logits[0, :-1], r[1:], reduction="sum"
            ).item()
            for r in rows
        )
    ppl = math.exp(nll / (len(rows) * (LENGTH - 1)))
    print(f"DONE {step} steps, held-out perplexity {ppl:.3f} on {len(rows)} x {LENGTH}", flush=True)
    tmp = args.out.with_name(args.out.name + ".tmp")
    model.to(torch.bfloat16).save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    record = {
        "script": "scripts/train_demo_model.py",
        "steps": step,
        "tokens_seen": step * args.batch * LENGTH,
        "minutes": args.minutes,
        "heldout_perplexity": ppl,
        "heldout_windows": [len(rows), LENGTH],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": "Python standard library sources (train split of lowbit.model.stdlib)",
    }
    (tmp / "train.json").write_text(json.dumps(record, indent=1) + "\n")
    os.replace(tmp, args.out)


if __name__ == "__main__":
    main()
