"""How `lowbit.quantize` grows: seconds and peak memory against depth, width, calibration rows and their length.

    python benchmarks/growth.py [depth width samples length] [--recipes tesseraq,gptq] [--most N]

Each run has a process of its own, one thread, and a random Llama with the embedded model's tokenizer. One axis varies, the others stay
at 4 layers, hidden 256, 32 rows of 128 tokens. TesseraQ is shortened to 10 steps a block: more of them take time, not memory. An
exponent is the slope of log(y - constant) over log(x), y of a run as small as can be being the constant (hidden 64, one layer,
16 rows of 32 tokens: start-up, libraries, the closing check). Prints a Markdown table, writes bench-out/growth.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

AXES = {
    "depth": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "samples": (16, 32, 64, 128),
    "length": (64, 128, 256, 512),
}
USUAL = {"depth": 4, "width": 256, "samples": 32, "length": 128}
LEAST = {"depth": 1, "width": 64, "samples": 16, "length": 32}
RECIPES = {
    "tesseraq": (
        "W2A16g64",
        [
            "tesseraq.schedule=exponential-5-5",
            "tesseraq.iters=2",
            "awq.exponents=2",
            "awq.shrinks=2",
        ],
    ),
    "gptq": ("W4A16g64", []),
}
MEASURES = ("seconds", "block_seconds", "peak_bytes")

MODEL = """
import json, sys
from pathlib import Path
from shapes import random_llama
given, source = json.loads(sys.argv[1]), Path(sys.argv[2])
h = given["width"]
random_llama(source, h, 3 * h, given["depth"], heads=h // 64, kv_heads=max(1, h // 256))
# A text no larger than it need be: to read all sources of the standard library takes more memory than a small block.
texts = (p.read_text(errors="replace") for p in sorted(Path(json.__file__).parent.parent.glob("*.py")))
(source / "text.txt").write_text("".join(texts)[: 1 << 19])
"""
RUN = """
import json, sys, time, torch, lowbit
from pathlib import Path
from lowbit.machine import peak_memory
from lowbit.plan import make_plan, read_config
from lowbit.recipe.presets import load_recipe
from lowbit.grid.names import parse_scheme
given, source = json.loads(sys.argv[1]), sys.argv[2]
start = time.time()
done = lowbit.quantize(
    source, given["scheme"], given["recipe"], out=Path(source).parent / "out", samples=given["samples"], length=given["length"],
    settings=given["settings"], device="cpu", calib=source + "/text.txt",
)
seconds, blocks = time.time() - start, sum(b["seconds"] for b in done.report["blocks"])
recipe = load_recipe(given["recipe"], scheme=parse_scheme(given["scheme"]), settings=given["settings"])
planned = make_plan(read_config(source), recipe, given["samples"], given["length"]).memory.peak
peak = peak_memory(torch.device("cpu"))
print(json.dumps({"seconds": seconds, "block_seconds": blocks, "peak_bytes": peak, "planned_bytes": planned, "offload": done.report["offload"]}))
"""


def measured(recipe: str, at: dict[str, int]) -> dict:
    """One run: what was asked for and what it took."""
    scheme, settings = RECIPES[recipe]
    given = {**at, "recipe": recipe, "scheme": scheme, "settings": settings}
    own = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            subprocess.run(
                [sys.executable, "-c", code, json.dumps(given), str(Path(folder) / "model")],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for code in (own + MODEL, RUN)
        ]
    if outputs[-1].returncode:
        raise SystemExit(f"{given}: {outputs[0].stderr}\n{outputs[1].stderr}")
    return {**given, **json.loads(outputs[-1].stdout.splitlines()[-1])}


def exponent(x: list[float], y: list[float], constant: float) -> float | None:
    """Least-squares slope of log(y - constant) over log(x); None where less than 2 % of y lies above the constant or there is one point."""
    points = [
        (math.log(a), math.log(b - constant))
        for a, b in zip(x, y, strict=True)
        if b - constant > 0.02 * b
    ]
    if len(points) < 2 or len(points) < len(x):
        return None
    mean_x, mean_y = (sum(v) / len(points) for v in zip(*points, strict=True))
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / sum(
        (a - mean_x) ** 2 for a, _ in points
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "axes", nargs="*", default=list(AXES), help="which to vary: depth, width, samples, length"
    )
    parser.add_argument("--recipes", default="tesseraq,gptq")
    parser.add_argument(
        "--most",
        type=int,
        default=len(AXES["depth"]),
        help="only so many points of each axis, the smallest",
    )
    parser.add_argument("--json", type=Path, default=Path("bench-out/growth.json"))
    given = parser.parse_args()
    if unknown := [a for a in given.axes if a not in AXES]:
        parser.error(f"no such axis: {', '.join(unknown)}")
    runs, fits, seen = [], [], {}

    def run(recipe: str, at: dict[str, int]) -> dict:
        key = (recipe, *at.values())
        if key not in seen:
            seen[key] = measured(recipe, at)
            runs.append(seen[key])
            print(
                f"{recipe} {at}: {seen[key]['seconds']:.1f} s, {seen[key]['peak_bytes'] / 1e6:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
        return seen[key]

    print(
        "| recipe | axis | at | seconds | of blocks | peak MB | planned MB | exponents: seconds, of blocks, memory |\n|"
        + "---|" * 8
    )
    for recipe in given.recipes.split(","):
        least = run(recipe, LEAST)
        print(
            f"| {recipe} | the constant | | {least['seconds']:.1f} | {least['block_seconds']:.1f} | {least['peak_bytes'] / 1e6:.0f} | {least['planned_bytes'] / 1e6:.0f} | |"
        )
        for axis in given.axes:
            values = AXES[axis][: given.most]
            done = [run(recipe, {**USUAL, axis: v}) for v in values]
            found = {m: exponent(list(values), [d[m] for d in done], least[m]) for m in MEASURES}
            fits.append({"recipe": recipe, "axis": axis, **found})
            cells = [
                ", ".join(map(str, values)),
                *(", ".join(f"{d[m]:.1f}" for d in done) for m in MEASURES[:2]),
            ]
            cells += [
                ", ".join(f"{d[m] / 1e6:.0f}" for d in done)
                for m in ("peak_bytes", "planned_bytes")
            ]
            cells += [", ".join("-" if e is None else f"{e:.2f}" for e in found.values())]
            print(f"| {recipe} | {axis} | {' | '.join(cells)} |", flush=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(
        json.dumps({"usual": USUAL, "least": LEAST, "runs": runs, "exponents": fits}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
