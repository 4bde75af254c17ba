"""Two ranks against one: the same command twice, alone and under torchrun with two processes that
share the calibration rows.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py MODEL TEXT OUT.json [SAMPLES] [LENGTH] [WINDOWS]
    [RECIPE ...]

RECIPE may carry settings: tesseraq,tesseraq.iters=6. Default: gptq tesseraq. Prints a Markdown
table: the share of codes that differ, perplexity and KL to the float model of both (on WINDOWS
windows of the text), and seconds: of the blocks, and of the whole run with its verification. Every
process gets the threads that OMP_NUM_THREADS says, so two ranks are two cores; a GPU each with
CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lowbit.artifact.files import read_shard, unpack_linear
from lowbit.grid.names import parse_scheme
from lowbit.recipe.presets import load_recipe

SCHEME = "W2A16g32"


def launched(ranks: int) -> list[str]:
    alone = [sys.executable, "-m", "lowbit"]
    return (
        alone
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            "-m",
            "lowbit",
        ]
    )


def made(
    model: str,
    text: str,
    out: Path,
    ranks: int,
    recipe: str,
    samples: int,
    length: int,
    windows: int,
) -> dict[str, Any]:
    name, *settings = recipe.split(",")
    options = [x for s in settings for x in ("--set", s)]
    command = [
        *launched(ranks),
        "quantize",
        model,
        "--scheme",
        SCHEME,
        "--recipe",
        name,
        "--calib",
        text,
        "--samples",
        str(samples),
        "--length",
        str(length),
    ]
    # Torchrun sets 1 itself: the same for one rank.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    subprocess.run(
        [*command, *options, "-o", str(out)], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    scores = out.with_suffix(".json")
    measure = [
        "eval",
        str(out),
        "--text",
        text,
        "--length",
        str(length),
        "--windows",
        str(windows),
        "--reference",
        model,
        "--json",
        str(scores),
    ]
    subprocess.run([*launched(1), *measure], check=True, stdout=subprocess.DEVNULL, env=environment)
    report, found = json.loads((out / "report.json").read_text()), json.loads(scores.read_text())
    return {
        "ranks": report["ranks"],
        "perplexity": found["perplexity"],
        "kl": found["kl"],
        "seconds_blocks": sum(b["seconds"] for b in report["blocks"]),
        "seconds": report["seconds"],
        "device": report["device"],
        "versions": report["versions"],
    }


def codes(out: Path, recipe: str) -> dict[str, torch.Tensor]:
    """Codes of every linear of an artifact."""
    name, *settings = recipe.split(",")
    chosen = load_recipe(name, scheme=parse_scheme(SCHEME), settings=settings)
    report = json.loads((out / "report.json").read_text())
    held: dict[str, torch.Tensor] = {}
    for shard in report["shards"]:
        held |= read_shard(out / shard)
    linears = [e["name"] for e in report["linears"] if "skipped" not in e]
    return {
        n: unpack_linear(held, n, chosen.grid_of(n), torch.device("cpu")).codes for n in linears
    }


def main() -> None:
    model, text, result = sys.argv[1:4]
    given = sys.argv[4:7]
    samples, length, windows = (int(x) for x in [*given, *("128", "256", "200")[len(given) :]])
    recipes = sys.argv[7:] or ["gptq", "tesseraq"]
    rows = []
    print(
        "| recipe | codes that differ | perplexity, 1 rank | 2 ranks | KL, 1 rank | 2 ranks | "
        "seconds of blocks, 1 rank | 2 ranks | whole run, 1 rank | 2 ranks |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as scratch:
            outs = [Path(scratch) / f"{n}-ranks" for n in (1, 2)]
            one, two = (
                made(model, text, out, n, recipe, samples, length, windows)
                for n, out in enumerate(outs, 1)
            )
            a, b = (codes(out, recipe) for out in outs)
            differ = sum(int((a[n] != b[n]).sum()) for n in a) / sum(q.numel() for q in a.values())
        rows.append(
            {
                "recipe": recipe,
                "scheme": SCHEME,
                "samples": samples,
                "length": length,
                "windows": windows,
                "differing": differ,
                "one": one,
                "two": two,
            }
        )
        pairs = (
            ("perplexity", ".4f"),
            ("kl", ".5f"),
            ("seconds_blocks", ".1f"),
            ("seconds", ".1f"),
        )
        print(
            f"| {recipe} | {differ:.3%} | "
            + " | ".join(f"{one[k]:{f}} | {two[k]:{f}}" for k, f in pairs)
            + " |",
            flush=True,
        )
    Path(result).parent.mkdir(parents=True, exist_ok=True)
    Path(result).write_text(
        json.dumps(
            {
                "model": model,
                "text": text,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "cores": os.cpu_count(),
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
