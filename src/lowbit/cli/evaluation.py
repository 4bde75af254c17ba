"""`lowbit eval`: perplexity on a text, accuracy on tasks, or both, with one loaded model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import compute_dtype
from ..console import Console
from ..errors import LowbitError
from ..evaluate import (
    Evaluation,
    evaluate,
    evaluate_by_block,
    load_causal_lm,
    together,
    window_length,
)
from ..evaluate.tasks import Prepared, TaskResults, evaluate_tasks, prepare
from ..evaluate.tasks.show import notes, table
from ..machine import free_memory, pick_device
from ..model.bos import check_bos, said_of
from ..model.calibration import evaluation_windows
from ..model.config import load_config
from ..model.source import open_files
from ..model.tokenizer import load_tokenizer
from ..model.wrapper import text_config
from ..runtime.by_block import ByBlock
from ..runtime.integers import in_integers
from .display import progress_bar
from .loading import by_block, check_loading
from .sentences import check_needed

_USUAL_BATCH = 8
_OF_FREE = 4  # of the memory that is free, for what goes from block to block


@dataclass(frozen=True)
class EvalOptions:
    """The options of the command, see `lowbit.cli.options`.

    Raises:
        LowbitError: an option without the one that it belongs to.
    """

    model: str
    text: str | None
    length: int | None
    windows: int | None
    bos: str
    reference: str | None
    tasks: str | None
    shots: int | None
    limit: int | None
    task_data: Path | None
    batch: int | None
    integers: bool
    dtype: str
    device: str
    load: str = "auto"

    def __post_init__(self) -> None:
        check_bos(self.bos)
        check_loading(self.load)
        if self.load == "blocks" and (self.tasks or self.integers):
            raise LowbitError(
                "--load blocks measures a text: leave out --tasks and --integers, which take the "
                "whole model."
            )
        of_tasks = {
            "--shots": self.shots,
            "--limit": self.limit,
            "--task-data": self.task_data,
            "--batch": self.batch,
        }
        of_text = {
            "--length": self.length,
            "--windows": self.windows,
            "--reference": self.reference,
        }
        check_needed(of_tasks, "--tasks", bool(self.tasks))
        check_needed(of_text, "--text", bool(self.text or not self.tasks))

    @property
    def measured_text(self) -> str | None:
        """The text to measure; None for tasks alone."""
        if self.text is None and self.tasks is None:
            return "stdlib"
        return self.text


def run_eval(given: EvalOptions, console: Console) -> dict[str, Any]:
    """Measure what the options ask for, print it, and return it as plain data.

    Everything that can be wrong with a text or a task is found before the model is loaded.

    Raises:
        LowbitError: the model, the text or a task cannot be read, or an option is out of range.
    """
    device = str(pick_device(given.device))
    checkpoint = open_files(given.model)
    config = load_config(checkpoint)
    given = replace(given, dtype=_arithmetic(given.dtype, device, config))
    length = window_length(config, given.length)
    tokenizer = load_tokenizer(checkpoint)
    measured = None
    if given.measured_text is not None:
        windows = evaluation_windows(
            given.measured_text, tokenizer, length, given.windows, given.bos
        )
        measured = _Measured(windows, said_of(windows, tokenizer), checkpoint.nbytes)
    prepared = _prepared(given, console)
    if measured and prepared is None and not given.integers and by_block(given, device):
        return _block_by_block(given, measured, device, console)
    model = load_causal_lm(given.model, device, given.dtype)
    if given.integers:
        model = in_integers(model, Path(given.model))
    data: dict[str, Any] = {}
    if measured is not None:
        data = _on_text(given, model, measured, device, console)
    if prepared is not None:
        data["tasks"] = _on_tasks(given, model, tokenizer, prepared, console).as_dict()
    return data


def _arithmetic(asked: str, device: str, config: Any) -> str:
    """What "auto" means here; on an accelerator each model has its own."""
    where, text = torch.device(device), text_config(config, config.model_type)
    if asked == "auto" and where.type != "cpu":
        return asked
    stored = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return _named(compute_dtype(asked, where, stored, getattr(text, "hidden_size", 0)))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _prepared(given: EvalOptions, console: Console) -> tuple[Prepared, ...] | None:
    """Return the tasks with their data; None without any."""
    if given.tasks is None:
        return None
    with console.status("finding tasks"):
        return prepare(
            given.tasks.split(","), shots=given.shots, limit=given.limit, folder=given.task_data
        )


@dataclass(frozen=True)
class _Measured:
    """What is measured.

    Attributes:
        windows: (n, length) int64. begun: what they begin with, in words. size: of the model, bytes
            of all tensors in its files.
    """

    windows: Tensor
    begun: str
    size: int


def _on_text(
    given: EvalOptions, model: Any, measured: _Measured, device: str, console: Console
) -> dict[str, Any]:
    """Print and return perplexity, and the distance to the reference."""
    reference = None
    if given.reference:
        reference = load_causal_lm(given.reference, device, given.dtype)
    with progress_bar(console) as progress:
        result = evaluate(model, measured.windows, reference, progress=progress)
    return _told(given, result, measured, model.dtype, "", console)


def _block_by_block(
    given: EvalOptions, measured: _Measured, device: str, console: Console
) -> dict[str, Any]:
    """The same with one block of each model in memory at a time."""
    dtype = None if given.dtype == "auto" else getattr(torch, given.dtype)
    where = torch.device(device)
    model = ByBlock(given.model, where, dtype)
    reference = ByBlock(given.reference, where, dtype) if given.reference else None
    free = free_memory(where)
    room = None if free is None else free // _OF_FREE
    with progress_bar(console, "blocks") as progress:
        result = evaluate_by_block(model, measured.windows, reference, room, progress)
    how = ", one block in memory at a time"
    return _told(given, result, measured, model.source.compute, how, console)


def _told(
    given: EvalOptions,
    result: Evaluation,
    measured: _Measured,
    dtype: torch.dtype,
    how: str,
    console: Console,
) -> dict[str, Any]:
    line = (
        f"{given.model} on {given.measured_text}: perplexity {result.perplexity:.4f}"
        f"{_error(result.perplexity_error, '.2g')} (nll "
        f"{result.nll:.5f}; {result.windows} windows x {result.length}{measured.begun}, "
        f"{result.tokens} tokens, {together(result.batch)}, in {_named(dtype)}{how})"
    )
    if result.kl is not None and result.top1 is not None:
        line += (
            f"; to {given.reference}: KL {result.kl:.5f}{_error(result.kl_error, '.2g')} (median "
            f"{result.kl_median:.3g}, 99th percentile {result.kl_p99:.3g}, maximum "
            f"{result.kl_max:.3g}), top-1 {result.top1:.2%}{_error(result.top1_error, '.2%')}"
        )
    console.print(f"{line}; {measured.size / 1e6:,.1f} MB")
    return {**result.as_dict(), "dtype": _named(dtype), "bytes": measured.size}


def _error(found: float | None, form: str) -> str:
    """Return a standard error as it follows a figure."""
    return "" if found is None else f" +- {found:{form}}"


def _on_tasks(
    given: EvalOptions,
    model: Any,
    tokenizer: Any,
    prepared: tuple[Prepared, ...],
    console: Console,
) -> TaskResults:
    """Print and return accuracies."""
    with progress_bar(console, "prompts") as progress:
        found = evaluate_tasks(
            prepared,
            model,
            tokenizer,
            limit=given.limit,
            batch=_USUAL_BATCH if given.batch is None else given.batch,
            progress=progress,
        )
    console.print(table(found))
    for note in notes(found):
        console.print(note)
    return found
