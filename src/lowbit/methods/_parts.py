"""Rows of linears, as work on them is cut and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..grid import Coded, QTensor
from ..grid.params import stacked
from ..model.block import Block
from ..model.dealing import cut, divided, parts_of

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Rows of a linear. ``whole`` where they are all of it."""

    linear: str
    rows: slice
    whole: bool = True

    @property
    def count(self) -> int:
        """How many rows."""
        return len(range(self.rows.start, self.rows.stop))


Part = tuple[Span, ...]  # what is coded together


def whole(block: Block, names: Sequence[str]) -> Part:
    """All rows of some linears."""
    return tuple(Span(n, slice(0, len(block.weight(n)))) for n in names)


def divided_rows(part: Part, parts: int) -> list[Part]:
    """Rows that may be coded apart, in parts of about one size."""
    out = []
    for piece in cut(sum(s.count for s in part), parts):
        at, spans = 0, []
        for span in part:
            first, last = max(piece.start - at, 0), min(piece.stop - at, span.count)
            if first < last:
                rows = slice(span.rows.start + first, span.rows.start + last)
                spans.append(Span(span.linear, rows, span.whole and last - first == span.count))
            at += span.count
        out.append(tuple(spans))
    return out


def joined(found: Iterable[tuple[Span, Coded]]) -> dict[str, Coded]:
    """Codes of linears from those of their rows, which come in order."""
    parts: dict[str, list[Coded]] = {}
    for span, q in found:
        parts.setdefault(span.linear, []).append(q)
    return {name: _above(qs) for name, qs in parts.items()}


def _above(parts: Sequence[Coded]) -> Coded:
    """One weight of rows that share no params and have no outliers."""
    if len(parts) == 1:
        return parts[0]
    codes = torch.cat([q.codes for q in parts])
    return QTensor(parts[0].grid, codes, stacked([q.params for q in parts]))


def by_rows(block: Block, names: Sequence[str], work: Callable[[Span], T]) -> dict[str, list[T]]:
    """Results of work on rows that do not depend on each other, dealt out over ranks.

    Args:
        names: of linears. work: as in `divided`; takes time in proportion to weights.

    Returns:
        linear -> results, in the order of its rows: one, of all of them, on a single rank.
    """
    parts = parts_of([block.weight(n).numel() for n in names], block.ranks.size)
    spans: list[Span] = []
    for name, count in zip(names, parts, strict=True):
        apart = block.grids[name].rows_apart
        spans += (s for [s] in divided_rows(whole(block, [name]), count if apart else 1))
    costs = [float(s.count * block.weight(s.linear).shape[1]) for s in spans]
    out: dict[str, list[T]] = {}
    found = divided(block.ranks, costs, lambda i: work(spans[i]))
    for span, result in zip(spans, found, strict=True):
        out.setdefault(span.linear, []).append(result)
    return out
