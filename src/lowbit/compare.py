"""Recipes and schemes side by side on one model: the same calibration tokens, seed and evaluation
for all, cell by cell.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .disk import disk, write_atomic
from .errors import DiskFull, Interrupted, LowbitError
from .evaluate import evaluate, load_causal_lm
from .grid.names import parse_scheme
from .machine import pick_device
from .model.calibration import Calibration, evaluation_windows
from .model.checkpoint import Checkpoint
from .model.stream import load_config, load_tokenizer
from .output import working
from .recipe import Recipe
from .recipe.presets import load_recipe
from .run.identity import Original, state_of
from .run.quantize import quantize
from .tree import entries

_STATE = "compare.json"
_CELLS = "cells"
_ARTIFACTS = "artifacts"


@dataclass(frozen=True)
class Terms:
    """What is the same for every cell.

    Attributes:
        model: folder or hub id.
        calibration: text, samples and length that every recipe learns from, whatever it asks for
            itself.
        text: for perplexity, KL and top-1, in windows of ``length`` tokens, at most ``windows`` of
            them (None: all).
        tasks: lm-eval task names, with data from ``task_data`` or the hub, ``limit`` examples each
            (None: all).
        settings: "method.option=value", for the recipes that have the method.
    """

    model: str
    calibration: Calibration
    text: str
    length: int
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One combination; "float" and "bfloat16" as a scheme stand for the original model in that
    arithmetic.
    """

    scheme: str
    recipe: str

    @property
    def name(self) -> str:
        """A file name, also where the recipe is a path."""
        if not self.recipe.endswith(".toml"):
            return f"{self.scheme}-{self.recipe}"
        digest = hashlib.sha256(self.recipe.encode()).hexdigest()[:8]
        return f"{self.scheme}-{Path(self.recipe).stem}-{digest}"


def cells(
    schemes: Sequence[str], recipes: Sequence[str], settings: Sequence[str] = ()
) -> list[Cell]:
    """All combinations, every name checked, the original model first.

    Raises:
        LowbitError: an unknown scheme or recipe, one given twice, or a setting that no recipe
            takes.
    """
    for given, what in ((schemes, "scheme"), (recipes, "recipe")):
        if not given:
            raise LowbitError(f"no {what} to compare.")
        for name in given:
            if given.count(name) > 1:
                raise LowbitError(f"{what} '{name}' is given twice.")
    for setting in settings:
        if not any(
            _applicable(recipe, scheme, (setting,)) for recipe in recipes for scheme in schemes
        ):
            raise LowbitError(
                f"--set {setting} is about something that none of the recipes {', '.join(recipes)} "
                "has."
            )
    for scheme in schemes:
        for recipe in recipes:
            _resolved(recipe, scheme, settings)
    originals = [Cell("float", "original"), Cell("bfloat16", "original")]
    return originals + [Cell(s, r) for s in schemes for r in recipes]


def _applicable(recipe: str, scheme: str, settings: Sequence[str]) -> list[str]:
    """The settings about a method that the recipe has, or about activations, keys and values that
    the scheme quantizes.
    """
    tables = {*load_recipe(recipe, scheme=parse_scheme(scheme)).as_dict(), "overrides"} - {
        "calibration"
    }
    return [s for s in settings if s.partition(".")[0].strip() in tables]


def _resolved(recipe: str, scheme: str, settings: Sequence[str]) -> Recipe:
    return load_recipe(
        recipe, scheme=parse_scheme(scheme), settings=_applicable(recipe, scheme, settings)
    )


# Plain data for the report: scheme, recipe, and either error or the measured figures.
Row = dict[str, Any]


class Comparison:
    """A directory of finished cells.

    Args:
        folder: one JSON file per finished cell lies in it; a repeated call goes on from them. No
            other process works in it, see `opened`.
        keep: keep the artifacts too.

    Raises:
        LowbitError: the folder holds a comparison on other terms, or something else; the evaluation
            text is missing or too short, or a task unknown.
    """

    def __init__(self, terms: Terms, folder: Path, keep: bool = False) -> None:
        self.terms, self.folder, self.keep = terms, folder, keep
        state = json.loads(json.dumps(asdict(terms) | {"device": None}))
        found = folder / _STATE
        if found.is_file():
            self._must_match(_read(found), state)
        elif folder.exists() and any(not n.endswith(".tmp") for n in entries(folder)):
            raise LowbitError(f"'{folder}' exists and holds no comparison. Choose another -o.")
        self.device = str(pick_device(terms.device))
        checkpoint = Checkpoint(terms.model)
        self._tokenizer = load_tokenizer(checkpoint)
        self._model = Original.of(checkpoint).hashed()
        self._windows: Tensor = evaluation_windows(
            terms.text, self._tokenizer, terms.length, terms.windows
        )
        self._tasks()
        with disk(folder):
            (folder / _CELLS).mkdir(parents=True, exist_ok=True)
        write_atomic(found, (json.dumps(state, indent=1) + "\n").encode())

    def _must_match(self, old: dict[str, Any] | None, terms: dict[str, Any]) -> None:
        """Refuse cells that were measured on other terms, or nobody knows on which."""
        if old is None or not set(terms) <= set(old):
            if any((self.folder / _CELLS).glob("*.json")):
                raise LowbitError(
                    f"'{self.folder / _STATE}' is damaged: it no longer says on which terms the "
                    "cells there were measured. Remove "
                    f"'{self.folder}', or choose another -o."
                )
            return
        changed = [k for k in terms if old[k] != terms[k]]
        if changed:
            raise LowbitError(
                f"'{self.folder}' holds a comparison with another {', '.join(changed)}. Choose "
                "another -o, or remove it."
            )

    def _tasks(self) -> Any:
        """The tasks, ready for one evaluation; None without any."""
        if not self.terms.tasks:
            return None
        from .tasks import prepare

        folder = None if self.terms.task_data is None else Path(self.terms.task_data)
        return prepare(list(self.terms.tasks), shots=None, limit=self.terms.limit, folder=folder)

    def _made_with(self, cell: Cell) -> Row:
        """What else decides a cell's figures: a finished cell that differs in it is measured
        anew.
        """
        versions = {n: version(n) for n in ("lowbit", "torch", "transformers")}
        resolved = (
            {}
            if cell.recipe == "original"
            else _resolved(cell.recipe, cell.scheme, self.terms.settings).as_dict()
        )
        read = {
            "model": self._model.sha256,
            "calibration": state_of(self.terms.calibration.source),
            "windows": self._windows_hash(),
        }
        device = self.device.split(":")[0]
        told = {"recipe": resolved, "device": device, "versions": versions, **read}
        plain: dict[str, Any] = json.loads(json.dumps(told))
        return plain

    def _windows_hash(self) -> str:
        return hashlib.sha256(self._windows.to(torch.int64).numpy().tobytes()).hexdigest()

    def finished(self, cell: Cell) -> Row | None:
        """What an earlier call measured, None if it failed, never ran, is damaged, or ran with
        another model, text, recipe, version or kind of device.
        """
        row: Row | None = _read(self.folder / _CELLS / f"{cell.name}.json")
        return (
            None
            if row is None or "error" in row or row.get("made_with") != self._made_with(cell)
            else row
        )

    def run(
        self, wanted: Sequence[Cell], show: Callable[[Cell], AbstractContextManager[Any]]
    ) -> Iterator[Row]:
        """Measure every cell that is not finished yet.

        Args:
            show: makes a progress display for the quantization of a cell, see
                `lowbit.display.Progress`.

        Yields:
            a row for each cell, failures included.
        """
        for cell in wanted:
            row = self.finished(cell)
            if row is None:
                try:
                    row = (
                        self._original(cell)
                        if cell.recipe == "original"
                        else self._quantized(cell, show)
                    )
                    row["made_with"] = self._made_with(cell)
                except DiskFull:
                    raise
                except Exception as e:  # a failing method is a result too; the others go on
                    said = str(e) if isinstance(e, LowbitError) else f"{type(e).__name__}: {e}"
                    row = {
                        "scheme": cell.scheme,
                        "recipe": cell.recipe,
                        "error": " ".join(said.split()),
                    }
                self._model.check_unchanged()  # or the row would be of another model than it says
                write_atomic(
                    self.folder / _CELLS / f"{cell.name}.json",
                    (json.dumps(row, indent=1) + "\n").encode(),
                )
            yield row

    def kept(self) -> str:
        """A sentence on what an interruption leaves, for the user."""
        rows = [_read(path) for path in (self.folder / _CELLS).glob("*.json")]
        done = sum(row is not None and "error" not in row for row in rows)
        return f"Cells measured and kept in '{self.folder}': {done}. The same command continues."

    def _original(self, cell: Cell) -> Row:
        size = sum(t.nbytes for t in Checkpoint(self.terms.model).stored().values())
        kind = "bfloat16" if cell.scheme == "bfloat16" else "float32"
        model = load_causal_lm(self.terms.model, self.device, kind)
        return {
            "scheme": cell.scheme,
            "recipe": cell.recipe,
            "bits": None,
            "bytes": size,
            "seconds": 0.0,
            **self._judged(model),
        }

    def _start_anew(self, cell: Cell, out: Path) -> None:
        """Remove what an earlier call with another model, text, recipe or version left of a cell's
        artifact; keep what this one can go on with.
        """
        note, made_with = out.with_name(f"{out.name}.json"), self._made_with(cell)
        if _read(note) != made_with:
            for folder in (out, out.with_name(f"{out.name}.partial")):
                shutil.rmtree(folder, ignore_errors=True)
            write_atomic(note, (json.dumps(made_with, indent=1) + "\n").encode())

    def _quantized(self, cell: Cell, show: Callable[[Cell], AbstractContextManager[Any]]) -> Row:
        t = self.terms
        out = self.folder / _ARTIFACTS / cell.name
        out.parent.mkdir(exist_ok=True)
        self._start_anew(cell, out)
        recipe = _resolved(cell.recipe, cell.scheme, t.settings)
        with show(cell) as progress:
            done = quantize(
                t.model,
                None,
                recipe,
                out=out,
                calib=t.calibration.source,
                samples=t.calibration.samples,
                length=t.calibration.length,
                seed=t.seed,
                device=t.device,
                progress=progress,
                watch=getattr(progress, "working", None),
            )
        report = done.report
        row = {
            "scheme": cell.scheme,
            "recipe": cell.recipe,
            "bits": report["size"]["bits_per_weight"],
            "bytes": report["size"]["after"],
            "model_bits": report["size"]["model_bits_per_weight"],
            "seconds": sum(b["seconds"] for b in report["blocks"]),
            **self._judged(load_causal_lm(str(out), self.device)),
            "blocks": [
                {"before": b["loss_before"], "after": b["loss_after"]} for b in report["blocks"]
            ],
            "trouble": sorted({r for b in report["blocks"] for r in b.get("trouble", [])}),
            "verified": done.verification.summary,
            "hash": report["hash"],
            "format": report["format"],
            "calibration": report["calibration"],
        }
        if not self.keep:
            shutil.rmtree(out)
            out.with_name(f"{out.name}.json").unlink(missing_ok=True)
            # Others lie there: of cells that failed, or kept by an earlier call.
            with suppress(OSError):
                out.parent.rmdir()
        return row

    def _judged(self, model: Any) -> Row:
        """Perplexity, KL and top-1 to the model in float32, and the tasks' accuracies."""
        # Loaded anew each time: while a cell is quantized it would only take memory.
        reference = load_causal_lm(self.terms.model, self.device, "float32")
        found = evaluate(model, self._windows, reference).as_dict()
        del reference
        prepared = self._tasks()
        if prepared is not None:
            from .tasks import evaluate_tasks

            found["tasks"] = evaluate_tasks(
                prepared, model, self._tokenizer, limit=self.terms.limit, batch=8
            ).as_dict()
        return {**found, "windows_sha256": self._windows_hash()}


@contextmanager
def opened(terms: Terms, folder: Path, keep: bool = False) -> Iterator[Comparison]:
    """A `Comparison` in a folder where no other process works meanwhile; found possible before any
    work.

    Raises:
        LowbitError: as `Comparison`; the folder is in use, or cannot be written.
        Interrupted, DiskFull: raised within, with a sentence on the cells that are kept.
    """
    with working(folder, "compare") as place:
        comparison = Comparison(terms, place, keep)
        try:
            yield comparison
        except KeyboardInterrupt as e:
            raise Interrupted(comparison.kept()) from e
        except DiskFull as e:
            raise DiskFull(f"{e} {comparison.kept()}") from e


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def fitting_length(model: str, asked: int | None, option: str) -> int:
    """The row length asked for, by default 2048 tokens or the model's context.

    Raises:
        LowbitError: beyond the context.
    """
    context = getattr(load_config(Checkpoint(model)), "max_position_embeddings", None) or 2048
    if asked is not None and asked > context:
        raise LowbitError(f"{option} {asked} is beyond the model's context of {context} tokens.")
    return asked or min(2048, context)
