"""Rows through the quantized blocks and back, one block in memory at a time: forward keeps each
block's input, backward computes each block once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...methods._divergence import divergence
from ...methods._tokens import summed
from ...model.beside import Keys, given, picked
from ...model.block import Block
from ...model.context import TOKENS_PER_PASS, tokens_at_a_time
from ...model.microbatches import MicroBatches
from ...model.model import Model
from .free import Free

Variables = Mapping[str, Tensor]
# (block, its variables and their gradients): takes the step
Descend = Callable[[int, Variables, Variables], None]


@dataclass(frozen=True)
class Frame:
    """What every visit of a block takes besides its codes.

    Attributes:
        opened: gives the block, every linear coded. norms: whether vectors are trained, too.
    """

    opened: Callable[[], Block]
    norms: bool

    def free(self) -> Free:
        return Free.of(self.opened(), self.norms)


@dataclass(frozen=True)
class _Passed:
    """A batch before a block.

    Attributes:
        x: (rows, length, hidden), what enters it. beside: what lies beside, by numbers of items.
    """

    x: Tensor
    beside: Mapping[int, Tensor]


class Passes:
    """The passes over a model's blocks.

    Args:
        model: of which the blocks are done. frames: of its blocks. variables: (block) -> as they
            are.
    """

    def __init__(
        self, model: Model, frames: Sequence[Frame], variables: Callable[[int], Variables]
    ) -> None:
        self._model, self._frames, self._variables = model, frames, variables
        self._readout = model.source.readout()
        self._most = tokens_at_a_time(model.source.config.vocab_size)
        self._parts: MicroBatches | None = None

    def divergence(self, ids: Tensor, expected: Tensor) -> float:
        """The divergence from the float model, summed over the tokens of some rows.

        Args:
            ids: (n, length) int64. expected: (n, length, hidden), what leaves the float model's
                last block.
        """
        step = max(1, TOKENS_PER_PASS // ids.shape[1])
        total, device = 0.0, self._model.source.device
        for at in range(0, len(ids), step):
            part = slice(at, at + step)
            y = self._forward(ids[part], None)
            with torch.no_grad():
                found = self._summed(y, expected[part].to(device))
            total += float(found)
        return total

    def descend(self, ids: Tensor, expected: Tensor, tokens: int, step: Descend) -> float:
        """Differentiate the divergence by the variables of every block, last block first.

        Args:
            ids, expected: as in `divergence`; maybe no row, where there are more ranks than rows.
            tokens: of all ranks, by which sums are divided.
            step: called with each block's variables and this rank's part of their gradients.

        Returns:
            this rank's part of the divergence.
        """
        if not len(ids):  # modules take no empty batch, and other ranks wait for every block
            for i in range(len(self._frames) - 1, -1, -1):
                own = self._variables(i)
                step(i, own, {k: torch.zeros_like(v) for k, v in own.items()})
            return 0.0
        passed: list[_Passed] = []
        y = self._forward(ids, passed).detach().requires_grad_()
        wanted = expected.to(y.device)
        loss = self._summed(y, wanted) / tokens
        (gradient,) = torch.autograd.grad(loss, y)
        beside: dict[int, Tensor] = {}  # gradients of what blocks leave to later ones
        for i in range(len(self._frames) - 1, -1, -1):
            gradient, beside = self._back(i, passed.pop(), gradient, beside, step)
        return float(loss.detach())

    def _summed(self, y: Tensor, expected: Tensor) -> Tensor:
        def of(own: Tensor, other: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = self._readout(other)
            return divergence(self._readout(own), wanted)

        wide = torch.promote_types(y.dtype, torch.float32)
        return summed(of, y.to(wide), (expected.to(wide),), self._most)

    @torch.no_grad()
    def _forward(self, ids: Tensor, passed: list[_Passed] | None) -> Tensor:
        """What leaves the last block.

        Args:
            passed: what enters each block is put there, if it is given.
        """
        source = self._model.source
        x, own = source.entering(ids.to(source.device), source.compute)
        held: dict[int, Tensor] = dict(own)
        for i, frame in enumerate(self._frames):
            free = frame.free()
            block, place = free.block, free.block.context.place
            if passed is not None:
                passed.append(_Passed(x, dict(held)))
            y, left = block.passed(x, free.weights(self._variables(i)), given(place, held))
            new = {place.left[path]: t for path, t in left.items()}
            held = {n: t for n, t in {**held, **new}.items() if n not in place.done}
            x = y
        return x

    def _back(
        self,
        i: int,
        before: _Passed,
        gradient: Tensor,
        beside: Mapping[int, Tensor],
        step: Descend,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One block: what it was given gets its gradient, its variables make their step."""
        free, variables = self._frames[i].free(), dict(self._variables(i))
        leaves = {k: v.requires_grad_() for k, v in variables.items()}
        made = {k: w for k, w in free.weights(leaves).items() if w.requires_grad}
        weights = {**free.block.weights, **{k: w.detach() for k, w in made.items()}}
        place = free.block.context.place
        arrived = given(place, before.beside)
        # What depends on the tokens alone needs none.
        wanted = [p for p, n in place.given.items() if n in self._left and _floats(arrived[p])]
        found = torch.zeros_like(before.x)
        others = {p: torch.zeros_like(arrived[p]) for p in wanted}

        def start() -> dict[str, Tensor]:
            return {k: torch.zeros_like(w) for k, w in made.items()}

        def add(total: dict[str, Tensor], at: slice) -> dict[str, Tensor]:
            x = before.x[at].detach().requires_grad_()
            beside_x: dict[Keys, Tensor] = {
                p: t.detach().requires_grad_(p in wanted) for p, t in picked(arrived, at).items()
            }
            own = {k: weights[k].requires_grad_() for k in made}
            y, left = free.block.passed(x, {**weights, **own}, beside_x)
            outputs, by = [y], [gradient[at].to(y.dtype)]
            for path, t in left.items():
                if place.left[path] in beside and t.requires_grad:
                    outputs.append(t)
                    by.append(beside[place.left[path]][at].to(t.dtype))
            inputs = [x, *(beside_x[p] for p in wanted), *own.values()]
            grads = torch.autograd.grad(
                outputs, inputs, by, allow_unused=True, materialize_grads=True
            )
            found[at] = grads[0]
            for p, g in zip(wanted, grads[1 : 1 + len(wanted)], strict=True):
                others[p][at] = g
            for k, g in zip(own, grads[1 + len(wanted) :], strict=True):
                total[k] += g
            return total

        if self._parts is None:
            most = max(1, TOKENS_PER_PASS // before.x.shape[1])
            self._parts = MicroBatches("polishing", most, self._model.announce)
        by_weight = self._parts.over(len(before.x), start, add)
        gradients = torch.autograd.grad(
            list(made.values()), list(leaves.values()), list(by_weight.values())
        )
        step(
            i, {k: v.detach() for k, v in leaves.items()}, dict(zip(leaves, gradients, strict=True))
        )
        passed_on = {n: g for n, g in beside.items() if n not in place.left.values()}
        for p in wanted:
            n = place.given[p]
            passed_on[n] = passed_on[n] + others[p] if n in passed_on else others[p]
        return found, passed_on

    @property
    def _left(self) -> frozenset[int]:
        """Numbers of what blocks leave."""
        items = self._model.source.described.items
        return frozenset(n for n, item in enumerate(items) if item.maker is not None)


def _floats(t: Tensor) -> bool:
    return t.is_floating_point()


def without_rows(block: Block) -> Block:
    """The block of which nothing depends on rows that once passed."""
    none = block.x.new_empty(0, *block.x.shape[1:])  # no view, which would hold on to the stream
    context = replace(
        block.context, x=none, xq=none, target=none, given={}, given_q={}, left={}, readout=None
    )
    return replace(block, context=context)
