"""The demo: the embedded model in 2 bits by three recipes, side by side, with a report. No network,
a few minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from .artifact.disk import disk
from .artifact.output import working
from .artifact.tree import emptied, entries
from .cli.display import Progress, duration, size
from .console import Console, Table
from .errors import Interrupted, LowbitError
from .evaluate import continue_text, evaluate, load_causal_lm
from .evaluate.pages import write_page
from .machine import pick_device
from .model.calibration import evaluation_windows
from .model.checkpoint import Checkpoint
from .model.tokenizer import load_tokenizer
from .run.asked import Result
from .run.quantize import quantize
from .verbatim import shell

RECIPES = ("rtn", "awq", "tesseraq")
_WRITTEN = {*RECIPES, *(f"{r}.partial" for r in RECIPES), "report.html", "demo.json"}
_PROMPT = "def read_file(path"
_WINDOWS = 64  # of the evaluation
_SAMPLES = 64  # calibration rows
_LENGTH = 256  # tokens in each of both
# Enough to see the order of the methods in a few minutes; the presets do more.
_LIGHTER = {
    "rtn": [],
    "awq": ["awq.rows=16"],
    "tesseraq": ["awq.rows=16", "tesseraq.schedule=exponential-5-30", "tesseraq.iters=10"],
}


def demo_model() -> Path:
    """Return the folder of the small Llama that comes with the package.

    It is trained on the sources of the Python standard library.
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


@dataclass(frozen=True)
class _Bench:
    """What every recipe of the demo is measured with.

    Attributes:
        original: the model in floating point.
        windows: (n, length) int64 token ids of the evaluation text.
    """

    device: str
    tokenizer: Any
    original: Any
    windows: Tensor

    @classmethod
    def on(cls, device: str) -> _Bench:
        """Load the model and the text."""
        source = str(demo_model())
        tokenizer = load_tokenizer(Checkpoint(source))
        windows = evaluation_windows("stdlib", tokenizer, _LENGTH, _WINDOWS)
        return cls(device, tokenizer, load_causal_lm(source, device), windows)

    def judged(self, model: Any, reference: Any = None) -> dict[str, Any]:
        """Return the figures of a model, and a text that it continues."""
        found = evaluate(model, self.windows, reference).as_dict()
        return found | {"sample": continue_text(model, self.tokenizer, _PROMPT, 48)}


def _run(folder: Path, scheme: str, device: str, console: Console) -> None:
    bench = _Bench.on(str(pick_device(device)))
    rows = [_original(bench)]
    for recipe in RECIPES:
        console.print(
            f"\n{recipe}, {scheme}, {_SAMPLES} x {_LENGTH} tokens of this Python's standard library"
        )
        done = _quantize(folder / recipe, recipe, scheme, device, console)
        rows.append(_quantized(bench, done, recipe, scheme))
    count, length = bench.windows.shape
    title = f"{count} x {length} tokens of held-out standard library sources, demo model"
    _show(rows, title, console)
    with disk(folder):
        page = write_page(folder, rows, title)
    console.print(
        f"\nreport: {page}\ncheck an artifact again: lowbit verify {shell(folder / 'tesseraq')}"
    )


def _quantize(out: Path, recipe: str, scheme: str, device: str, console: Console) -> Result:
    """Quantize the model by a recipe, lightened for the demo."""
    with Progress(console) as progress:
        return quantize(
            str(demo_model()),
            scheme,
            recipe,
            out=out,
            samples=_SAMPLES,
            length=_LENGTH,
            device=device,
            settings=_LIGHTER[recipe],
            progress=progress,
            watch=progress.working,
        )


def _original(bench: _Bench) -> dict[str, Any]:
    """Return the row of the model in floating point."""
    return {
        "recipe": "original",
        "scheme": "16 bit",
        "bytes": sum(f.stat().st_size for f in demo_model().glob("*.safetensors")),
        "bits": 16.0,
        "seconds": 0.0,
        **bench.judged(bench.original),
        "losses": [],
    }


def _quantized(bench: _Bench, done: Result, recipe: str, scheme: str) -> dict[str, Any]:
    """Return the row of a quantized model."""
    model = load_causal_lm(str(done.folder), bench.device)
    report = done.report
    return {
        "recipe": recipe,
        "scheme": scheme,
        "bytes": report["size"]["after"],
        "bits": report["size"]["bits_per_weight"],
        "seconds": sum(b["seconds"] for b in report["blocks"]),
        **bench.judged(model, bench.original),
        "verified": done.verification.summary,
        "hash": report["hash"],
        "losses": [(b["loss_before"], b["loss_after"]) for b in report["blocks"]],
    }


def _show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Print the samples and the table."""
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
