"""Logits and tokens by llama.cpp through llama-cpp-python. Needs nothing else but numpy, so safetensors files are read and written here."""

import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

folder, ids, out, _, _ = sys.argv[1:]
if importlib.util.find_spec("llama_cpp") is None:
    print("llama-cpp-python")
    sys.exit(3)

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402

silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, None)


def read(path):
    """The int64 tensor "ids" of a safetensors file."""
    raw = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + size])["ids"]
    start, stop = entry["data_offsets"]
    return np.frombuffer(raw[8 + size + start : 8 + size + stop], np.int64).reshape(entry["shape"])


def write(path, tensors):
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": {"float32": "F32", "int64": "I64"}[str(t.dtype)], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            f.write(np.ascontiguousarray(t).tobytes())


(file,) = sorted(Path(folder).glob("*.gguf"))
rows = read(ids)
length = rows.shape[1]
threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
model = llama_cpp.Llama(
    str(file), n_ctx=length, n_batch=length, n_ubatch=length, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
)
logits = []
for row in rows:
    model.reset()
    model.eval(row.tolist())
    logits.append(np.array(model.scores[:length], dtype=np.float32))
found = {"logits": np.stack(logits)}
samples = json.loads((Path(folder) / "proof" / "tokens.json").read_text())
for i, text in enumerate(samples):
    found[f"tokens.{i}"] = np.array(model.tokenize(text.encode(), add_bos=True, special=False), dtype=np.int64)
write(out, found)
model.close()
