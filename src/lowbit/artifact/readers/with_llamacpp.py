"""Logits and tokens by llama.cpp through llama-cpp-python. Needs nothing else but numpy."""

import json
import os

from exchange import run


def read(folder, given, arguments):
    import llama_cpp
    import numpy as np

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    (file,) = sorted(folder.glob("*.gguf"))
    rows, last = given["ids"], int(arguments[2])
    length = rows.shape[1]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    model = llama_cpp.Llama(
        str(file),
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    logits = []
    for row in rows:
        model.reset()
        model.eval(row.tolist())
        logits.append(np.array(model.scores[length - last : length], dtype=np.float32))
    found = {"logits": np.stack(logits)}
    samples = json.loads((folder / "proof" / "tokens.json").read_text())
    for i, text in enumerate(samples):
        found[f"tokens.{i}"] = np.array(
            model.tokenize(text.encode(), add_bos=True, special=False), dtype=np.int64
        )
    model.close()
    return found


run(("llama_cpp",), read)
