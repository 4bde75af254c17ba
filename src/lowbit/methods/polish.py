"""Polish: what codes leave free, trained end to end after all blocks are done.

Reconstruction of blocks stops where a block ends. With every code frozen, scales (levels of a
codebook, units of a K-quant), norm gains and biases are trained on

    KL(softmax(float logits) || softmax(quantized logits)),  averaged over tokens,

by Adam, a cosine schedule, steps relative to what is trained. Every row is seen once where the text
has as many. Rows that nothing was learned from are looked at on the way: the best state is kept,
and the beginning if nothing is gained.

Training what codes leave free end to end is the second phase of EfficientQAT (arXiv 2407.11062,
section 3.3), there on the next token of the text.

The stage is `lowbit.stages.polish`; within a block this changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import LowbitError
from ..grid import AnyGrid, OrderedGrid
from ..model.block import Block
from .cost import Cost, Shapes
from .entry import Decisive


@dataclass(frozen=True)
class Polish:
    """The knobs of the stage.

    Attributes:
        tokens: that steps are made on, those of calibration last; rows are seen again if the text
            has not as many.
        batch: rows a step.
        lr: of the first steps; a scale moves by about this share of itself, a gain or a bias by
            this share of its vector's root mean square.
        norms: train norm gains and biases as well.
        apart: rows of text that nothing learns from, by which the best state is chosen.
        checks: how many times they are looked at.
        patience: looks without gain after which it stops.

    Raises:
        LowbitError: an option is out of range.
    """

    tokens: int = 1 << 17
    batch: int = 8
    lr: float = 5e-3
    norms: bool = True
    apart: int = 16
    checks: int = 8
    patience: int = 2

    def __post_init__(self) -> None:
        counts = self.tokens, self.batch, self.apart, self.checks, self.patience
        if min(counts) < 1 or not 0 < self.lr < 0.5:
            raise LowbitError(
                "polish needs tokens, batch, apart, checks and patience of at least 1, and lr "
                "between 0 and 0.5."
            )

    def __call__(self, block: Block) -> Block:
        return block

    def steps(self, length: int) -> int:
        """How many steps are made on rows of so many tokens."""
        return max(1, self.tokens // (self.batch * length))


def check(method: Polish, grid: AnyGrid) -> None:
    """Raise LowbitError if a grid has nothing that moves."""
    if not isinstance(grid, OrderedGrid):
        raise LowbitError(f"polish moves scales or levels, and {grid} has none.")


def further(method: Polish, length: int) -> int:
    """Rows that are drawn besides the calibration's: those it is chosen by, and those that steps
    take.
    """
    return method.apart + method.steps(length) * method.batch


def cost(method: Polish, shapes: Shapes) -> Cost:
    """In each block: the float model's pass over every row, then of every step a pass, the same
    once more with what gradients need, and twice that back; a pass of the rows looked at.
    """
    rows, batch = shapes.rows, method.batch
    trained = method.steps(rows.length) * batch
    # Per weight of a block: codes, the decoded weight, its gradient, in float32.
    held = 12 * shapes.layer.weights + shapes.training(batch)
    # More rows pass the float model, where three streams are held, than blocks learn from.
    more = method.apart + trained - rows.count
    return Cost(
        held=held,
        streams=max(0, -(-3 * more // rows.count)),
        batch=batch,
        parts={
            "polish": shapes.forward(rows.part(5 * trained + (method.checks + 1) * method.apart))
        },
    )


def decides(method: Polish, device: torch.device) -> Decisive:
    """Which way of computing experts its steps take."""
    return Decisive(gradients=True)
