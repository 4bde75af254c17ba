"""Everything that has waited for a GPU, in one command and at most eight minutes of an H100.

    python benchmarks/gpu.py OUT.json [--rehearse] [--only step,runs] [--seconds 480]

What the machine sustains; whether every kernel and every way on the device agrees with the plain
one; a rounding step part by part and its ratio to a training step; hardening; GPTQ and CLAQ by the
column; whole runs of two layers of Llama-3-8B's shape with their peak memory beside the planned;
whether two runs give the same bits; copies beside work; packed products; tiles. OUT.json is written
after every section. One that fails, or takes longer than it may, leaves the reason there, and the
next one runs: in a process of its own if the device is no longer to be used in this one. Exit code
1 if one failed or something does not agree.

--rehearse runs all of it small on a CPU, in less than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_check import SECTIONS, Section
from gpu_check.bench import Bench


class OutOfTimeError(BaseException):
    """A section has used its seconds up. Nothing in it takes this for a failure of its own."""


def stopped(signum: int, frame: FrameType | None) -> None:
    raise OutOfTimeError("it took longer than it may")


def found(section: Section, b: Bench, left: float) -> dict[str, Any]:
    """What a section found, and why that is not all, if it is not."""
    if section.seconds > left:
        return {"left out": f"{left:.0f} seconds are left, it may take {section.seconds}"}
    out: dict[str, Any] = {}
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, stopped)
    signal.alarm(section.seconds)
    try:
        section.run(b, out)
        b.sync()
    except (Exception, OutOfTimeError):
        out["failed"] = traceback.format_exc()[-4000:]
    finally:
        signal.alarm(0)
    return {**out, "took": time.perf_counter() - start}


def usable(b: Bench) -> bool:
    """Whether the device still answers: after some errors it does not, in this process."""
    try:
        torch.zeros(1, device=b.device).add_(1).item()
        if b.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return True


def failures(value: Any, path: str = "") -> list[str]:
    """Where in what was found something failed or is beyond what it may be."""
    if not isinstance(value, dict):
        return []
    own = [path] if "failed" in value else [f"{path}: {w}" for w in value.get("beyond", ())]
    return own + [f for k, v in value.items() for f in failures(v, f"{path}/{k}".strip("/"))]


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--goes-on", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in given.only.split(","):
        if name not in SECTIONS:
            parser.error(f"no section is called {name!r}: there are {', '.join(SECTIONS)}")
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here: --rehearse tries the script out on the CPU")
    return given


def main() -> int:
    given, start = asked(), time.perf_counter()
    b = Bench(torch.device("cpu" if given.rehearse else "cuda"), given.rehearse)
    result = json.loads(given.out.read_text()) if given.goes_on else {}
    names = given.only.split(",")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        left = given.seconds - (time.perf_counter() - start)
        result[name] = found(SECTIONS[name], b, left)
        given.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
        bad = failures({name: result[name]})
        took = time.perf_counter() - start
        print(f"{name}: {', '.join(bad) or 'done'}, {took:.0f} s", flush=True)
        if not usable(b) and number < len(names):
            left = given.seconds - (time.perf_counter() - start)
            rest = ["--only", ",".join(names[number:]), "--seconds", str(left), "--goes-on"]
            rest += ["--rehearse"] * given.rehearse
            os.execv(sys.executable, [sys.executable, __file__, str(given.out), *rest])
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
