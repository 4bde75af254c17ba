"""Peak resident memory of `lowbit quantize` for the same width at 4, 8, 16 and 32 layers, each in a process of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import sys, lowbit
from pathlib import Path
peak = []
out = Path(sys.argv[1]).parent / "out"
brief = ["tesseraq.schedule=exponential-5-2", "tesseraq.iters=2", "awq.exponents=2", "awq.shrinks=2"]  # more steps: time, not memory
lowbit.quantize(
    sys.argv[1], "W2A16g64", "tesseraq", out=out, samples=8, length=64, settings=brief, progress=lambda b: peak.append(b.record["peak_memory"])
)
print(peak[-1])
"""


def main() -> None:
    import torch
    import transformers

    from lowbit.demo import demo_model

    rows = []
    for layers in [int(n) for n in sys.argv[1:]] or (4, 8, 16, 32):
        with tempfile.TemporaryDirectory() as folder:
            config = transformers.LlamaConfig.from_pretrained(demo_model())
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.head_dim = layers, 1024, 2816, 128
            source = Path(folder) / "model"
            transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (source / name).write_bytes((demo_model() / name).read_bytes())
            done = subprocess.run([sys.executable, "-c", CHILD, str(source)], capture_output=True, text=True, check=True)
            rows.append({"layers": layers, "peak_bytes": int(done.stdout.split()[-1])})
            print(f"{layers:3d} layers  {rows[-1]['peak_bytes'] / 1e6:.0f} MB", flush=True)
    Path("bench-out").mkdir(exist_ok=True)
    Path("bench-out/memory.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
