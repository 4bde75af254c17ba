"""Adam (arXiv 1412.6980) as a value: how far one step goes. The moments lie with the variables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Adam:
    """Where an optimizer stands.

    Attributes:
        lr: step size.
        step: how many steps have been made, this one included.
    """

    lr: float
    step: int = 0

    def next(self, lr: float | None = None) -> Adam:
        """One step further."""
        return replace(self, step=self.step + 1, lr=self.lr if lr is None else lr)

    @property
    def size(self) -> float:
        """What the ratio of the moments is multiplied by: the step size, the first moment's start
        at zero made up for.
        """
        return self.lr / (1 - BETAS[0] ** self.step)

    @property
    def root(self) -> float:
        """What the root of the second moment is multiplied by to make up for its start at zero."""
        return 1 / math.sqrt(1 - BETAS[1] ** self.step)


def moved(variable: Tensor, gradient: Tensor, first: Tensor, second: Tensor, adam: Adam) -> None:
    """One step, in place: ``variable`` and both moments, all of one shape."""
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    variable.addcdiv_(first, second.sqrt().mul_(adam.root).add_(EPSILON), value=-adam.size)
