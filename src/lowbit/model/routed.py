"""How many tokens of a stream each expert gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .experts import Experts

_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")  # of experts


class Routed:
    """Counts of a stream's tokens, row by row: rows that pass again are counted anew, in place of
    what was counted before.

    Args:
        module: of the block. mixtures: modules inside it that hold experts.
        rows: of the stream. length: tokens a row. device: of the block.
    """

    def __init__(
        self,
        module: nn.Module,
        mixtures: Sequence[str],
        rows: int,
        length: int,
        device: torch.device,
    ) -> None:
        self._length = length
        held = {name: module.get_submodule(name) for name in mixtures}
        self._experts = {n: m for n, m in held.items() if isinstance(m, Experts)}
        self._counts = {
            n: torch.zeros(rows, m.form.count, dtype=torch.int64, device=device)
            for n, m in self._experts.items()
        }

    @contextmanager
    def passing(self, part: slice) -> Iterator[None]:
        """Within, some rows of the stream pass through the block, once."""
        handles: list[RemovableHandle] = []
        try:
            for name, experts in self._experts.items():
                counter = _Counter(experts, self._counts[name][part].zero_(), self._length)
                handles.append(experts.register_forward_pre_hook(counter, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tokens(self, rows: int) -> dict[str, Tensor]:
        """Mixture -> (experts,) int64, the tokens of the first rows that each expert got."""
        return {name: counts[:rows].sum(0) for name, counts in self._counts.items()}


class _Counter:
    """Counts what experts are called with while some rows pass.

    Args:
        counts: (rows, experts) int64, to which it is added. length: tokens a row.
    """

    def __init__(self, experts: Experts, counts: Tensor, length: int) -> None:
        self._form, self._counts, self._length, self._passed = experts.form, counts, length, 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        x = named["hidden_states"] if self._form.sorted else named["top_k_index"]
        sent = self._sorted(x) if self._form.sorted else self._chosen(x)  # (tokens, experts)
        token = torch.arange(self._passed, self._passed + len(sent), device=sent.device)
        self._passed += len(sent)
        self._counts.index_add_(0, token // self._length % len(self._counts), sent)

    def _chosen(self, index: Tensor) -> Tensor:
        """What (tokens, k) choices send to each expert; some choices are no experts."""
        index = index.flatten(0, -2).long()
        sent = index.new_zeros(len(index), self._form.count + self._form.identities)
        return sent.scatter_add_(1, index, torch.ones_like(index))[:, : self._form.count]

    def _sorted(self, x: Tensor) -> Tensor:
        """The same of rows (experts * tokens, hidden), of which zeros were not sent."""
        return x.detach().flatten(0, -2).ne(0).any(-1).view(self._form.count, -1).T.long()
