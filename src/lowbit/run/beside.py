"""One piece of work in a thread, beside what the run computes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def beside(work: Callable[[], T], name: str) -> Callable[[], T]:
    """Begin some work in a thread of its own.

    Args:
        work: computes no gradients. name: of the thread, which debuggers show.

    Returns:
        waits until the work is done, and gives its result or raises its error; to be called once.
    """

    def quietly() -> T:
        with torch.no_grad():  # which every thread decides for itself
            return work()

    pool = ThreadPoolExecutor(1, name)
    running = pool.submit(quietly)
    pool.shutdown(wait=False)  # takes nothing more
    return running.result
