"""Kernel shares: how many elements of each linear's input an activation grid turns into zero.

The quantization kernel of CrossQuant (arXiv 2410.07505) is the set of elements that quantize to
zero. Elements that are zero already (ReLU makes most of OPT's last inputs so) are counted apart and
belong to no kernel here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import LowbitError
from ...grid import CrossQuant, PerToken
from ...model.graph import Described
from ..perplexity import check_windows, vocabulary

_OUTLIER = 6.0  # where LLM.int8() stops quantizing a channel


@dataclass(frozen=True)
class GridOn:
    """An activation grid with a name for tables.

    A scale per column is CrossQuant with row exponent 0.
    """

    name: str
    grid: PerToken | CrossQuant

    def zeros(self, x: Tensor) -> Tensor:
        """Return which elements of (..., tokens, channels) become zero, bool."""
        if isinstance(self.grid, CrossQuant):
            return self.grid.codes(x)[0] == 0
        codes, _, zero_point = self.grid.codes(x)
        return codes == zero_point


def grids_of(bits: Sequence[int], exponents: Sequence[float], columns: str) -> list[GridOn]:
    """Return grids per token, per column and of CrossQuant at every width.

    Args:
        exponents: of CrossQuant's rows.
        columns: "call" or "sequence", over what a channel's maximum is taken.

    Raises:
        LowbitError: a width, exponent or kind of columns that no grid has.
    """
    found = []
    try:
        for b in bits:
            found.append(GridOn(f"A{b} per token", PerToken(b, symmetric=True)))
            per_column = CrossQuant(b, 0.0, columns)  # type: ignore[arg-type]
            found.append(GridOn(f"A{b} per column", per_column))
            for a in exponents:
                crossed = replace(per_column, row_exponent=a)
                found.append(GridOn(f"A{b} CrossQuant {a:g}", crossed))
    except ValueError as e:
        raise LowbitError(f"{e}.") from e
    return found


@dataclass
class Site:
    """Counts over everything that has passed one activation that linears read.

    Attributes:
        linears: full names of its readers.
        elements: number of all elements.
        zeros: number of elements that are zero themselves.
        kernel: grid's name -> number of other elements that it turns into zero.
        smaller: number of elements whose channel's maximum is below their token's, where a cross
            scale is finer than a token's.
        channels: (channels,) largest |x| of each channel.
        tokens: largest |x| of each token, in order, a tensor (tokens,) for each `add`.
    """

    linears: tuple[str, ...]
    elements: int = 0
    zeros: int = 0
    kernel: dict[str, int] = field(default_factory=dict)
    smaller: int = 0
    channels: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, grids: Sequence[GridOn]) -> None:
        """Count what passed together, x (..., tokens, channels).

        Raises:
            LowbitError: some of it is not finite.
        """
        x = x.float()
        if not bool(torch.isfinite(x).all()):
            raise LowbitError(
                f"'{self.linears[0]}' gets activations that are not finite: check the model and "
                "its dtype."
            )
        size = x.abs()
        self.elements += x.numel()
        nothing = x == 0
        self.zeros += int(nothing.sum())
        columns, tokens = size.flatten(0, -2).amax(0), size.amax(-1)
        self.smaller += int((columns < tokens[..., None]).sum())
        self.channels = columns if self.channels is None else torch.maximum(self.channels, columns)
        self.tokens.append(tokens.flatten())
        for g in grids:
            self.kernel[g.name] = self.kernel.get(g.name, 0) + int((g.zeros(x) & ~nothing).sum())

    def as_dict(self) -> dict[str, Any]:
        """Return shares and outlier statistics as plain data."""
        assert self.channels is not None
        tokens = torch.cat(self.tokens)
        rest = max(1, self.elements - self.zeros)
        return {
            "linears": list(self.linears),
            "elements": self.elements,
            "zeros": self.zeros / self.elements,
            "kernel": {k: n / rest for k, n in self.kernel.items()},
            "smaller_channel": self.smaller / self.elements,
            "largest": float(self.channels.max()),
            "channel_spread": _over_median(self.channels),
            "token_spread": _over_median(tokens),
            "outlier_channels": int((self.channels >= _OUTLIER).sum()),
            "channels": len(self.channels),
        }


def _over_median(values: Tensor) -> float:
    """Return the largest over the median, infinite where the median is zero."""
    middle = float(values.median())
    return float(values.max()) / middle if middle > 0 else float("inf")


def sites_of(described: Described) -> list[tuple[str, ...]]:
    """Return the full names of every block's linears, those that read the same tokens together."""
    return [
        tuple(f"{described.block_name(i)}.{n}" for n in names)
        for i in range(len(described.of_layers))
        for names in described.graph(i).readings
    ]


@torch.no_grad()
def measure(
    model: Any,
    described: Described,
    windows: Tensor,
    grids: Sequence[GridOn],
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Site]:
    """Count kernel shares and outliers of every linear's input while windows of tokens pass; of
    linears that some token reaches.

    Args:
        model: as transformers loads it. described: its blocks.
        windows: (n, length) int64 token ids.
        batch: windows that pass together.
        progress: called with windows done and windows in all after each pass.

    Raises:
        LowbitError: an activation is not finite.
    """
    check_windows(windows, vocabulary(model))
    sites = [Site(names) for names in sites_of(described)]

    def hook_of(site: Site) -> Any:
        return lambda _, args: site.add(args[0], grids)

    handles = [
        model.get_submodule(s.linears[0]).register_forward_pre_hook(hook_of(s)) for s in sites
    ]
    try:
        for at in range(0, len(windows), batch):
            model(windows[at : at + batch].to(model.device), use_cache=False)
            if progress:
                progress(min(at + batch, len(windows)), len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return [s for s in sites if s.channels is not None]


def mean_kernel(sites: Sequence[Site], name: str) -> float:
    """Return the kernel share under a grid, averaged over linears, each counted alike."""
    shares = [s.kernel[name] / max(1, s.elements - s.zeros) for s in sites for _ in s.linears]
    return sum(shares) / len(shares)
