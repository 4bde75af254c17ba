"""Polish against a plain training step, and its memory against depth.

    python benchmarks/polish.py OUT.json [--hidden N] [--depths 4,8,16,32] [--length N] [--batch N]

Random Llamas in bfloat16 with the embedded model's tokenizer (FFN of three times the width), W2A16g64
by rtn, polished on stdlib text, in float32 on a CPU. The plain step is that of transformers on the
float model of the same size: forward, the divergence from given logits, backward to all weights
with gradient checkpointing by block, Adam on norms alone; as many rows. Prints a Markdown table and
writes JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ONE = "import polish; polish.one({!r}, {}, {}, {}, {})"


def one(folder: str, depth: int, hidden: int, length: int, batch: int) -> None:
    """Print the figures of one depth as JSON; a process of its own, for its peak."""
    import torch
    import transformers as T

    import lowbit
    from lowbit.stages.polish.passes import Passes

    seconds: list[float] = []
    whole = Passes.descend

    def timed(*given: Any) -> float:
        start = time.perf_counter()
        try:
            return whole(*given)
        finally:
            seconds.append(time.perf_counter() - start)

    Passes.descend = timed  # type: ignore[method-assign]
    steps = 6
    settings = [f"polish.tokens={steps * batch * length}", f"polish.batch={batch}"]
    done = lowbit.quantize(
        *(folder, "W2A16g64", "rtn+polish"),
        out=f"{folder}.out",
        samples=batch,
        length=length,
        settings=[*settings, "polish.checks=1"],
    )
    said = done.report["polish"]
    model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    for name, p in model.named_parameters():
        p.requires_grad_("embed" not in name)
    model.enable_input_require_grads()
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    adam = torch.optim.Adam(norms, 1e-4)
    ids = torch.randint(5, model.config.vocab_size, (batch, length))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
    plain = []
    for _ in range(4):
        start = time.perf_counter()
        found = model(ids, use_cache=False).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
        loss.backward()
        adam.step()
        model.zero_grad()
        plain.append(time.perf_counter() - start)
    figures = {"peak": said["peak_memory"], "step": min(seconds), "plain": min(plain)}
    print(json.dumps({**figures, "kl": [said["kl_before"], said["kl"]]}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--depths", default="4,8,16,32")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    here, found = Path(__file__).parent, {}
    print("| blocks | peak MiB | seconds a step | plain step | ratio |\n|---|---|---|---|---|")
    for depth in map(int, given.depths.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(Path(scratch, "m"))
            make = f"import depth; from pathlib import Path; depth.model(Path({folder!r}), {depth}, {given.hidden})"
            subprocess.run([sys.executable, "-c", make], check=True, cwd=here, capture_output=True)
            code = ONE.format(folder, depth, given.hidden, given.length, given.batch)
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            own = found[depth] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {depth} | {own['peak'] / 2**20:.0f} | {own['step']:.2f} | {own['plain']:.2f} | "
            f"{own['step'] / own['plain']:.2f} |",
            flush=True,
        )
    Path(given.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
