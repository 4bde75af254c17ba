"""Whole quantizations side by side, one after another in one run: lowbit's recipes and the peers
whose interpreters are given.

    python benchmarks/peers/whole.py MODEL ROWS.json SCHEME OUT.json [--autoround PY]
        [--llmcompressor PY] [--gptqmodel PY] [--recipes a,b,...] [--best-rows ROWS.json]
        [--autoround-float32] [--autoround-iters 200,1000] [--threads N]

ROWS.json is made by benchmarks/make_rows.py; SCHEME is W<bits>A16[g<group>][sym]. Every tool tunes
on the same rows and is judged on the same others by one formula. "seconds" is tuning alone, imports
and evaluation apart. With --best-rows (the same evaluation rows, more calibration rows) the best
settings of both sides also run on those. Prints a Markdown table, writes JSON.
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

from lowbit.grid import Affine
from lowbit.grid.names import parse_scheme

HERE = Path(__file__).parent


def run(command: list[str], out: Path, threads: int) -> dict[str, Any]:
    env = dict(
        os.environ, OMP_NUM_THREADS=str(threads), GPTQMODEL_CPU_WORKERS="2", HF_HUB_OFFLINE="1"
    )
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode or not out.is_file():
        raise SystemExit(
            f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    found = json.loads(out.read_text())
    return found[0] if isinstance(found, list) else found


def main() -> None:
    p = argparse.ArgumentParser()
    for name in ("model", "rows", "scheme", "out"):
        p.add_argument(name)
    for name in ("--autoround", "--llmcompressor", "--gptqmodel", "--best-rows"):
        p.add_argument(name)
    p.add_argument("--recipes", default="gptq,awq,fast,default,best")
    p.add_argument("--autoround-float32", action="store_true")  # where bfloat16 is slow
    p.add_argument("--autoround-iters", default="200,1000")
    p.add_argument("--threads", type=int, default=2)
    a = p.parse_args()
    grid = parse_scheme(a.scheme).weights
    assert isinstance(grid, Affine)
    bits, group, sym = str(grid.bits), str(grid.group_size or 0), str(int(grid.symmetric))
    row = str(grid.group_size or -1)  # as AutoRound and GPTQModel write one scale per row
    jobs: list[tuple[str, str, list[str]]] = []
    for rows in filter(None, (a.rows, a.best_rows)):
        if rows == a.rows:
            if a.gptqmodel:
                jobs.append(
                    (
                        "GPTQModel, gptq, activation order",
                        rows,
                        [
                            a.gptqmodel,
                            str(HERE / "gptqmodel.py"),
                            a.model,
                            rows,
                            bits,
                            row,
                            "1",
                            sym,
                        ],
                    )
                )
            if a.llmcompressor:
                for what in ("gptq", "awq"):
                    command = [
                        a.llmcompressor,
                        str(HERE / "llmcompressor.py"),
                        a.model,
                        rows,
                        what,
                        bits,
                        group,
                        "16",
                        sym,
                    ]
                    jobs.append((f"llm-compressor, {what}", rows, command))
        for recipe in a.recipes.split(","):
            if rows == a.rows or recipe == "best":
                jobs.append(
                    (
                        f"lowbit, {recipe}",
                        rows,
                        [
                            sys.executable,
                            str(HERE.parent / "rows.py"),
                            a.model,
                            rows,
                            a.scheme,
                            "OUT",
                            recipe,
                        ],
                    )
                )
        if a.autoround:
            for iters in a.autoround_iters.split(","):
                name = {"200": "default", "1000": "best"}.get(iters, "other")
                if rows == a.rows or name == "best":
                    command = [
                        a.autoround,
                        str(HERE / "autoround.py"),
                        a.model,
                        rows,
                        bits,
                        row,
                        iters,
                        sym,
                        str(int(not a.autoround_float32)),
                    ]
                    jobs.append((f"AutoRound, {name} ({iters} iterations)", rows, command))
    results = []
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{Path(a.model).name}, {a.scheme}, {a.threads} threads\n\n| tool | rows | seconds | "
        "of processor | perplexity | KL |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, rows, command) in enumerate(jobs):
            out = Path(scratch) / f"{i}.json"
            command = (
                [str(out) if c == "OUT" else c for c in command]
                if "OUT" in command
                else [*command, str(out)]
            )
            found = run(command, out, a.threads)
            count = len(json.loads(Path(rows).read_text())["calibration"])
            results.append(
                {
                    "tool": name,
                    "rows": count,
                    **{k: found[k] for k in ("seconds", "perplexity", "kl", "float")},
                    "processor_seconds": found.get("processor_seconds"),
                }
            )
            print(
                f"| {name} | {count} | {found['seconds']:.1f} | "
                f"{found.get('processor_seconds', float('nan')):.1f} | {found['perplexity']:.4f} | "
                f"{found['kl']:.4f} |",
                flush=True,
            )
            Path(a.out).write_text(
                json.dumps(
                    {
                        "model": Path(a.model).name,
                        "scheme": a.scheme,
                        "threads": a.threads,
                        "results": results,
                    },
                    indent=1,
                )
                + "\n"
            )


if __name__ == "__main__":
    main()
