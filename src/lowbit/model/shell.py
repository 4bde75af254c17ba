"""What lies around the blocks, as it runs: embeddings, masks and rotary tables before them, norm
and head after them.

The model's own forward pass computes all of it, with recorders where its blocks were; so whatever
a family does there (factors, caps, tables per kind of layer) is done as the family does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .graph import Frame
from .recorder import Called, Recorder
from .skeleton import compute_buffers
from .turning import turn

CACHES = ("past_key_values", "layer_past", "past_key_value", "cache_params")


class Shell:
    """A model's skeleton, its blocks taken out.

    Attributes:
        skeleton: the transformers model on the meta device, with recorders for blocks. blocks: the
            modules that were there.
    """

    def __init__(self, skeleton: Any, frame: Frame) -> None:
        """
        Args:
            skeleton: of transformers, on the meta device; it is changed.
        """
        self.skeleton = skeleton
        compute_buffers(skeleton)
        self.blocks: list[nn.Module] = list(self.skeleton.get_submodule(frame.layers).children())
        form: list[Any] = [(None,) * frame.returns] if frame.returns else []
        self._recorders = [Recorder(b, form) for b in self.blocks]
        if frame.turned:
            for block, recorder in zip(self.blocks, self._recorders, strict=True):
                turn(block)
                recorder.turned = True
        parent, _, own = frame.layers.rpartition(".")
        setattr(self.skeleton.get_submodule(parent), own, nn.ModuleList(self._recorders))
        self._frame = frame

    @cached_property
    def stored(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of everything outside the blocks that a checkpoint stores."""
        names = {
            n: tuple(p.shape) for n, p in self.skeleton.named_parameters(remove_duplicate=False)
        }
        return {**names, **{n: tuple(b.shape) for n, b in _persistent(self.skeleton)}}

    @cached_property
    def stored_in(self) -> list[dict[str, tuple[int, ...]]]:
        """The same of each block, by names inside the block."""
        return [
            {n: tuple(t.shape) for n, t in (*b.named_parameters(), *_persistent(b))}
            for b in self.blocks
        ]

    def enter(self, ids: Tensor, tensors: Mapping[str, Tensor]) -> list[Called]:
        """What every block is called with if none of them changes anything.

        Args:
            ids: (n, length) int64. tensors: everything outside the blocks by full name.
        """
        own = f"{self._frame.trunk}."
        held = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
        trunk = self.skeleton.get_submodule(self._frame.trunk)
        functional_call(trunk, held, (ids,), {"use_cache": False}, tie_weights=False)
        return [r.called() for r in self._recorders]

    def readout(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """The last block's output (n, length, hidden) -> logits (n, length, vocab) float32;
        differentiable by its input.

        Args:
            tensors: as in `enter`.
        """
        steps = self._last_steps(tensors) if self._frame.plain else []
        # Between modules in several dtypes a model casts as its own forward pass says.
        if len({t.dtype for _, held in steps for t in held.values()}) == 1:
            return _one_by_one(steps)
        last = self._recorders[-1]

        def logits(x: Tensor) -> Tensor:
            ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
            last.returned = x
            try:
                said = functional_call(
                    self.skeleton,
                    dict(tensors),
                    (),
                    {"input_ids": ids, "use_cache": False},
                    tie_weights=False,
                )
            finally:
                last.returned = None
            out: Tensor = said.logits
            return out.float()

        return logits

    def _last_steps(
        self, tensors: Mapping[str, Tensor]
    ) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """The final modules and the head, each with its tensors."""
        modules = dict(self.skeleton.named_modules())
        head = self.skeleton.get_output_embeddings()
        names = [f"{self._frame.trunk}.{n}" for n in self._frame.final]
        names.append(next(n for n, m in modules.items() if m is head))
        return [
            (
                modules[name],
                {
                    k.removeprefix(f"{name}."): v
                    for k, v in tensors.items()
                    if k.startswith(f"{name}.")
                },
            )
            for name in names
        ]


def _one_by_one(
    steps: Sequence[tuple[nn.Module, Mapping[str, Tensor]]],
) -> Callable[[Tensor], Tensor]:
    """The readout of a model where only its final modules and its head take part."""

    def logits(x: Tensor) -> Tensor:
        for module, weights in steps:
            x = functional_call(module, dict(weights), (x,))
        return x.float()

    return logits


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint stores."""
    kept = module.state_dict()
    return ((n, b) for n, b in module.named_buffers() if n in kept)
