"""How windows of attention repeat from block to block, for runtimes that know nothing else."""

from __future__ import annotations

from collections.abc import Sequence


def period(layer_types: Sequence[str], usual: int) -> int | None:
    """The number n for which every n-th block attends to all tokens and the others to a window.

    Args:
        layer_types: of each block, as transformers has them. usual: taken if it fits.
    """
    windows = [kind == "sliding_attention" for kind in layer_types]
    tried = (usual, *range(1, len(windows) + 2))
    fits = (n for n in tried if windows == [i % n < n - 1 for i in range(len(windows))])
    return next(fits, None)
