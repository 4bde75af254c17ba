"""Block reconstruction: the inner loop shared by methods that learn from a block's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..model.block import Block

Objective = Literal["block", "logits"]

_JUDGED_ROWS = 32


class Reconstruction:
    """Distance of a block's output on the quantized stream to the float block's output on the float stream.

    The loss is the squared difference summed over hidden units and averaged over tokens, in float32.

    Args:
        block: what to reconstruct; its tuned rows are used.
        batch: rows a step, drawn without replacement within a step.
        objective: "logits" replaces the loss of the last block by the mean KL divergence per token to the float model's
            next-token distribution: there is no later block for which the hidden state would have to be right.
    """

    def __init__(self, block: Block, batch: int, objective: Objective = "block") -> None:
        self.block, self.batch = block, min(batch, block.tuned_rows)
        self._readout = block.readout if objective == "logits" else None
        self.objective: Objective = "logits" if self._readout else "block"
        self._generator = torch.Generator().manual_seed(block.seed)
        self._drawn: Tensor | None = None

    def draw(self) -> Tensor:
        """Row numbers of the next mini-batch, (batch,) int64. Those after it are drawn too, so that they can be read meanwhile."""
        rows = self._fresh() if self._drawn is None else self._drawn
        self._drawn = self._fresh()
        self.block.prefetch(self._drawn, self.block.xq, self.block.target)
        return rows

    def _fresh(self) -> Tensor:
        return torch.randperm(self.block.tuned_rows, generator=self._generator)[: self.batch]

    def output(self, weights: Mapping[str, Tensor], rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The block's output and its target for some rows, (n, length, hidden) float32 each."""
        b = self.block
        y = b.forward(b.xq[rows].to(b.device, b.compute), weights)
        return y.float(), b.target[rows].to(b.device).float()

    def distance(self, y: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs, summed over tokens."""
        if self._readout is None:
            return (y - target).pow(2).sum()
        with torch.no_grad():
            expected = self._readout(target).log_softmax(-1)
        return torch.nn.functional.kl_div(self._readout(y).log_softmax(-1), expected, reduction="sum", log_target=True)

    def probe(self, y: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """A random scalar whose squared derivatives average to the diagonal of the loss's Gauss-Newton matrix.

        Random signs for the squared error, next tokens drawn from the float model for the divergence.
        """
        if self._readout is None:
            signs = torch.randint(0, 2, y.shape, generator=generator, device=y.device).to(y.dtype) * 2 - 1
            return (y * signs).sum() * 2**0.5
        with torch.no_grad():
            drawn = torch.multinomial(self._readout(target).softmax(-1).flatten(0, -2), 1, generator=generator)
        return self._readout(y).log_softmax(-1).flatten(0, -2).gather(-1, drawn).sum()

    def gradients(self, weights: Mapping[str, Tensor], trained: Sequence[str], rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss on some rows and its gradients by the parameters named in ``trained``."""
        leaves = {k: weights[k].detach().requires_grad_() for k in trained}
        y, target = self.output({**weights, **leaves}, rows)
        loss = self.distance(y, target) / y[..., 0].numel()
        return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor], rows: int = _JUDGED_ROWS) -> float:
        """Loss on the first rows, the same ones every time."""
        rows = min(rows, self.block.tuned_rows)
        total, tokens = 0.0, 0
        step = max(1, 4096 // self.block.x.shape[1])
        for at in range(0, rows, step):
            y, target = self.output(weights, slice(at, min(at + step, rows)))
            total += float(self.distance(y, target))
            tokens += y[..., 0].numel()
        return total / tokens
