"""GGUF files of one model by one evaluator: llama.cpp's own quantizer, with and without importance
matrix, beside exports of lowbit.

    python benchmarks/peers/llamacpp.py MODEL CALIB.txt ROWS.json TOOLS WORK OUT.json TYPE EXPORT
    [EXPORT ...]

MODEL in 16 bits. CALIB.txt is what llama-imatrix reads, and what the exports were calibrated on.
ROWS.json holds {"evaluation": [[ids]]}. TOOLS has llama-quantize and llama-imatrix. EXPORT is a
folder with one .gguf. Every file is decoded by the gguf package and computed by transformers in
float32. TYPE is Q2_K, Q3_K_S or Q4_K_S. llama.cpp's files keep embeddings and head in 16 bits, as
the exports do; "mixture" is what TYPE gives by itself for the rest, "pure" that type everywhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.evaluate import Tally
from lowbit.export.gguf import tokens
from lowbit.export.gguf.model import Architecture
from lowbit.formats import gguf
from lowbit.formats.ggml import BLOCKS


def run(*command: object) -> float:
    start = time.perf_counter()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]}: {(done.stderr or done.stdout)[-2000:]}")
    return time.perf_counter() - start


def write_whole(model: Path, path: Path) -> None:
    """The float model in a file: llama.cpp's converter knows no tokenizer but those of published
    models.
    """
    config, held = AutoConfig.from_pretrained(model), load_file(model / "model.safetensors")
    architecture, rows = Architecture.of(config), {}
    for full, t in held.items():
        order = architecture.rows(full, len(t))
        rows[architecture.tensor(full)] = (t if order is None else t[order]).to(
            torch.float32 if t.dim() == 1 else torch.bfloat16
        )
    entries = [
        gguf.Entry(n, tuple(t.shape), BLOCKS["F32" if t.dim() == 1 else "BF16"])
        for n, t in rows.items()
    ]
    said = {
        "general.architecture": architecture.name,
        "general.file_type": 32,
        **architecture.metadata,
    }
    with gguf.Writer(
        path, {**said, **tokens.read(model, config.vocab_size).metadata}, entries
    ) as file:
        for name, t in rows.items():
            file.add(name, t.contiguous().view(torch.uint8))


@torch.no_grad()
def measured(
    folder: Path, file: str, rows: torch.Tensor, expected: list[torch.Tensor]
) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tally = Tally()
    for i, row in enumerate(rows):
        tally.add(
            model(row[None], use_cache=False).logits.float(),
            row[None],
            expected[i] if expected else None,
        )
    return tally.result().as_dict()


def main() -> None:
    model, calib, rows_file, tools, work, out, kind, *exports = sys.argv[1:]
    at, bin_ = Path(work), Path(tools)
    at.mkdir(parents=True, exist_ok=True)
    whole = at / "model-bf16.gguf"
    if not whole.is_file():
        write_whole(Path(model), whole)
    matrix = at / "imatrix.gguf"
    seconds = (
        0.0
        if matrix.is_file()
        else run(
            bin_ / "llama-imatrix",
            "-m",
            whole,
            "-f",
            calib,
            "-o",
            matrix,
            "-t",
            1,
            "-c",
            256,
            "-ngl",
            0,
        )
    )
    rows = torch.tensor(json.load(open(rows_file))["evaluation"])
    with torch.no_grad():
        float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        expected = [float_model(row[None], use_cache=False).logits for row in rows]
    files: list[tuple[str, Path, float | None]] = [("float", whole, None)]
    kept = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
    for name, options in (
        ("llama.cpp pure", ("--pure",)),
        ("llama.cpp pure, imatrix", ("--pure", "--imatrix", matrix)),
        ("llama.cpp mixture", ()),
        ("llama.cpp mixture, imatrix", ("--imatrix", matrix)),
    ):
        file = at / (name.replace(" ", "-").replace(",", "") + ".gguf")
        taken = run(bin_ / "llama-quantize", *options, *kept, whole, file, kind, 1)
        files.append((name, file, taken + (seconds if "imatrix" in name else 0.0)))
    for folder in map(Path, exports):
        (file,) = folder.glob("*.gguf")
        files.append(
            (
                f"lowbit {folder.name}",
                file,
                json.loads((folder / "report.json").read_text()).get("seconds"),
            )
        )
    results = []
    print(f"{'file':40} {'bytes':>10} {'perplexity':>11} {'KL':>9} {'top-1':>7} {'seconds':>8}")
    for name, file, taken in files:
        r = {
            "name": name,
            "bytes": file.stat().st_size,
            "seconds": taken,
            **measured(file.parent, file.name, rows, expected),
        }
        results.append(r)
        shown = "" if taken is None else f"{taken:8.1f}"
        print(
            f"{name:40} {r['bytes']:10} {r['perplexity']:11.4f} {r['kl']:9.5f} {r['top1']:7.4f} "
            f"{shown}",
            flush=True,
        )
    Path(out).write_text(
        json.dumps(
            {"model": model, "type": kind, "rows": list(rows.shape), "results": results}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
