"""Everything `lowbit analyze` finds out about a model, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import LowbitError
from ..evaluate import load_causal_lm
from ..model.calibration import evaluation_windows
from ..model.checkpoint import Checkpoint
from ..model.stream import load_config, load_tokenizer
from ..model.wiring import wiring_of
from .kernels import grids_of, mean_kernel, measure
from .removal import knee, removals, run

Tell = Callable[[int, int], None]


def study(
    model: str,
    text: str,
    *,
    length: int | None,
    windows: int | None,
    batch: int,
    bits: Sequence[int],
    exponents: Sequence[float],
    columns: str,
    shares: Sequence[float] | None,
    device: str,
    progress: Tell | None = None,
    removing: Tell | None = None,
) -> dict[str, Any]:
    """Kernel shares and outliers of every linear's input, and the remove-kernel experiment.

    Args:
        model: folder or hub id. text: as for `lowbit eval`. length, windows, batch: tokens a window
            (default 2048 or the model's context), how many windows at most, how many pass together.
        bits, exponents, columns: of the grids, see `grids_of`.
        shares: of elements to set to zero; None leaves the experiment out.
        progress, removing: told (done, in all) of windows, and of runs of the experiment.

    Raises:
        LowbitError: the model or text cannot be read, an option is out of range, or an activation
            is not finite.
    """
    if batch < 1:
        raise LowbitError("--batch must be at least 1.")
    grids = grids_of(bits, exponents, columns)
    wanted = None if shares is None else removals(shares, grids)
    checkpoint = Checkpoint(model)
    config = load_config(checkpoint)
    wiring = wiring_of(config)
    if wanted is not None and getattr(config, "quantization_config", None):
        raise LowbitError(
            f"'{model}' is quantized; the remove-kernel experiment is for float weights: analyze "
            "the original, or give --no-remove."
        )
    context = getattr(config, "max_position_embeddings", None) or 2048
    if length is not None and length > context:
        raise LowbitError(f"--length {length} is beyond the model's context of {context} tokens.")
    ids = evaluation_windows(
        text, load_tokenizer(checkpoint), length or min(2048, context), windows
    )
    loaded = load_causal_lm(model, device)
    sites = measure(loaded, wiring, ids, grids, batch, progress)
    found: list[dict[str, Any]] = []
    if wanted is not None:
        for removal, perplexity in run(loaded, wiring, ids, wanted, batch, progress=removing):
            found.append(
                {
                    "kind": removal.kind,
                    "share": removal.share,
                    "grid": removal.on.name if removal.on else None,
                    "perplexity": perplexity,
                }
            )
    base = next((r["perplexity"] for r in found if r["kind"] == "none"), None)
    knees = {}
    for kind in ("bound", "smallest", "random"):
        points = [(r["share"], r["perplexity"]) for r in found if r["kind"] == kind]
        if points and base is not None:
            knees[kind] = knee(points, base)
    return {
        "title": (
            f"{model} on {text}: {len(ids)} windows of {ids.shape[1]} tokens, {batch} together; "
            f"columns of a {columns}"
        ),
        "model": model,
        "text": text,
        "windows": len(ids),
        "length": ids.shape[1],
        "batch": batch,
        "columns": columns,
        "grids": [g.name for g in grids],
        "sites": [s.as_dict() for s in sites],
        "mean": {g.name: mean_kernel(sites, g.name) for g in grids},
        "removals": found,
        "knees": knees,
    }
