"""The demo: the embedded model in 2 bits by three recipes, side by side, with a report. No network,
a few minutes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from .console import Console, Table
from .disk import disk
from .display import Progress, duration, size
from .errors import Interrupted, LowbitError
from .evaluate import continue_text, evaluate, load_causal_lm
from .machine import pick_device
from .model.calibration import evaluation_windows
from .model.checkpoint import Checkpoint
from .model.stream import load_tokenizer
from .output import working
from .report import write_page
from .run.quantize import quantize
from .tree import emptied, entries
from .verbatim import shell

RECIPES = ("rtn", "awq", "tesseraq")
_WRITTEN = {*RECIPES, *(f"{r}.partial" for r in RECIPES), "report.html", "demo.json"}
_PROMPT = "def read_file(path"
_WINDOWS, _LENGTH, _SAMPLES = 64, 256, 64
# Enough to see the order of the methods in a few minutes; the presets do more.
_LIGHTER = {
    "rtn": [],
    "awq": ["awq.rows=16"],
    "tesseraq": ["awq.rows=16", "tesseraq.schedule=exponential-5-30", "tesseraq.iters=10"],
}


def demo_model() -> Path:
    """Folder of the small Llama that comes with the package, trained on the Python standard
    library's sources.
    """
    return Path(str(resources.files(__package__) / "demo_model"))


def run_demo(folder: Path, scheme: str, device: str, console: Console) -> None:
    """Quantize, evaluate, compare, report.

    Args:
        folder: an earlier demo in it is replaced.

    Raises:
        LowbitError: the folder holds something else, is in use, or cannot be written. Interrupted:
            a KeyboardInterrupt.
    """
    with working(folder, "demo") as place:
        others = [n for n in entries(place) if n not in _WRITTEN]
        if others:
            raise LowbitError(
                f"'{folder}' holds '{others[0]}', which no demo wrote. Choose another -o."
            )
        emptied(place)
        try:
            _run(folder, scheme, device, console)
        except KeyboardInterrupt as e:
            raise Interrupted("The same command starts the demo anew.") from e


def _run(folder: Path, scheme: str, device: str, console: Console) -> None:
    source = str(demo_model())
    where = str(pick_device(device))
    tokenizer = load_tokenizer(Checkpoint(source))
    windows = evaluation_windows("stdlib", tokenizer, _LENGTH, _WINDOWS)
    original = load_causal_lm(source, where)
    plain = evaluate(original, windows)
    rows: list[dict[str, Any]] = [
        {
            "recipe": "original",
            "scheme": "16 bit",
            "bytes": sum(f.stat().st_size for f in demo_model().glob("*.safetensors")),
            "bits": 16.0,
            "seconds": 0.0,
            **plain.as_dict(),
            "sample": continue_text(original, tokenizer, _PROMPT, 48),
            "losses": [],
        }
    ]
    for recipe in RECIPES:
        console.print(
            f"\n{recipe}, {scheme}, {_SAMPLES} x {_LENGTH} tokens of this Python's standard library"
        )
        with Progress(console) as progress:
            done = quantize(
                source,
                scheme,
                recipe,
                out=folder / recipe,
                samples=_SAMPLES,
                length=_LENGTH,
                device=device,
                settings=_LIGHTER[recipe],
                progress=progress,
                watch=progress.working,
            )
        loaded = load_causal_lm(str(folder / recipe), where)
        found = evaluate(loaded, windows, original)
        report = done.report
        rows.append(
            {
                "recipe": recipe,
                "scheme": scheme,
                "bytes": report["size"]["after"],
                "bits": report["size"]["bits_per_weight"],
                "seconds": sum(b["seconds"] for b in report["blocks"]),
                **found.as_dict(),
                "sample": continue_text(loaded, tokenizer, _PROMPT, 48),
                "verified": done.verification.summary,
                "hash": report["hash"],
                "losses": [(b["loss_before"], b["loss_after"]) for b in report["blocks"]],
            }
        )
    title = (
        f"{windows.shape[0]} x {windows.shape[1]} tokens of held-out standard library sources, "
        "demo model"
    )
    _show(rows, title, console)
    with disk(folder):
        page = write_page(folder, rows, title)
    console.print(
        f"\nreport: {page}\ncheck an artifact again: lowbit verify {shell(folder / 'tesseraq')}"
    )


def _show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    for row in rows:
        console.print(f"\n[{row['recipe']}]\n{row['sample']}")
    table = Table(
        "recipe", "scheme", "bits", "size", "perplexity", "KL", "top-1", "time", title=title
    )
    for r in rows:
        kl, top = ("-", "-") if r["kl"] is None else (f"{r['kl']:.4f}", f"{r['top1']:.1%}")
        table.add_row(
            r["recipe"],
            r["scheme"],
            f"{r['bits']:.3f}",
            size(r["bytes"]),
            f"{r['perplexity']:.3f}",
            kl,
            top,
            duration(r["seconds"]),
        )
    console.print(table)
