"""Kill -9 at random moments, the same command again, until enough kills have been survived: are the
final bytes the same?

    python benchmarks/resume.py MODEL TEXT OUT.json [KILLS] [SEED]

Runs the command once undisturbed, then kills it at moments drawn uniformly over its whole duration
(start-up, calibration, blocks, writing, verification alike); a run that gets through is compared
and a fresh one is begun. Prints a line per run.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """Every file but the report, which holds times."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "report.json"
    }


def command(model: str, text: str, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lowbit",
        "quantize",
        model,
        "--scheme",
        "W2A16g32",
        "--recipe",
        "tesseraq",
        "--calib",
        text,
        "--samples",
        "32",
        "--length",
        "128",
        "--set",
        "tesseraq.schedule=exponential-5-10",
        "--set",
        "awq.rows=8",
        "-o",
        str(out),
    ]


def main() -> None:
    model, text, result = sys.argv[1:4]
    wanted, seed = int((sys.argv[4:] or ["20"])[0]), int((sys.argv[5:] or ["0"])[0])
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        start = time.time()
        subprocess.run(
            command(model, text, Path(scratch) / "whole"), check=True, stdout=subprocess.DEVNULL
        )
        duration = time.time() - start
        expected = digests(Path(scratch) / "whole")
        print(f"undisturbed: {duration:.1f} s, {len(expected)} files", flush=True)
        kills, runs, moments = 0, [], []
        while kills < wanted or not runs:
            out, survived = Path(scratch) / f"run{len(runs)}", 0
            while not out.exists():
                process = subprocess.Popen(
                    command(model, text, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
                moment = rng.uniform(0, duration)
                try:
                    code = process.wait(moment if kills < wanted else None)
                    assert code == 0, process.stderr.read().decode() if process.stderr else ""
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills, survived = kills + 1, survived + 1
                    shards = len(list(out.with_name(out.name + ".partial").glob("*.safetensors")))
                    moments.append(
                        {"run": len(runs), "seconds": round(moment, 2), "shards": shards}
                    )
            same = digests(out) == expected
            runs.append({"kills": survived, "same": same})
            print(
                f"run {len(runs)}: {survived} kills, final bytes "
                f"{'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
        print(
            f"{kills} kills, {sum(r['same'] for r in runs)} of {len(runs)} runs ended with the "
            "same bytes"
        )
        Path(result).write_text(
            json.dumps({"seconds": duration, "kills": moments, "runs": runs}, indent=1) + "\n"
        )
    if not all(r["same"] for r in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
