"""Which of several candidates has the least error, where an error is a sum over parts of the
calibration tokens, none negative, and most candidates are not worth all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

# (numbers of candidates, parts) -> (candidates, parts), what is no number infinite
Errors = Callable[[Sequence[int], range], list[list[float]]]

FIRST = 3  # parts that all candidates are seen on, where likely losers are left


def least(count: int, parts: int, errors: Errors, doubt: float = 0.0) -> int | None:
    """The number of the candidate with the least error, the first of equal ones; None if none is
    finite.

    Args:
        count: of candidates. parts: of an error.
        doubt: 0 leaves a candidate only once it cannot win, so that what is chosen is what all
            errors would choose. Else one is left as soon as it is so many standard errors above the
            best one, part by part over those seen by both.
    """
    if doubt:
        return _likely(count, parts, errors, doubt)
    return _certain([e[0] for e in errors(range(count), range(1))], parts, errors)


def _certain(firsts: Sequence[float], parts: int, errors: Errors) -> int | None:
    """The most promising after one part go first; one is left once it has outgrown the least error
    that is known.
    """
    best, smallest = None, math.inf
    for i in sorted(range(len(firsts)), key=lambda i: (firsts[i], i)):
        total = firsts[i]
        if total > smallest or total == math.inf:
            break
        for part in range(1, parts):
            total += errors([i], range(part, part + 1))[0][0]
            if not total <= smallest:
                break
        if total < smallest or (total == smallest and best is not None and i < best):
            best, smallest = i, total
    return best


def _likely(count: int, parts: int, errors: Errors, doubt: float) -> int | None:
    """All candidates on a few parts, those left on twice as many, and so on."""
    alive, seen = list(range(count)), [list[float]() for _ in range(count)]
    for part in _doubling(parts):
        for i, found in zip(alive, errors(alive, part), strict=True):
            seen[i] += found
        best = min(alive, key=lambda i: (math.fsum(seen[i]), i))
        if math.inf in seen[best]:
            return None
        alive = [i for i in alive if i == best or not _worse(seen[i], seen[best], doubt)]
        if len(alive) == 1:
            break
    return best


def _doubling(parts: int) -> Iterator[range]:
    at = 0
    while at < parts:
        upto = min(parts, max(FIRST, 2 * at))
        yield range(at, upto)
        at = upto


def _worse(errors: Sequence[float], best: Sequence[float], doubt: float) -> bool:
    """Whether the mean difference is above zero by more than so many standard errors."""
    if math.inf in errors:
        return True
    n = len(errors)
    differences = [a - b for a, b in zip(errors, best, strict=True)]
    mean = math.fsum(differences) / n
    if n < 2:
        return False
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    return mean > doubt * spread / math.sqrt(n)
