"""llm-compressor on given rows of tokens; run with the interpreter of an environment that has it
(measured: 0.14.0.1).

    python llmcompressor.py MODEL ROWS.json ALGORITHM WEIGHT_BITS GROUP ACTIVATION_BITS SYM(0|1)
    OUT.json

ALGORITHM is rtn, awq, smoothquant or gptq; GROUP 0 is one scale per output channel; ACTIVATION_BITS
16 leaves activations alone, others are symmetric per token. The model is judged in memory, as the
package quantized it. Writes {"perplexity", "kl", "seconds", "processor_seconds", "float"}; both are
of tuning alone. OMP_NUM_THREADS threads, two without it.
"""

import copy
import json
import math
import os
import sys
import time
from pathlib import Path

# This file is named like the package it runs, and its folder comes first on the path.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

ALPHA = 0.85


@torch.no_grad()
def log_probs(model, rows):
    return torch.cat(
        [
            model(rows[i : i + 8]).logits[:, :-1].float().log_softmax(-1)
            for i in range(0, len(rows), 8)
        ]
    )


def recipe(algorithm, groups):
    plain = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    if algorithm == "rtn":
        return [plain]
    if algorithm == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if algorithm == "smoothquant":
        from llmcompressor.modifiers.transform import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=ALPHA), plain]
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    # Asks for an accelerator that a CPU machine does not have.
    IntermediatesCache.pin_memory = lambda self, *a, **k: None
    return [AWQModifier(), plain]


def main() -> None:
    model_dir, rows_file, algorithm, bits, group, activation, sym, out = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows = json.load(open(rows_file))
    evaluation = torch.tensor(rows["evaluation"])
    gold = evaluation[:, 1:, None]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    expected = log_probs(copy.deepcopy(model), evaluation)
    size = int(group)
    weights = QuantizationArgs(
        num_bits=int(bits),
        type="int",
        symmetric=sym == "1",
        strategy="group" if size else "channel",
        group_size=size or None,
    )
    inputs = None
    if int(activation) < 16:
        inputs = QuantizationArgs(
            num_bits=int(activation), type="int", symmetric=True, strategy="token", dynamic=True
        )
    groups = {
        "group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    }
    calibration = rows["calibration"]
    data = Dataset.from_dict(
        {"input_ids": calibration, "attention_mask": [[1] * len(r) for r in calibration]}
    )
    start, spent = time.time(), time.process_time()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_dir),
        dataset=None if algorithm == "rtn" else data,
        recipe=recipe(algorithm, groups),
        num_calibration_samples=len(calibration),
        max_seq_length=len(calibration[0]),
        batch_size=8,
        shuffle_calibration_samples=False,
        log_dir=None,
    )
    seconds, spent = time.time() - start, time.process_time() - spent
    found = log_probs(model, evaluation)
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
