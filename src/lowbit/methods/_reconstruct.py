"""Block reconstruction: the inner loop shared by methods that learn from a block's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..model.block import Block

_JUDGED_ROWS = 32


class Reconstruction:
    """Squared error of a block's output on the quantized stream against the float block's output on the float stream.

    The loss is the squared difference summed over hidden units and averaged over tokens, in float32 (TesseraQ's block
    reconstruction, specification of the loss in BRECQ's form).

    Args:
        block: what to reconstruct; its tuned rows are used.
        batch: rows a step, drawn without replacement within a step.
    """

    def __init__(self, block: Block, batch: int) -> None:
        self.block, self.batch = block, min(batch, block.tuned_rows)
        self._generator = torch.Generator().manual_seed(block.seed)

    def draw(self) -> Tensor:
        """Row numbers of the next mini-batch, (batch,) int64."""
        return torch.randperm(self.block.tuned_rows, generator=self._generator)[: self.batch]

    def residual(self, weights: Mapping[str, Tensor], rows: Tensor | slice) -> Tensor:
        """Output minus target for some rows, (n, length, hidden) float32."""
        b = self.block
        y = b.forward(b.xq[rows].to(b.device, b.compute), weights)
        return y.float() - b.target[rows].to(b.device).float()

    def gradients(self, weights: Mapping[str, Tensor], trained: Sequence[str], rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss on some rows and its gradients by the parameters named in ``trained``."""
        leaves = {k: weights[k].detach().requires_grad_() for k in trained}
        d = self.residual({**weights, **leaves}, rows)
        loss = d.pow(2).sum() / d[..., 0].numel()
        return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor], rows: int = _JUDGED_ROWS) -> float:
        """Loss on the first rows, the same ones every time."""
        rows = min(rows, self.block.tuned_rows)
        total, tokens = 0.0, 0
        step = max(1, 8192 // self.block.x.shape[1])
        for at in range(0, rows, step):
            d = self.residual(weights, slice(at, min(at + step, rows)))
            total += float(d.pow(2).sum(dtype=torch.float64))
            tokens += d[..., 0].numel()
        return total / tokens
