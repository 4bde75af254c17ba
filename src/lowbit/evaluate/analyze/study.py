"""Everything `lowbit analyze` finds out about a model, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import LowbitError
from ...model.bos import check_bos, said_of
from ...model.calibration import evaluation_windows
from ...model.config import load_config
from ...model.experts import replace_fused
from ...model.source import open_files
from ...model.tokenizer import load_tokenizer
from ...model.tracing import described
from ...model.wrapper import is_wrapper
from .. import load_causal_lm, window_length
from .kernels import GridOn, Site, grids_of, mean_kernel, measure
from .removal import KINDS, Removal, knee, removals, run

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StudyOptions:
    """What to study, and how.

    Attributes:
        model: folder or hub id.
        text: as for `lowbit eval`.
        length: tokens a window; None is 2048, or the model's context if shorter.
        windows: the first so many windows; None is all.
        batch: windows that pass together.
        bits, exponents, columns: of the grids, see `grids_of`.
        shares: of elements to set to zero; None leaves the experiment out.
        device: such as "cpu" or "cuda:0".
        bos: what windows begin with, see `lowbit.model.bos.begun`.

    Raises:
        LowbitError: no window at a time, or no such choice of bos.
    """

    model: str
    text: str
    length: int | None
    windows: int | None
    batch: int
    bits: Sequence[int]
    exponents: Sequence[float]
    columns: str
    shares: Sequence[float] | None
    device: str
    bos: str = "auto"

    def __post_init__(self) -> None:
        check_bos(self.bos)
        if self.batch < 1:
            raise LowbitError("--batch must be at least 1.")


def study(
    given: StudyOptions, measuring: Progress | None = None, removing: Progress | None = None
) -> dict[str, Any]:
    """Return kernel shares and outliers of every linear's input, and the remove-kernel experiment.

    Args:
        measuring, removing: called with (done, in all) of windows, and of runs of the experiment.

    Raises:
        LowbitError: the model or text cannot be read, an option is out of range, or an activation
            is not finite.
    """
    grids = grids_of(given.bits, given.exponents, given.columns)
    wanted = [] if given.shares is None else removals(given.shares, grids)
    checkpoint = open_files(given.model)
    config = load_config(checkpoint)
    if is_wrapper(config):
        raise LowbitError(
            f"'{given.model}' is a '{config.model_type}' model around a text model: analyze reads "
            "text models on their own."
        )
    graphs = described(config)
    if wanted and getattr(config, "quantization_config", None):
        raise LowbitError(
            f"'{given.model}' is quantized; the remove-kernel experiment is for float weights: "
            "analyze the original, or give --no-remove."
        )
    length = window_length(config, given.length)
    tokenizer = load_tokenizer(checkpoint)
    ids = evaluation_windows(given.text, tokenizer, length, given.windows, given.bos)
    loaded = load_causal_lm(given.model, given.device)
    replace_fused(loaded)
    sites = measure(loaded, graphs, ids, grids, given.batch, measuring)
    found: list[tuple[Removal, float]] = []
    if wanted:
        found = list(run(loaded, graphs, ids, wanted, given.batch, progress=removing))
    return (
        _described(given, ids, said_of(ids, tokenizer)) | _measured(sites, grids) | _removed(found)
    )


def _described(given: StudyOptions, ids: Tensor, begun: str) -> dict[str, Any]:
    """Return what was studied; ids are (windows, length)."""
    windows, length = ids.shape
    return {
        "title": (
            f"{given.model} on {given.text}: {windows} windows of {length} tokens{begun}, "
            f"{given.batch} together; columns of a {given.columns}"
        ),
        "model": given.model,
        "text": given.text,
        "windows": windows,
        "length": length,
        "batch": given.batch,
        "columns": given.columns,
    }


def _measured(sites: Sequence[Site], grids: Sequence[GridOn]) -> dict[str, Any]:
    """Return the kernel shares and outliers."""
    return {
        "grids": [g.name for g in grids],
        "sites": [s.as_dict() for s in sites],
        "mean": {g.name: mean_kernel(sites, g.name) for g in grids},
    }


def _removed(found: Sequence[tuple[Removal, float]]) -> dict[str, Any]:
    """Return the perplexity of every run, and where each kind begins to cost accuracy."""
    runs = [
        {
            "kind": removal.kind,
            "share": removal.share,
            "grid": removal.on.name if removal.on else None,
            "perplexity": perplexity,
        }
        for removal, perplexity in found
    ]
    return {"removals": runs, "knees": _knees(runs)}


def _knees(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the knee of every kind that has runs; without a run of the whole model, none."""
    base = next((r["perplexity"] for r in runs if r["kind"] == "none"), None)
    if base is None:
        return {}
    knees: dict[str, float | None] = {}
    for kind in KINDS:
        points = [(r["share"], r["perplexity"]) for r in runs if r["kind"] == kind]
        if points:
            knees[kind] = knee(points, base)
    return knees
