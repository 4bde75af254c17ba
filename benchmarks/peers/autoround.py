"""AutoRound on given rows of tokens; run with the interpreter of an environment that has
auto-round.

    python autoround.py MODEL ROWS.json BITS GROUP ITERS SYM(0|1) AMP(0|1) OUT.json

AMP 1 is its default, steps in bfloat16 where a processor has instructions for it; they can be slower
than float32.

ROWS.json holds {"calibration": [[ids]], "evaluation": [[ids]]}. Tunes in memory, evaluates
perplexity and KL to the float model on the same rows, writes {"perplexity", "kl", "seconds",
"float"}. "seconds" is tuning alone, imports and evaluation apart.
"""

import json
import math
import os
import sys
import time

import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def log_probs(model, rows):
    return torch.cat(
        [
            model(rows[i : i + 8]).logits[:, :-1].float().log_softmax(-1)
            for i in range(0, len(rows), 8)
        ]
    )


def main() -> None:
    model_dir, rows_file, bits, group, iters, sym, amp, out = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows = json.load(open(rows_file))
    evaluation = torch.tensor(rows["evaluation"])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = log_probs(model, evaluation)
    gold = evaluation[:, 1:, None]
    data = [
        {"input_ids": torch.tensor([r]), "attention_mask": torch.ones(1, len(r), dtype=torch.long)}
        for r in rows["calibration"]
    ]
    scheme = QuantizationScheme.from_dict(
        {
            "bits": int(bits),
            "group_size": int(group),
            "sym": sym == "1",
            "data_type": "int",
            "act_bits": 16,
        }
    )
    start, spent = time.time(), time.process_time()
    job = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=data,
        nsamples=len(data),
        seqlen=len(rows["calibration"][0]),
        batch_size=8,
        iters=int(iters),
        device_map="cpu",
        enable_torch_compile=False,
        amp=amp == "1",
        low_gpu_mem_usage=False,
    )
    tuned, _ = job.quantize()
    seconds, spent = time.time() - start, time.process_time() - spent
    found = log_probs(tuned, evaluation)
    result = {
        "perplexity": math.exp(-found.gather(-1, gold).mean().item()),
        "kl": (expected.exp() * (expected - found)).sum(-1).mean().item(),
        "float": math.exp(-expected.gather(-1, gold).mean().item()),
        "seconds": seconds,
        "processor_seconds": spent,
    }
    json.dump(result, open(out, "w"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
