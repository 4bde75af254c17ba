"""Peak memory of commands against depth: resident bytes of each, processes that it starts included.

    python benchmarks/depth.py [OUT.json] [--hidden N] [--depths 4,8,16,32]

Random Llamas in bfloat16 with the embedded model's tokenizer, quantized to W4A16g64 by rtn. What is
loaded whole by default is loaded block by block (`--load blocks`) beside. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import json, resource, subprocess, sys, time
start = time.time()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
assert done.returncode == 0, done.stdout + done.stderr
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": time.time() - start}))
"""


def model(folder: Path, depth: int, hidden: int) -> None:
    import torch
    import transformers as T

    from lowbit.demo import demo_model

    tokenizer = T.AutoTokenizer.from_pretrained(demo_model())
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    T.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)


def measured(*command: str | Path) -> dict[str, float]:
    words = [sys.executable, "-m", "lowbit", *map(str, command)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def of(depth: int, hidden: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "m"), Path(scratch, "a")
        code = f"import depth; from pathlib import Path; depth.model(Path({str(source)!r}), {depth}, {hidden})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        text = ("--text", "stdlib", "--length", "256", "--windows", "8", "--reference", source)
        found = {
            "quantize": measured(
                *("quantize", source, "--scheme", "W4A16g64", "--recipe", "rtn", "-o", out),
                *("--samples", "8", "--length", "256"),
            )
        }
        report = json.loads((out / "report.json").read_text())
        peak = max(b["peak_memory"] for b in report["blocks"])
        found["quantize, up to the last block"] = {"peak": peak, "seconds": 0.0}
        for way in ("whole", "blocks"):
            found[f"verify, {way}"] = measured("verify", out, "--load", way)
            found[f"eval, {way}"] = measured("eval", out, *text, "--load", way)
        for target in ("gptq_v2", "gguf"):
            found[f"export to {target}"] = measured(
                *("export", out, "-o", Path(scratch, target), "--to", target),
            )
        for way in ("whole", "blocks"):
            made = Path(scratch, "gguf")
            found[f"verify of the GGUF, {way}"] = measured("verify", made, "--load", way)
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--depths", default="4,8,16,32")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    depths = [int(d) for d in given.depths.split(",")]
    found = {depth: of(depth, given.hidden) for depth in depths}
    print("| MiB of | " + " | ".join(f"{d} blocks" for d in depths) + " |")
    print("|---" * (len(depths) + 1) + "|")
    for what in found[depths[0]]:
        row = " | ".join(f"{found[d][what]['peak'] / 2**20:.0f}" for d in depths)
        print(f"| {what} | {row} |")
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
