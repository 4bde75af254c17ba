"""What comes next, made in a thread while what came last is worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each being made while the one before it is worked on: two are held.

    What making one raises is raised where it would be given. Where the work ends early, the one
    being made is waited for, and no other is begun.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, "ahead") as pool:
        following = pool.submit(next, source, _END)
        while (item := following.result()) is not _END:
            following = pool.submit(next, source, _END)
            yield item  # type: ignore[misc]
