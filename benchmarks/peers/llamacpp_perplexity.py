"""Perplexity of GGUF files by llama.cpp itself, and its greedy continuation of a prompt. Run it
with an interpreter that has llama-cpp-python.

    python benchmarks/peers/llamacpp_perplexity.py ROWS.json PROMPT FILE.gguf [FILE.gguf ...]

ROWS.json holds {"evaluation": [[ids]]}; every row is scored by itself, as `lowbit.evaluate.Tally`
does.
"""

from __future__ import annotations

import json
import math
import sys

import llama_cpp
import numpy as np


def main() -> None:
    rows_file, prompt, *files = sys.argv[1:]
    rows = json.load(open(rows_file))["evaluation"]
    length = len(rows[0])
    for file in files:
        model = llama_cpp.Llama(
            file, n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False
        )
        total = 0.0
        for row in rows:
            model.reset()
            model.eval(row)
            logits = np.array(model.scores[: length - 1], dtype=np.float64)
            logits -= logits.max(-1, keepdims=True)
            total -= (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
                np.arange(length - 1), row[1:]
            ].sum()
        told = llama_cpp.Llama(file, n_ctx=length, verbose=False)(
            prompt, max_tokens=24, temperature=0
        )["choices"][0]["text"]
        print(f"{file}: {math.exp(total / (len(rows) * (length - 1))):.4f} {told!r}", flush=True)


if __name__ == "__main__":
    main()
