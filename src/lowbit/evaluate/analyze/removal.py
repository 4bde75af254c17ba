"""The remove-kernel experiment: is it the elements that become zero that cost the accuracy?

Weights are rounded to 8 bits. Activations stay in floating point, but a share of each linear's
non-zero inputs is set to zero; how they are picked is not said in CrossQuant (arXiv 2410.07505), so
there are several readings and a control:

    bound     those below theta times their token's maximum, as a per-token grid of any width would
    (R1)
    smallest  the smallest |x| of what passes together (R2)
    random    as many at random (R3, the control)
    restored  everything is quantized per token, and what became zero gets its value back (R4: is
    the kernel needed for the loss?)

"quantized" is the plain grid, for the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import LowbitError
from ...grid.names import parse_grid
from ...model.graph import Described
from .. import evaluate
from .kernels import GridOn, sites_of

Kind = Literal["bound", "smallest", "random", "restored", "quantized", "none"]
KINDS: tuple[Kind, ...] = ("bound", "smallest", "random")  # those that take a share
_SEED = 0


@dataclass(frozen=True)
class Removal:
    """One run of the experiment.

    Attributes:
        kind: see the module.
        share: of non-zero elements set to zero, for the kinds that take one.
        on: the grid, for "restored" and "quantized".
    """

    kind: Kind
    share: float = 0.0
    on: GridOn | None = None

    @property
    def label(self) -> str:
        """The run in words, for tables."""
        return f"{self.on.name}, {self.kind}" if self.on else self.kind

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return what the linear is given instead of x (..., tokens, channels)."""
        if self.kind == "none" or (self.on is None and self.share == 0):
            return x
        if self.on is not None:
            y = self.on.grid(x)
            return torch.where(self.on.zeros(x), x, y) if self.kind == "restored" else y
        size = x.abs().float()
        order = size  # the smallest go first
        if self.kind == "random":
            order = torch.rand(x.shape, generator=generator, device=x.device)
        elif self.kind == "bound":
            order = size / size.amax(-1, keepdim=True).clamp(min=1e-30)
        there = size > 0
        found = order[there]
        count = round(self.share * len(found))
        if not count:
            return x
        limit = found.kthvalue(count).values
        return x.masked_fill(there & (order <= limit), 0)


def removals(shares: Sequence[float], grids: Sequence[GridOn]) -> list[Removal]:
    """Return all runs.

    They are the plain model, three kinds at every share, each grid plain, and each per-token grid
    with the kernel restored.

    Raises:
        LowbitError: a share outside (0, 1).
    """
    if any(not 0 < s < 1 for s in shares):
        raise LowbitError(
            f"shares to remove must be in (0, 1), got {', '.join(f'{s:g}' for s in shares)}."
        )
    runs = [Removal("none"), *(Removal(k, s) for k in KINDS for s in sorted(shares))]
    for g in grids:
        runs.append(Removal("quantized", on=g))
        if g.name.endswith("per token"):
            runs.append(Removal("restored", on=g))
    return runs


@torch.no_grad()
def run(
    model: Any,
    described: Described,
    windows: Tensor,
    wanted: Sequence[Removal],
    batch: int = 8,
    weight_bits: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Removal, float]]:
    """Measure the perplexity of every removal.

    While this runs the model's weights are rounded, with one symmetric scale per output channel.

    Args:
        model: as transformers loads it, with float weights. described: its blocks.
        windows: (n, length) int64 token ids.
        batch: windows that pass together.
        weight_bits: of the rounded weights.
        progress: called with runs done and runs in all after each run.

    Yields:
        each removal with its perplexity.
    """
    sites = sites_of(described)
    with _rounded(model, [n for names in sites for n in names], weight_bits):
        for number, removal in enumerate(wanted):
            generator = torch.Generator(model.device).manual_seed(_SEED)
            with _reading(model, sites, removal, generator):
                found = evaluate(model, windows, batch=batch)
            if progress:
                progress(number + 1, len(wanted))
            yield removal, found.perplexity


@contextmanager
def _rounded(model: Any, names: Sequence[str], bits: int) -> Iterator[None]:
    """Round the weights of linears, and put them back at the end."""
    modules = [model.get_submodule(n) for n in names]
    kept = [m.weight.data for m in modules]
    grid = parse_grid(f"W{bits}sym")
    try:
        for m, weight in zip(modules, kept, strict=True):
            wide = weight.float()
            params = grid.fit(wide)
            m.weight.data = grid.decode(grid.encode(wide, params), params).to(weight.dtype)
        yield
    finally:
        for m, weight in zip(modules, kept, strict=True):
            m.weight.data = weight


@contextmanager
def _reading(
    model: Any, sites: Sequence[tuple[str, ...]], removal: Removal, generator: torch.Generator
) -> Iterator[None]:
    """Give every linear what a removal makes of its input, until the end."""
    last: list[tuple[Tensor, Tensor]] = []  # readers of one activation get the same

    def hook(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not (last and last[0][0] is args[0]):
            last[:] = [(args[0], removal(args[0], generator))]
        return (last[0][1], *args[1:])

    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook) for names in sites for n in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knee(
    points: Sequence[tuple[float, float]], base: float, tolerance: float = 0.01
) -> float | None:
    """Return the share at which perplexity first exceeds ``base`` by more than ``tolerance`` of it.

    Between two points perplexity is taken as linear. None if it never exceeds.

    Args:
        points: (share, perplexity) by rising share.
    """
    limit = base * (1 + tolerance)
    left, low = 0.0, base
    for share, perplexity in points:
        if not perplexity <= limit:  # also where it is nan
            if not perplexity < float("inf"):
                return left
            return left + (share - left) * max(0.0, limit - low) / (perplexity - low)
        left, low = share, perplexity
    return None
