"""Block reconstruction: the inner loop shared by methods that learn from a block's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..model.block import Block
from ..model.context import tokens_at_a_time
from ..model.microbatches import MicroBatches
from ._batches import gathered, shared
from ._divergence import divergence
from ._prefetch import Prefetcher
from ._tokens import summed as over_tokens

Objective = Literal["block", "logits"]

JUDGED_ROWS = 32
JUDGED_TOKENS = 4096  # at a time

_Found = tuple[Tensor, tuple[Tensor, ...]]  # a loss and its gradients


def _none() -> None:
    return None


def _tokens_of(t: Tensor, seen: Tensor) -> Tensor:
    """(n, tokens, hidden): of (n, length, hidden) those that ``seen`` (n, tokens) numbers."""
    return t.gather(1, seen[..., None].expand(-1, -1, t.shape[-1]))


class Reconstruction:
    """Distance of a block's output on the quantized stream to the float block's output on the float
    stream.

    The loss is the squared difference summed over hidden units and averaged over tokens, in
    float32.

    Args:
        block: what to reconstruct; its tuned rows are used.
        batch: rows a step, drawn without replacement within a step.
        objective: "logits" replaces the loss of the last block by the mean KL divergence per token
            to the float model's next-token distribution: there is no later block for which the
            hidden state would have to be right.
        logits_tokens: how many tokens of a step that divergence is taken of, drawn anew for each
            step, as many of every row; 0 means all.
    """

    def __init__(
        self, block: Block, batch: int, objective: Objective = "block", logits_tokens: int = 0
    ) -> None:
        self.block, self.batch = block, min(batch, block.tuned_rows)
        self._readout = block.context.readout if objective == "logits" else None
        self.objective: Objective = "logits" if self._readout else "block"
        self._most = block.tuned_rows * block.x.shape[1]  # tokens whose logits are made together
        if self._readout is not None:
            with torch.no_grad():
                vocab = self._readout(block.target[:1, :1].to(block.device)).shape[-1]
            self._most = tokens_at_a_time(vocab)
        self._each = 0  # tokens of a row whose logits a step makes, 0 for all
        if self._readout is not None and 0 < logits_tokens < self.batch * block.x.shape[1]:
            self._each = max(1, logits_tokens // self.batch)
        self._generator = torch.Generator().manual_seed(block.seed)
        self._drawn: Tensor | None = None
        self._prefetcher = Prefetcher(block)
        self.remarks: list[str] = []  # what became of the batch where memory ran out
        self._parts = MicroBatches(f"tuning '{block.name}'", self.batch, self.remarks.append)
        self._judged = MicroBatches(
            f"judging '{block.name}'",
            max(1, JUDGED_TOKENS // block.x.shape[1]),
            self.remarks.append,
        )

    def draw(self) -> Tensor:
        """Row numbers of the next mini-batch, (batch,) int64. Those after it are drawn too, so that
        `gradients` can have them read.
        """
        rows = self._fresh() if self._drawn is None else self._drawn
        self._drawn = self._fresh()
        return rows

    def _fresh(self) -> Tensor:
        return torch.randperm(self.block.tuned_rows, generator=self._generator)[: self.batch]

    def _output(
        self, weights: Mapping[str, Tensor], x: Tensor, target: Tensor, *beside: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output and target of rows.

        Args:
            beside: what the block is given beside ``x``, as in `_streams`.
        """
        b = self.block
        given = dict(zip(b.context.given_q, beside, strict=True))
        y = b.forward(x.to(b.device, b.compute), weights, given)
        return y.float(), target.to(b.device).float()

    @property
    def _streams(self) -> tuple[Tensor, ...]:
        b = self.block
        return b.xq, b.target, *b.context.given_q.values()

    def distance(self, y: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs, summed over tokens."""
        readout = self._readout
        if readout is None:
            return (y - target).pow(2).sum()

        def apart(y: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                expected = readout(target)
            return divergence(readout(y), expected)

        return over_tokens(apart, y, (target,), self._most)

    def _probe(self, y: Tensor, target: Tensor, chance: Tensor) -> Tensor:
        """A random scalar whose squared derivatives average to the diagonal of the loss's
        Gauss-Newton matrix: random signs for the squared error, next tokens drawn from the float
        model for the divergence.

        Args:
            chance: uniform in [0, 1), for every number of y, or for every token: what is drawn does
                not depend on how rows are divided.
        """
        readout = self._readout
        if readout is None:
            return torch.where(chance < 0.5, -y, y).sum() * 2**0.5

        def drawn(y: Tensor, target: Tensor, chance: Tensor) -> Tensor:
            with torch.no_grad():
                below = readout(target).softmax(-1).cumsum(-1)
                tokens = torch.searchsorted(
                    below, (chance * below[..., -1])[..., None], right=True
                ).clamp_(max=below.shape[-1] - 1)
            return readout(y).log_softmax(-1).gather(-1, tokens).sum()

        return over_tokens(drawn, y, (target, chance), self._most)

    def derivatives(
        self,
        weights: Mapping[str, Tensor],
        trained: Sequence[str],
        rows: Tensor,
        generator: torch.Generator,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients, on some rows of all ranks, of the loss summed over tokens and of `_probe`'s
        scalar. In parts where memory is small.
        """
        leaves = {k: weights[k].detach().requires_grad_() for k in trained}
        b, part = self.block, self.block.ranks.near.share(len(rows))
        held = gathered(b.ranks, rows, self._streams, b.device)
        x = held[0]
        shape = (len(rows), *(x.shape[1:] if self._readout is None else x.shape[1:2]))
        chance = torch.rand(shape, generator=generator, device=b.device)[part]
        # Modules take no empty batch.
        held = [t[part] if part.start < part.stop else t[:1] for t in held]

        def add(total: tuple[Tensor, ...] | None, at: slice) -> tuple[Tensor, ...] | None:
            y, wanted = self._output({**weights, **leaves}, *(t[at] for t in held))
            if part.start == part.stop:
                y, wanted = y[:0], wanted[:0]
            # Experts that no token of these rows reaches have no gradient.
            of = list(leaves.values())
            first = torch.autograd.grad(
                self.distance(y, wanted), of, retain_graph=True, materialize_grads=True
            )
            probe = self._probe(y, wanted, chance[at])
            second = torch.autograd.grad(probe, of, materialize_grads=True)
            found = tuple(g.float() for g in (*first, *second))
            if total is None:
                return found
            return tuple(t.add_(g) for t, g in zip(total, found, strict=True))

        found = self._parts.over(len(held[0]), _none, add)
        assert found is not None
        b.ranks.near.sum_(*found)
        return found[: len(leaves)], found[len(leaves) :]

    def backward(
        self,
        weights: Callable[[], Mapping[str, Tensor]],
        leaves: Sequence[Tensor],
        rows: Tensor,
        loss: Callable[[Tensor, Tensor, slice], Tensor],
    ) -> None:
        """Differentiate ``loss(output, target, part)``, summed over some rows, back into the
        ``leaves`` of ``weights()``, which hold the gradients over all ranks then.

        Args:
            rows: their numbers over all ranks.
            loss: of (n, length, hidden) float32 each, and of which of this rank's part they are; n
                may be 0.
        """
        b, part = self.block, self.block.ranks.share(len(rows))
        held = [
            t[part] if part.start < part.stop else t[:1]
            for t in gathered(b.ranks, rows, self._streams, b.device)
        ]

        def start() -> int:  # again where memory ran out and smaller parts follow
            for leaf in leaves:
                leaf.grad = None
            return 0

        def add(done: int, at: slice) -> int:
            y, wanted = self._output(weights(), *(t[at] for t in held))
            if part.start == part.stop:
                y, wanted = y[:0], wanted[:0]
            loss(y, wanted, at).backward()  # type: ignore[no-untyped-call]
            return done + 1

        self._parts.over(len(held[0]), start, add)
        for leaf in leaves:
            if leaf.grad is None:  # of an expert that no token here reaches
                leaf.grad = torch.zeros_like(leaf)
        b.ranks.sum_(*(leaf.grad for leaf in leaves if leaf.grad is not None))

    def share(self, rows: Tensor, stream: Tensor) -> Tensor:
        """This rank's part of some rows of a stream, on the block's device.

        Args:
            rows: their numbers over all ranks. stream: (rows, length, hidden), those this rank has.
        """
        return shared(self.block.ranks, rows, (stream,), self.block.device)[0]

    def gradients(
        self, weights: Mapping[str, Tensor], trained: Sequence[str], rows: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss on some rows of all ranks; and this rank's part of its gradients by the parameters
        named in ``trained``: their sum over the ranks of this machine is the gradient.

        If the device's memory is too small for them, the rows go in parts, whose gradients are
        added up in float32.
        """
        leaves = {k: weights[k].detach().requires_grad_() for k in trained}
        b, part = self.block, self.block.ranks.near.share(len(rows))
        held = self._prefetcher.take(rows)
        if self._drawn is not None:
            self._prefetcher.prepare(self._drawn)
        length = held[0].shape[1]
        seen = self._seen(len(rows), length)
        tokens = len(rows) * (length if seen is None else seen.shape[1])
        own = None if seen is None else seen[part].to(b.device)

        def add(total: _Found | None, at: slice) -> _Found | None:
            y, wanted = self._output({**weights, **leaves}, *(t[at] for t in held))
            if own is not None:
                y, wanted = (_tokens_of(t, own[at]) for t in (y, wanted))
            loss = self.distance(y, wanted) / tokens
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            if total is None:
                return loss.detach(), found
            return total[0] + loss.detach(), tuple(
                t.float().add_(g) for t, g in zip(total[1], found, strict=True)
            )

        if part.start == part.stop:  # modules take no empty batch
            own = None
            found = add(None, slice(0, 1))
            assert found is not None
            loss = found[0] * 0
            b.ranks.near.sum_(loss)
            return loss, tuple(g.zero_() for g in found[1])
        held = [t[part] for t in held]
        total = self._parts.over(len(held[0]), _none, add)
        assert total is not None
        b.ranks.near.sum_(total[0])
        return total

    def _seen(self, rows: int, length: int) -> Tensor | None:
        """(rows, tokens) int64: which tokens of each row of a step the divergence is taken of, in
        order; None for all. The same on all ranks.
        """
        if not self._each:
            return None
        chance = torch.rand(rows, length, generator=self._generator)
        return chance.argsort(1)[:, : self._each].sort(1).values

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor], rows: int = JUDGED_ROWS) -> float:
        """Loss on the first rows, the same ones every time."""
        b, rows = self.block, self.block.ranks.count(min(rows, self.block.tuned_rows))

        def add(total: float, part: slice) -> float:
            found = self._output(weights, *(t[part] for t in self._streams))
            return total + float(self.distance(*found))

        total, count = b.ranks.total(self._judged.over(rows, float, add), rows * b.x.shape[1])
        return total / count
