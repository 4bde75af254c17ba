"""The codebook grid: a weight is one of 2**bits levels that were chosen for its column (or row, or
matrix) by K-means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import Params
from .kmeans import NotFiniteError, kmeans

Per = Literal["column", "row", "tensor"]


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
class Codebook:
    """Ordered levels without any law. Holds no tensors.

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
        if self.per not in ("column", "row", "tensor"):
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
    def scales_with_inputs(self) -> bool:
        """Whether scaling an input channel scales its levels and nothing else, so that it changes
        no code.
        """
        return self.per == "column" and (self.group_size or 1) == 1

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
        return (
            lists.reshape(-1, rows).T.contiguous()
            if self.per == "column"
            else lists.reshape(rows, -1)
        )

    def fit(
        self, w: Tensor, widths: Tensor | None = None, weights: Tensor | None = None
    ) -> CodebookParams:
        """Levels by K-means.

        Args:
            w: (out, in) float.
            widths: (books,) bits of each book; None for ``bits`` everywhere.
            weights: (out, in) positive importance of each weight, or None.
        """
        lists = self.lists(w)
        importance = None if weights is None else self.lists(weights)
        if widths is None:
            widths = torch.full((len(lists),), self.bits, dtype=torch.int64, device=w.device)
        levels = torch.empty(
            len(lists), 1 << int(widths.max()), dtype=torch.float32, device=w.device
        )
        for width in sorted(set(widths.tolist())):
            of = widths == width
            found, _ = kmeans(lists[of], 1 << width, None if importance is None else importance[of])
            levels[of] = torch.cat(
                [found, found[:, -1:].expand(-1, levels.shape[1] - found.shape[1])], 1
            )
        return CodebookParams(
            levels.to(w.dtype if w.dtype.is_floating_point else torch.float32), widths
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
        return self.unlisted(params.levels.gather(1, self.lists(codes).to(torch.int64)), len(codes))

    def stored(self, params: CodebookParams, dtype: torch.dtype) -> CodebookParams:
        """The same levels after a trip through float16, in which artifacts store them, whatever the
        ``dtype`` of the model.

        Raises:
            NotFiniteError: a level is beyond float16.
        """
        levels = params.levels.to(torch.float16)
        if not bool(torch.isfinite(levels).all()):
            raise NotFiniteError(
                f"a level of {float(params.levels.abs().max()):g} does not fit in float16, in "
                "which codebooks are stored"
            )
        return CodebookParams(levels.to(params.levels.dtype), params.widths)

    def __str__(self) -> str:
        shared = f"{self.group_size} columns" if self.group_size else self.per
        return f"W{self.bits} codebook per {shared}"
