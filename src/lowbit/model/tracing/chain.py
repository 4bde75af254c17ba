"""Whether a model runs its blocks as `lowbit.model.stream` does: each once a pass, each on what the
one before it returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import LowbitError
from ..recorder import Recorder
from ..turning import rows_first

_SAME = 1e-5  # some models change the dtype between blocks


class Chain:
    """Notes what blocks return while it is entered.

    Args:
        recorders: in the places of the blocks.
    """

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = recorders
        self._returned: list[list[Tensor]] = [[] for _ in recorders]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Chain:
        for recorder, found in zip(self._recorders, self._returned, strict=True):
            self._handles.append(recorder.register_forward_hook(_noting(recorder, found)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def check_once(self, model: str) -> None:
        """Refuse a pass in which a block did not run, or ran several times.

        Args:
            model: whose pass it was, in words.

        Raises:
            LowbitError: naming the block.
        """
        for i, returned in enumerate(self._returned):
            if len(returned) != 1:
                raise LowbitError(
                    f"{model} that runs block {i} {len(returned)} times in a pass: models whose "
                    "blocks do not run once each, one after the other, are not supported yet. "
                    "Nothing was written."
                )

    def check_order(self, model: str, inputs: Sequence[Tensor]) -> None:
        """Refuse a pass in which a block was given something else than what the one before it
        returned.

        Args:
            model: as above. inputs: of the blocks.

        Raises:
            LowbitError: naming the block.
        """
        for i, ((before,), x) in enumerate(zip(self._returned, inputs[1:], strict=False)):
            alike = before.shape == x.shape and torch.allclose(
                before.to(x.dtype), x, rtol=_SAME, atol=_SAME
            )
            if not alike:
                raise LowbitError(
                    f"{model} that gives block {i + 1} something else than what block {i} returns: "
                    "models whose blocks do not run one after the other are not supported yet. "
                    "Nothing was written."
                )


def _noting(recorder: Recorder, found: list[Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        found.append(rows_first(first) if recorder.turned else first)

    return hook
