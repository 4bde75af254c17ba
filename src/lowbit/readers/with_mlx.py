"""Logits by mlx-lm."""

import importlib.util
import sys

folder, ids, out, _, _ = sys.argv[1:]
missing = [p for p in ("mlx", "mlx_lm") if importlib.util.find_spec(p) is None]
if missing:
    print(", ".join(p.replace("_", "-") for p in missing))
    sys.exit(3)

from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

model, _ = load_model(Path(folder))
rows = mx.load(ids)["ids"]


def passed():
    logits = mx.concatenate([model(row[None]).astype(mx.float32) for row in rows])
    mx.eval(logits)
    return logits


found = {"logits": passed()}
model.update(tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))
found["decoded"] = passed()
mx.save_safetensors(out, found)
