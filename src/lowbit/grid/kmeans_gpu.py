"""The cuts of K-means in Triton: a program finds those of one list, by the dynamic programming and
the Lloyd steps of `kmeans`, which takes some hundred launches otherwise.
"""

# Triton's language is not Python's, and what a kernel takes has no type in either.
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator, operator, arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HELD = 1 << 24  # numbers of the tables of costs that are held at a time
_CHUNK = 1024  # numbers of a list that are compared at a time


@triton.jit
def _spread(mass, first, second, before_mass, before_first, before_second):
    """The sum of squared distances of clusters to their means, from the ends' prefix sums."""
    m = tl.maximum(mass - before_mass, 1e-300)
    s = first - before_first
    return tl.maximum((second - before_second) - s * s / m, 0.0)


@triton.jit
def _mean(ordered, shift, mass, first, low, high, last):
    """Means between cuts less ``shift``; of an empty cluster the value that it starts at."""
    m = tl.load(mass + high) - tl.load(mass + low)
    s = tl.load(first + high) - tl.load(first + low)
    start = tl.load(ordered + tl.minimum(low, last)).to(tl.float64) - shift
    return tl.where(m > 0.0, s / tl.maximum(m, 1e-300), start)


@triton.jit
def _not_above(ordered, limit, length, DEPTH: tl.constexpr):
    """How many of the ascending numbers are at most each limit."""
    low = tl.zeros_like(limit).to(tl.int32)
    high = low + length
    for _ in range(DEPTH):
        middle = (low + high) // 2
        there = tl.load(ordered + tl.minimum(middle, length - 1))
        above = (middle < high) & (there <= limit)
        high = tl.where((middle < high) & (there > limit), middle, high)
        low = tl.where(above, middle + 1, low)
    return low


@triton.jit
def _distinct(ordered, out, levels, length, WRITES: tl.constexpr, CHUNK: tl.constexpr):
    """How many different numbers there are; the first ``levels`` of them are written."""
    count = 0
    for start in range(0, length, CHUNK):
        at = start + tl.arange(0, CHUNK)
        here = tl.load(ordered + at, mask=at < length, other=0.0)
        before = tl.load(ordered + at - 1, mask=(at > 0) & (at < length), other=0.0)
        new = ((at == 0) | (here != before)) & (at < length)
        if WRITES:
            number = count + tl.cumsum(new.to(tl.int32), 0) - 1
            tl.store(out + number, here, mask=new & (number < levels))
        count += tl.sum(new.to(tl.int32), 0)
    return count


@triton.jit
def _cluster(
    ordered,
    shift,
    mass,
    first,
    second,
    ranks,
    tables,
    out,
    sse,
    length,
    count,
    levels,
    STEPS: tl.constexpr,
    DEPTH: tl.constexpr,
    COUNT: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The levels of one ascending list and their sum of squared distances.

    mass, first, second: its prefix sums, from 0 on; ranks: where cuts are allowed, ``count`` of
    them; tables: (levels - 1, COUNT), what the numbers up to each rank cost with so many levels.
    """
    list_ = tl.program_id(0).to(tl.int64)
    ordered += list_ * length
    mass += list_ * (length + 1)
    first += list_ * (length + 1)
    second += list_ * (length + 1)
    tables += list_ * (levels - 1) * COUNT
    out += list_ * levels
    offset = tl.load(shift + list_)

    to = tl.arange(0, COUNT)
    there = to < count
    rank = tl.load(ranks + to, mask=there, other=0)
    m, f, s = tl.load(mass + rank), tl.load(first + rank), tl.load(second + rank)
    for layer in range(levels - 1):
        least = tl.full((COUNT,), float("inf"), dtype=tl.float64)
        # A first cluster starts at the first rank.
        for start in range(tl.where(layer == 0, 1, count)):
            at = tl.load(ranks + start)
            own = _spread(m, f, s, tl.load(mass + at), tl.load(first + at), tl.load(second + at))
            if layer > 0:
                own += tl.load(tables + (layer - 1) * COUNT + start)
            least = tl.minimum(least, tl.where(to < start, float("inf"), own))
        tl.store(tables + layer * COUNT + to, least, mask=there)
        tl.debug_barrier()  # before others of this program read it

    place = tl.arange(0, LEVELS)
    low, high = tl.zeros((LEVELS,), dtype=tl.int32), tl.zeros((LEVELS,), dtype=tl.int32) + length
    at = count - 1
    for back in range(1, levels):
        layer = levels - 1 - back
        end = tl.load(ranks + at)
        own = _spread(tl.load(mass + end), tl.load(first + end), tl.load(second + end), m, f, s)
        own += tl.load(tables + layer * COUNT + to, mask=there, other=float("inf"))
        found = tl.argmin(tl.where(there & (to <= at), own, float("inf")), 0)
        at = tl.minimum(found, count - 1)
        cut = tl.load(ranks + at)
        low = tl.where(place == layer + 1, cut, low)
        high = tl.where(place == layer, cut, high)

    center = _mean(ordered, offset, mass, first, low, high, length - 1)
    step, moving = 0, 1
    while (step < STEPS) & (moving > 0):
        following = tl.gather(center, tl.minimum(place + 1, LEVELS - 1), 0)
        limit = ((center + following) / 2 + offset).to(tl.float32)
        moved = tl.where(place < levels - 1, _not_above(ordered, limit, length, DEPTH), length)
        moving = tl.sum((moved != high).to(tl.int32), 0)
        high = moved
        low = tl.where(place > 0, tl.gather(high, tl.maximum(place - 1, 0), 0), 0)
        center = _mean(ordered, offset, mass, first, low, high, length - 1)
        step += 1

    own = _spread(
        tl.load(mass + high),
        tl.load(first + high),
        tl.load(second + high),
        tl.load(mass + low),
        tl.load(first + low),
        tl.load(second + low),
    )
    few = _distinct(ordered, out, levels, length, False, CHUNK) <= levels
    total = tl.sum(tl.where((place < levels) & (high > low), own, 0.0), 0)
    tl.store(sse + list_, tl.where(few, 0.0, total))
    last = tl.load(ordered + length - 1)
    tl.store(out + place, tl.where(few, last, (center + offset).to(tl.float32)), place < levels)
    if few:
        tl.debug_barrier()
        _distinct(ordered, out, levels, length, True, CHUNK)


def clusters(
    ordered: Tensor,
    shift: Tensor,
    mass: Tensor,
    first: Tensor,
    second: Tensor,
    ranks: Tensor,
    levels: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Levels of lists and their sums of squared distances, as `kmeans` gives them.

    Args:
        ordered: (lists, n) float32, ascending. shift: (lists, 1) float64, taken off them in what
            follows. mass, first, second: (lists, n + 1) float64, prefix sums of the weights, and of
            them times numbers and squares. ranks: (count,) int64 ascending, where cuts are allowed,
            from 0 to n.
        steps: of Lloyd, at most.
    """
    lists, length = ordered.shape
    device, count = ordered.device, triton.next_power_of_2(len(ranks))
    out = torch.empty(lists, levels, device=device)
    sse = torch.empty(lists, dtype=torch.float64, device=device)
    together = max(1, _HELD // (levels * count))
    shape = (min(lists, together), max(1, levels - 1), count)
    tables = torch.empty(shape, dtype=torch.float64, device=device)
    for at in range(0, lists, together):
        rows = slice(at, min(at + together, lists))
        # Triton launches where the current device is, whatever the tensors' is.
        with torch.cuda.device_of(ordered):
            _cluster[(rows.stop - at,)](
                ordered[rows].contiguous(),
                shift[rows],
                *(t[rows].contiguous() for t in (mass, first, second)),
                ranks.to(torch.int32),
                tables,
                out[rows],
                sse[rows],
                length,
                len(ranks),
                levels,
                STEPS=steps,
                DEPTH=length.bit_length(),
                COUNT=count,
                LEVELS=triton.next_power_of_2(levels),
                CHUNK=_CHUNK,
                num_warps=4,
            )
    return out, sse


def try_out(device: torch.device) -> None:
    """Launch the kernel once."""
    x = torch.zeros(1, 4, device=device)
    shift = torch.zeros(1, 1, dtype=torch.float64, device=device)
    sums = torch.zeros(1, 5, dtype=torch.float64, device=device)
    clusters(x, shift, sums, sums, sums, torch.arange(5, device=device), 2, 1)
