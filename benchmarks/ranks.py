"""Several ranks against one: the same command alone and under torchrun with processes that share
the work.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py MODEL TEXT OUT.json [--ranks 1,2,4] [--scheme W2A16g32]
    [--samples 128] [--length 256] [--windows 200] [--recipes gptq tesseraq,tesseraq.iters=6]

A recipe may carry settings. Prints two Markdown tables: the share of codes that differ from those
of one rank, perplexity and KL to the float model (on WINDOWS windows of the text) and seconds of
the blocks; and processor seconds by part (`parts.py`) of one rank, the mean and the most over
ranks. Every process gets the threads that OMP_NUM_THREADS says. On fewer cores than ranks, seconds
of the clock say nothing; processor seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from parts import PARTS

from lowbit.artifact.files import read_shard, unpack_linear
from lowbit.grid.names import parse_scheme
from lowbit.recipe.presets import load_recipe

# Torchrun sets 1 itself: the same for one rank.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def run_with(ranks: int, model: str, scheme: str, recipe: str, out: Path, *rows: str) -> list[Any]:
    """Seconds by part of each rank; the artifact is in ``out``.

    Args:
        rows: text, samples, length.
    """
    found = out.with_suffix(".parts")
    launcher = [] if ranks == 1 else [*TORCHRUN, str(ranks)]
    worker = Path(__file__).with_name("parts.py")
    command = [sys.executable, *launcher, worker, found, model, scheme, recipe, out, *rows]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-2000:])
    return [json.loads(Path(f"{found}.{r}").read_text()) for r in range(ranks)]


def judged(model: str, out: Path, text: str, length: str, windows: str) -> dict[str, Any]:
    """Perplexity and KL of an artifact."""
    scores = out.with_suffix(".json")
    measure = ["eval", out, "--text", text, "--length", length, "--windows", windows]
    command = [sys.executable, "-m", "lowbit", *measure, "--reference", model, "--json", scores]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    found = json.loads(scores.read_text())
    return {k: found[k] for k in ("perplexity", "kl")}


def codes(out: Path, scheme: str, recipe: str) -> dict[str, torch.Tensor]:
    """Codes of every linear of an artifact."""
    name, *settings = recipe.split(",")
    chosen = load_recipe(name, scheme=parse_scheme(scheme), settings=settings)
    report = json.loads((out / "report.json").read_text())
    held: dict[str, torch.Tensor] = {}
    for shard in report["shards"]:
        held |= read_shard(out / shard)
    linears = [e["name"] for e in report["linears"] if "skipped" not in e]
    return {
        n: unpack_linear(held, n, chosen.grid_of(n), torch.device("cpu")).codes for n in linears
    }


def compared(given: argparse.Namespace, recipe: str) -> list[dict[str, Any]]:
    """A recipe with every number of ranks, the first number's codes as the reference."""
    rows: list[dict[str, Any]] = []
    first: dict[str, torch.Tensor] = {}
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            calibration = (given.text, given.samples, given.length)
            parts = run_with(ranks, given.model, given.scheme, recipe, out, *calibration)
            own = codes(out, given.scheme, recipe)
            first = first or own
            differ = sum(int((own[n] != q).sum()) for n, q in first.items())
            rows.append(
                {
                    "recipe": recipe,
                    "ranks": ranks,
                    "differing": differ / sum(q.numel() for q in first.values()),
                    **judged(given.model, out, given.text, given.length, given.windows),
                    "seconds_blocks": parts[0]["blocks"][1],
                    "parts": parts,
                }
            )
    return rows


def by_part(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of processor seconds: mean, and most of any rank."""
    lines = []
    for part in (*PARTS, "the rest", "all"):
        cells = []
        for row in rows:
            of = [found[part][0] for found in row["parts"]]
            mean = f"{sum(of) / len(of):.2f}"
            cells.append(mean if len(of) == 1 else f"{mean} ({max(of):.2f})")
        if any(c[:4] != "0.00" for c in cells):
            lines.append(f"| {rows[0]['recipe']} | {part} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", default="W2A16g32")
    parser.add_argument("--ranks", type=lambda v: list(map(int, v.split(","))), default=[1, 2, 4])
    for option, default in (("samples", "128"), ("length", "256"), ("windows", "200")):
        parser.add_argument(f"--{option}", default=default)
    parser.add_argument("--recipes", nargs="+", default=["gptq", "tesseraq"])
    given = parser.parse_args()
    found, second = [], []
    print("| recipe | ranks | codes that differ | perplexity | KL | seconds of blocks |")
    print("|---|---|---|---|---|---|")
    for recipe in given.recipes:
        rows = compared(given, recipe)
        found += rows
        second += by_part(rows)
        for r in rows:
            print(
                f"| {recipe} | {r['ranks']} | {r['differing']:.3%} | {r['perplexity']:.4f} | "
                f"{r['kl']:.5f} | {r['seconds_blocks']:.1f} |",
                flush=True,
            )
    counts = " | ".join(f"{n} ranks" for n in given.ranks)
    print(f"\n| recipe | part | {counts} |\n{'|---' * (2 + len(given.ranks))}|")
    print("\n".join(second))
    about = {
        "model": given.model,
        "text": given.text,
        "scheme": given.scheme,
        "cores": os.cpu_count(),
    }
    about |= {k: getattr(given, k) for k in ("samples", "length", "windows")}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    threads = ENVIRONMENT["OMP_NUM_THREADS"]
    given.out.write_text(json.dumps({**about, "threads": threads, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
