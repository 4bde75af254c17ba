"""Measures one cell of a comparison: the original model, or a quantized one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...evaluate import evaluate, load_causal_lm
from ...evaluate.tasks import Prepared, evaluate_tasks, prepare
from ...machine import pick_device
from ...model.bos import said_of
from ...model.calibration import evaluation_windows
from ...model.source import open_files
from ...model.tokenizer import load_tokenizer
from ...run.asked import Result
from ...run.identity import Original, state_of
from ...run.quantize import quantize
from ..display import Progress
from .files import read_state, write_state
from .terms import Cell, Terms, resolved

_ARTIFACTS = "artifacts"

# Plain data for the report: scheme, recipe, and either error or the measured figures.
Row = dict[str, Any]
# Makes a progress display for the quantization of a cell.
Show = Callable[[Cell], AbstractContextManager[Progress]]


class Bench:
    """The model, text and tasks that every cell is measured on.

    Args:
        folder: of the comparison; artifacts are made in it.
        keep: keep the artifacts.

    Raises:
        LowbitError: the model or the evaluation text is missing or too short, or a task unknown.
    """

    def __init__(self, terms: Terms, folder: Path, keep: bool) -> None:
        self._terms = terms
        self._folder = folder
        self._keep = keep
        self._device = str(pick_device(terms.device))
        checkpoint = open_files(terms.model)
        self._tokenizer = load_tokenizer(checkpoint)
        self._model = Original.of(checkpoint).hashed()
        self._windows = evaluation_windows(
            terms.text, self._tokenizer, terms.length, terms.windows, terms.calibration.bos
        )
        self._prepared()  # what is wrong with a task is found before any work

    def check_unchanged(self) -> None:
        """Refuse a model that has changed since the comparison began.

        Raises:
            LowbitError: it has.
        """
        self._model.check_unchanged()

    def made_with(self, cell: Cell) -> Row:
        """Return what else decides a cell's figures, as plain data.

        A finished cell that differs in it is measured anew.
        """
        recipe: Mapping[str, Any] = {}
        if cell.recipe != "original":
            recipe = resolved(cell.recipe, cell.scheme, self._terms.settings).as_dict()
        told = {
            "recipe": recipe,
            "device": self._device.split(":")[0],
            "versions": {n: version(n) for n in ("lowbit", "torch", "transformers")},
            "model": self._model.sha256,
            "calibration": state_of(self._terms.calibration.source),
            "windows": self._windows_hash(),
        }
        plain: Row = json.loads(json.dumps(told))  # as it is read again: no tuples
        return plain

    def measure(self, cell: Cell, show: Show) -> Row:
        """Return the figures of a cell; whatever keeps it from being measured is raised."""
        row = self._original(cell) if cell.recipe == "original" else self._quantized(cell, show)
        return row | {"made_with": self.made_with(cell)}

    def _original(self, cell: Cell) -> Row:
        """Measure the original model in the arithmetic that the scheme names."""
        size = open_files(self._terms.model).nbytes
        kind = "bfloat16" if cell.scheme == "bfloat16" else "float32"
        model = load_causal_lm(self._terms.model, self._device, kind)
        return {
            "scheme": cell.scheme,
            "recipe": cell.recipe,
            "bits": None,
            "bytes": size,
            "seconds": 0.0,
            **self._judged(model),
        }

    def _quantized(self, cell: Cell, show: Show) -> Row:
        """Quantize the model, measure the artifact, and remove it unless it is kept."""
        out = self._folder / _ARTIFACTS / cell.name
        out.parent.mkdir(exist_ok=True)
        self._start_anew(cell, out)
        done = self._run(cell, out, show)
        report = done.report
        blocks = report["blocks"]
        row = {
            "scheme": cell.scheme,
            "recipe": cell.recipe,
            "bits": report["size"]["bits_per_weight"],
            "bytes": report["size"]["after"],
            "model_bits": report["size"]["model_bits_per_weight"],
            "seconds": sum(b["seconds"] for b in blocks),
            **self._judged(load_causal_lm(str(out), self._device)),
            "blocks": [{"before": b["loss_before"], "after": b["loss_after"]} for b in blocks],
            "trouble": sorted({remark for b in blocks for remark in b.get("trouble", [])}),
            "verified": done.verification.summary,
            "hash": report["hash"],
            "format": report["format"],
            "calibration": report["calibration"],
        }
        if not self._keep:
            shutil.rmtree(out)
            _note_of(out).unlink(missing_ok=True)
            # Others lie there: of cells that failed, or kept by an earlier call.
            with suppress(OSError):
                out.parent.rmdir()
        return row

    def _start_anew(self, cell: Cell, out: Path) -> None:
        """Remove what an earlier call with another model, text, recipe or version left of a cell's
        artifact; keep what this one can go on with.
        """
        made_with = self.made_with(cell)
        if read_state(_note_of(out)) != made_with:
            for folder in (out, out.with_name(f"{out.name}.partial")):
                shutil.rmtree(folder, ignore_errors=True)
            write_state(_note_of(out), made_with)

    def _run(self, cell: Cell, out: Path, show: Show) -> Result:
        """Quantize the model into ``out``, or go on with what lies there."""
        terms = self._terms
        with show(cell) as progress:
            return quantize(
                terms.model,
                None,
                resolved(cell.recipe, cell.scheme, terms.settings),
                out=out,
                calib=terms.calibration.source,
                samples=terms.calibration.samples,
                length=terms.calibration.length,
                bos=terms.calibration.bos,
                seed=terms.seed,
                device=terms.device,
                progress=progress,
                watch=progress.working,
            )

    def _judged(self, model: Any) -> Row:
        """Return perplexity, KL and top-1 to the model in float32, and the tasks' accuracies."""
        # Loaded anew each time: while a cell is quantized it would only take memory.
        reference = load_causal_lm(self._terms.model, self._device, "float32")
        found = evaluate(model, self._windows, reference).as_dict()
        del reference
        prepared = self._prepared()
        if prepared is not None:
            results = evaluate_tasks(
                prepared, model, self._tokenizer, limit=self._terms.limit, batch=8
            )
            found["tasks"] = results.as_dict()
        begin = said_of(self._windows, self._tokenizer)
        return {**found, "begin": begin, "windows_sha256": self._windows_hash()}

    def _prepared(self) -> tuple[Prepared, ...] | None:
        """Return the tasks, ready for one evaluation; None without any."""
        terms = self._terms
        if not terms.tasks:
            return None
        folder = None if terms.task_data is None else Path(terms.task_data)
        return prepare(list(terms.tasks), shots=None, limit=terms.limit, folder=folder)

    def _windows_hash(self) -> str:
        return hashlib.sha256(self._windows.to(torch.int64).numpy().tobytes()).hexdigest()


def _note_of(out: Path) -> Path:
    """Return the file beside an artifact that says what it is made with."""
    return out.with_name(f"{out.name}.json")
