"""The codebook grid: a weight is one of 2**bits levels that were chosen for its column (or row, or
matrix) by K-means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .base import ColumnGrid, Fixed, Levels, Neighbours
from .kmeans import NotFiniteError, kmeans
from .params import Params
from .straight import through
from .sums import sums_by

Per = Literal["column", "row", "tensor"]

_HALF = torch.finfo(torch.float16)
_NAME = re.compile(r"w(\d+)(?:g(\d+))?:([a-z]+)", re.IGNORECASE)


@dataclass(frozen=True)
class CodebookParams(Params):
    """What a `Codebook` grid needs besides its codes.

    Attributes:
        levels: (books, 2**widest) float, ascending; a narrower book repeats its last level.
        widths: (books,) int64, the bits of each book.
    """

    levels: Tensor
    widths: Tensor


@dataclass(frozen=True)
class Codebook(ColumnGrid[CodebookParams]):
    """Ordered levels without any law.

    Attributes:
        bits: 1 to 8; single books may be wider or narrower, see `CodebookParams`.
        per: what shares a book: a column (an input channel, as in CLAQ), a row (an output channel)
            or the whole matrix.
        group_size: neighbouring columns that share a book, with ``per`` "column"; None for one.
    """

    bits: int
    per: Per = "column"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.per not in get_args(Per):
            raise ValueError(f"a codebook is per column, row or tensor, not per {self.per!r}")
        if self.group_size is not None and (self.group_size < 1 or self.per != "column"):
            raise ValueError(
                "group_size is the number of columns that share a book: at least 1, and only per "
                "column"
            )

    @property
    def top(self) -> int:
        """The highest code of a book of ``bits``."""
        return (1 << self.bits) - 1

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        return f"W{self.bits}{group}:{self.per}"

    def __str__(self) -> str:
        shared = f"{self.group_size} columns" if self.group_size else self.per
        return f"W{self.bits} codebook per {shared}"

    @classmethod
    def parse(cls, text: str) -> Codebook | None:
        found = _NAME.fullmatch(text)
        if not found:
            return None
        bits, group, per = found.groups()
        return cls(int(bits), per.lower(), int(group) if group else None)  # type: ignore[arg-type]

    @property
    def scales_with_inputs(self) -> bool:
        return self.per == "column" and (self.group_size or 1) == 1

    def with_bits(self, bits: int) -> Codebook:
        return replace(self, bits=bits)

    def check(self, width: int) -> None:
        self.books(1, width)

    @property
    def rows_apart(self) -> bool:
        return self.per == "row"

    @property
    def of_lists(self) -> Codebook:
        return Codebook(self.bits, "row")

    def cut(self, params: CodebookParams, lists: int) -> CodebookParams:
        return params

    def uncut(self, params: CodebookParams, rows: int) -> CodebookParams:
        return params

    def period(self, width: int) -> int | None:
        return 1 if self.scales_with_inputs else None

    def books(self, rows: int, columns: int) -> int:
        """How many books a (rows, columns) weight has.

        Raises:
            ValueError: the group size does not divide the columns.
        """
        if self.per != "column":
            return rows if self.per == "row" else 1
        size = self.group_size or 1
        if columns % size:
            raise ValueError(f"group size {size} does not divide the {columns} inputs")
        return columns // size

    def lists(self, w: Tensor) -> Tensor:
        """(out, in) -> (books, n), what shares a book in one row."""
        books = self.books(*w.shape)
        return (w.T if self.per == "column" else w).reshape(books, -1)

    def unlisted(self, lists: Tensor, rows: int) -> Tensor:
        """The inverse of `lists` for a weight of so many rows."""
        if self.per == "column":
            return lists.reshape(-1, rows).T.contiguous()
        return lists.reshape(rows, -1)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> CodebookParams:
        """Levels by K-means, the same number in every book.

        Args:
            w: (out, in) float. importance: (in,) or (out, in) positive, or None.
        """
        books = self.books(*w.shape)
        widths = torch.full((books,), self.bits, dtype=torch.int64, device=w.device)
        levels = _clustered(self.lists(w), self.bits, self._listed(w, importance))
        return CodebookParams(levels.to(w.dtype), widths)

    def refined(self, params: CodebookParams, column: int, w: Tensor, steps: int) -> CodebookParams:
        levels, values = params.levels[column, : self.top + 1], w[:, 0]
        for _ in range(steps):
            levels = _lloyd(values, levels)
        return CodebookParams(levels[None], params.widths[column : column + 1])

    def fit_columns(
        self, w: Tensor, widths: Tensor, importance: Tensor | None = None
    ) -> CodebookParams:
        lists, weights = self.lists(w), self._listed(w, importance)  # (books, n)
        kinds = sorted(set(widths.tolist()))
        levels = torch.empty(len(lists), 1 << kinds[-1], dtype=torch.float32, device=w.device)
        for width in kinds:
            of = widths == width
            chosen = None if weights is None else weights[of]
            found = _clustered(lists[of], width, chosen)  # (books of this width, 2**width)
            levels[of] = _padded(found, levels.shape[1])
        return CodebookParams(levels.to(w.dtype), widths)

    def _listed(self, w: Tensor, importance: Tensor | None) -> Tensor | None:
        return None if importance is None else self.lists(importance.expand_as(w))

    def join(self, parts: list[CodebookParams]) -> CodebookParams:
        most = max(p.levels.shape[1] for p in parts)
        return CodebookParams(
            torch.cat([_padded(p.levels, most) for p in parts]),
            torch.cat([p.widths for p in parts]),
        )

    def encode(self, w: Tensor, params: CodebookParams) -> Tensor:
        """Codes of the nearest levels, the lower one halfway. (out, in) float -> (out, in)
        uint8.
        """
        middle = (params.levels[:, 1:] + params.levels[:, :-1]) / 2
        codes = torch.searchsorted(
            middle.contiguous(), self.lists(w).to(middle.dtype).contiguous(), out_int32=True
        )
        codes = torch.minimum(codes, (1 << params.widths[:, None]) - 1)
        return self.unlisted(codes.to(torch.uint8), len(w))

    def decode(self, codes: Tensor, params: CodebookParams) -> Tensor:
        """(out, in) codes -> (out, in) weights in the levels' dtype."""
        found = _looked_up(params.levels, self.lists(codes).to(torch.int64))
        return self.unlisted(found, len(codes))

    def stored(self, params: CodebookParams, dtype: torch.dtype) -> CodebookParams:
        """The same levels after a trip through float16, in which artifacts store them, whatever the
        ``dtype`` of the model.
        """
        held = params.levels.detach().to(torch.float16).to(params.levels.dtype)
        return CodebookParams(through(params.levels, held), params.widths)

    def check_finite(self, params: CodebookParams) -> None:
        if not params.finite():
            raise NotFiniteError("a level does not fit in float16, in which codebooks are stored")

    def take(self, params: CodebookParams, column: int) -> Levels:
        if self.per != "column":
            return Fixed(self, params)
        book = column // (self.group_size or 1)
        alone = len(params.levels) == 1  # as wide as its levels, which others may not be
        return _Book(params.levels[book], None if alone else params.widths[book])

    def neighbours(self, w: Tensor, params: CodebookParams) -> Neighbours:
        levels, tops = params.levels.float().contiguous(), _tops(params)
        lists = self.lists(w).float().contiguous()  # (books, n)
        below = torch.searchsorted(levels, lists, right=True) - 1
        base = below.clamp(min=0).minimum(tops)
        other = (base + 1).minimum(tops)
        start, end = levels.gather(1, base), levels.gather(1, other)
        fraction = ((lists - start) / (end - start).clamp(min=1e-30)).clamp(0, 1 - 2**-24)
        low, high = (self.unlisted(t.to(torch.uint8), len(w)) for t in (base, other))
        return Neighbours(low, high, self.unlisted(fraction.masked_fill(base == other, 0), len(w)))

    def beside(self, codes: Tensor, toward: Tensor, params: CodebookParams) -> Tensor:
        lists = self.lists(codes).to(torch.int64)
        wanted = (lists + self.lists(toward).to(torch.int64)).clamp(min=0).minimum(_tops(params))
        return self.unlisted(wanted.to(torch.uint8), len(codes))

    def freedom(self, params: CodebookParams) -> torch.Size:
        return params.levels.shape

    def moved(self, params: CodebookParams, factor: Tensor) -> CodebookParams:
        """Every level moves by up to its book's mean gap, so as fast as a scale does."""
        tops, levels = _tops(params), params.levels
        gap = ((levels.gather(1, tops) - levels[:, :1]) / tops).clamp(min=_HALF.tiny)
        moved = levels + gap * (factor - 1)
        return CodebookParams(moved.clamp(-_HALF.max, _HALF.max), params.widths)

    def arranged(self, codes: Tensor, params: CodebookParams) -> tuple[Tensor, CodebookParams]:
        tops = _tops(params)
        place = torch.arange(params.levels.shape[1], device=codes.device)
        beyond = params.levels.masked_fill(place > tops, float("inf"))
        ordered, order = beyond.sort(dim=1, stable=True)
        # Repeated levels stay at the end.
        levels = torch.where(place > tops, ordered.gather(1, tops), ordered)
        lists = order.argsort(1).gather(1, self.lists(codes).to(torch.int64))
        arranged = self.unlisted(lists.to(torch.uint8), len(codes))
        return arranged, CodebookParams(levels, params.widths.clone())


@dataclass(frozen=True, eq=False)
class _Book:
    """`Levels` of one column: levels (2**widest,), ascending; width () int64, None for widest."""

    levels: Tensor
    width: Tensor | None

    def encode(self, w: Tensor) -> Tensor:
        middle = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(w.to(middle.dtype).contiguous(), middle, out_int32=True)
        if self.width is not None:
            codes = torch.minimum(codes, (1 << self.width) - 1)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return self.levels.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def _tops(params: CodebookParams) -> Tensor:
    """(books, 1) int64, the highest code of each book."""
    return (1 << params.widths[:, None]) - 1


def _padded(levels: Tensor, count: int) -> Tensor:
    """(books, n) levels as (books, count), the last one repeated."""
    missing = count - levels.shape[1]
    return torch.cat([levels, levels[:, -1:].expand(-1, missing)], 1) if missing else levels


def _clustered(lists: Tensor, bits: int, weights: Tensor | None) -> Tensor:
    """(books, n) -> (books, 2**bits) levels. To look whether all is finite would wait for an
    accelerator: there `check_finite` tells of the levels.
    """
    return kmeans(lists, 1 << bits, weights, checked=lists.device.type == "cpu")[0]


def _lloyd(values: Tensor, levels: Tensor) -> Tensor:
    """One step: assign, then move each level to the mean of what it got."""
    codes = torch.bucketize(values, ((levels[1:] + levels[:-1]) / 2).to(values.dtype))
    added = torch.stack([values.to(levels.dtype), torch.ones_like(values, dtype=levels.dtype)])
    sums, counts = sums_by(codes.expand_as(added), added, len(levels))
    return torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort().values


class _LookUp(torch.autograd.Function):
    """Levels by their (books, n) index; sums their gradients in one order."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = levels.shape[1]
        return levels.gather(1, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return sums_by(index, gradients[0].contiguous(), ctx.count), None


def _looked_up(levels: Tensor, index: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and levels.requires_grad):
        return levels.gather(1, index)
    found: Tensor = _LookUp.apply(levels, index)  # type: ignore[no-untyped-call]
    return found
