"""For whoever has a GPU: does vLLM compute from an artifact what was tuned, and how fast does it
serve it?

    python benchmarks/serve_vllm.py DIR OUT.json [--quantization humming] [--tensor-parallel-size N]
    [--enforce-eager]

DIR is an artifact in compressed-tensors, or an export: gptq, gptq_v2, awq, or compressed-tensors
for vLLM. Needs vllm (`lowbit plan --target vllm` names the version) and what this library writes
into every artifact, proof/logits.safetensors: tokens with the tuned model's logits. vLLM is asked
for the log-probabilities of those tokens; compared are the likeliest token at every position and
the root mean square difference of the log-probabilities that it returns. Then 32 prompts are
continued by 128 tokens each. Prints a table, writes JSON, and exits with 1 if the models differ. It
has not been run by its authors: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from vllm import LLM, SamplingParams

TOP = 16
WITHIN = 0.2  # nats, root mean square: 16-bit kernels on likely tokens
AGREE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quantization")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enforce-eager", action="store_true")
    a = parser.parse_args()
    proof = load_file(a.folder / "proof" / "logits.safetensors")
    ids, logits = proof["ids"].tolist(), proof["logits"].float().log_softmax(-1)
    positions = logits.shape[1]
    model = LLM(
        str(a.folder),
        quantization=a.quantization,
        tensor_parallel_size=a.tensor_parallel_size,
        enforce_eager=a.enforce_eager,
        max_model_len=len(ids[0]) + 130,
        max_logprobs=TOP,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=TOP)
    squares, count, equal, seen = 0.0, 0, 0, 0
    for row, found in enumerate(model.generate([{"prompt_token_ids": r} for r in ids], asked)):
        # Entry i is the distribution over token i, given the tokens before it: that of logits at
        # position i - 1.
        for i in range(len(ids[row]) - positions + 1, len(ids[row])):
            own, theirs = logits[row, i - 1 - (len(ids[row]) - positions)], found.prompt_logprobs[i]
            best = max(theirs, key=lambda t: theirs[t].logprob)
            equal += int(best == int(own.argmax()))
            seen += 1
            for token, entry in theirs.items():
                squares += (entry.logprob - float(own[token])) ** 2
                count += 1
    rms, agree = math.sqrt(squares / count), equal / seen
    prompts = [{"prompt_token_ids": r[:64]} for r in (ids * 32)[:32]]
    start = time.perf_counter()
    made = model.generate(prompts, SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True))
    rate = sum(len(m.outputs[0].token_ids) for m in made) / (time.perf_counter() - start)
    report = json.loads((a.folder / "report.json").read_text())
    result = {
        "format": report["format"],
        "scheme": report["recipe"]["scheme"],
        "hash": report["hash"],
        "positions": seen,
        "logprob_rms": rms,
        "top1": agree,
        "tokens_per_second": rate,
    }
    a.out.write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result.items():
        print(f"{key:20} {value}")
    if not (rms <= WITHIN and agree >= AGREE):
        sys.exit(
            f"vLLM computes something else than what was tuned: {rms:.3g} nats, {agree:.1%} of the "
            "likeliest tokens equal."
        )


if __name__ == "__main__":
    main()
