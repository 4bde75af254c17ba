#!/usr/bin/env python3
"""Compare the artifacts of every preset at a revision with those of this working tree, on tiny
models of three families.

    python scripts/golden.py REVISION [--presets NAME ...] [--families NAME ...]

A change of structure must not move a byte: both sides run at once on this machine, each with its
own sources, on the same models. Prints one line a preset and family. Where a hash differs on
purpose, the line has the KL of both sides. Exit status 1 if a hash differs or a side fails. What a
commit made is kept in bench-out/golden and not made again on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "bench-out" / "golden"
FAMILIES = ("llama-mha", "opt", "gemma")
LIGHTER = {  # by method: the same code in fewer steps
    "tesseraq": ("schedule=exponential-4-4", "iters=4", "batch=2"),
    "omniquant": ("epochs=2",),
}
SCHEME = {"uniform": "W3A16g16", "columns": "W2A16"}  # for presets that name none

Row = dict[str, object]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "revision", nargs="?", default="HEAD", help="what the working tree is compared with"
    )
    parser.add_argument("--presets", nargs="*", default=[], help="by default all of them")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--side", nargs=2, metavar=("MODELS", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return side(Path(args.side[0]), Path(args.side[1]), args.presets)
    commit = git("rev-parse", args.revision)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        models = make_models(work / "models", args.families)
        now = start(ROOT, models, work / "now.json", args.presets)
        kept = KEPT / f"{commit[:12]}-{platform.node()}-{state_of(models)}.json"
        then = read(kept, args) if kept.is_file() else None
        if then is None:
            tree = work / "then"
            git("worktree", "add", "--detach", str(tree), commit)
            try:
                then = finish(
                    start(tree, models, work / "then.json", args.presets), work / "then.json"
                )
            finally:
                git("worktree", "remove", "--force", str(tree))
            KEPT.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(then, indent=1))
        return compare(then, finish(now, work / "now.json"))


def git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_models(folder: Path, families: Sequence[str]) -> Path:
    """Save the tests' tiny models: the same files for both sides."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import save_tiny

    for family in families:
        (folder / family).mkdir(parents=True)
        save_tiny(folder / family, family)
    return folder


def state_of(models: Path) -> str:
    """A hash over the models and over this script, which says what is made of them."""
    files = [Path(__file__), *sorted(p for p in models.rglob("*") if p.is_file())]
    return hashlib.sha256(
        b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)
    ).hexdigest()[:12]


def start(tree: Path, models: Path, out: Path, presets: Sequence[str]) -> subprocess.Popen[bytes]:
    """Run this script's other half on the sources of a tree, on one thread."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--side",
        str(models),
        str(out),
        "--presets",
        *presets,
    ]
    return subprocess.Popen(command, env=environment)


def finish(process: subprocess.Popen[bytes], out: Path) -> dict[str, Row]:
    if process.wait():
        raise SystemExit(f"one side failed with status {process.returncode}")
    found: dict[str, Row] = json.loads(out.read_text())
    return found


def read(kept: Path, args: argparse.Namespace) -> dict[str, Row] | None:
    """What was kept of a commit, if it covers what is asked for."""
    found: dict[str, Row] = json.loads(kept.read_text())
    asked = [f"{p} {f}" for p in args.presets for f in args.families]
    whole = not args.presets and all(any(k.endswith(f" {f}") for k in found) for f in args.families)
    return found if whole or (asked and all(k in found for k in asked)) else None


def side(models: Path, out: Path, presets: Sequence[str]) -> int:
    """Quantize every model by every preset with the library that is on the path."""
    from functools import partial

    import lowbit
    from lowbit.errors import LowbitError

    try:
        from lowbit.artifact.proof import verify
        from lowbit.recipe.presets import load_recipe, recipe_names
        from lowbit.run import closing as job
    except ImportError:  # an older revision
        from lowbit.presets import load_recipe, recipe_names
        from lowbit.proof import verify

        from lowbit import job

    job.verify = partial(verify, loader=False)
    found: dict[str, Row] = {}
    for preset in presets or recipe_names():
        recipe = load_recipe(preset).as_dict()
        settings = [f"{m}.{s}" for m in recipe["methods"] for s in LIGHTER.get(m, ())]
        if "bos" in recipe["calibration"]:  # older revisions know no other rows
            settings.append("calibration.bos=no")
        scheme = (
            None
            if "scheme" in recipe and preset_names_scheme(preset)
            else SCHEME["columns" if recipe.get("codebook") else "uniform"]
        )
        for model in sorted(models.iterdir()):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    done = lowbit.quantize(
                        str(model),
                        scheme,
                        preset,
                        out=Path(scratch) / "out",
                        calib=str(model / "text.txt"),
                        samples=8,
                        length=32,
                        settings=settings,
                    )
                    losses = [b["loss_after"] for b in done.report["blocks"]]
                    row: Row = {
                        "hash": done.report["hash"],
                        "losses": losses,
                        "kl": done.report["quality"]["quantized"]["kl"],
                    }
                except LowbitError as e:
                    row = {"refused": str(e).replace(str(model), "MODEL")}
            found[f"{preset} {model.name}"] = row
    out.write_text(json.dumps(found, indent=1))
    return 0


def preset_names_scheme(preset: str) -> bool:
    """Whether a preset brings a scheme of its own."""
    from importlib import resources

    package = resources.files("lowbit")
    places = (package / "recipes", package / "recipe" / "named")  # older revisions, this one
    folder = next(p for p in places if p.is_dir())
    return "\nscheme =" in (folder / f"{preset}.toml").read_text()


def compare(then: dict[str, Row], now: dict[str, Row]) -> int:
    differing = 0
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        same = (
            old is not None
            and new is not None
            and old.get("hash", old.get("refused")) == new.get("hash", new.get("refused"))
        )
        differing += not same and old is not None
        state = (
            "same" if same else "new" if old is None else f"DIFFERS  {shown(old)} -> {shown(new)}"
        )
        print(f"{name:32} {state}")
    print(f"{differing} of {len(then)} differ")
    return 1 if differing else 0


def shown(row: Row | None) -> str:
    if row is None:
        return "gone"
    return (
        str(row["refused"])
        if "refused" in row
        else f"KL {row['kl']:.5g}, hash {str(row['hash'])[:12]}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
