"""The channels of the residual stream as a stage wants them: in another basis, or in another
order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import Frame, Graph
from .order import order_block, order_outer
from .outer import Outer
from .residual import Basis, rotate_block, rotate_outer


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What becomes of a model's tensors; of none of the two attributes, nothing.

    Attributes:
        basis: that the stream is in, see `lowbit.model.residual`.
        order: (hidden,) int64, channel i is the one that was ``order[i]``, see
            `lowbit.model.order`.
    """

    basis: Basis | None = None
    order: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the channels are the original's."""
        return self.basis is None and self.order is None

    def block(
        self,
        weights: Mapping[str, Tensor],
        graph: Graph,
        stored: torch.dtype,
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, Tensor]:
        """A block's parameters, by their names inside the block.

        Args:
            stored, dtypes: see `rotate_block`.
        """
        out = dict(weights)
        if self.order is not None:
            out = order_block(out, graph, self.order)
        return out if self.basis is None else rotate_block(out, graph, self.basis, stored, dtypes)

    def outside(
        self, tensors: Mapping[str, Tensor], frame: Frame, outer: Outer
    ) -> dict[str, Tensor]:
        """The parameters outside the blocks by full name, in their own dtypes; in another basis a
        tied head gets a tensor of its own.
        """
        norm = f"{frame.trunk}.{frame.final[0]}" if frame.final else None
        embeddings = tuple(f"{frame.trunk}.{n}.weight" for n in frame.embeddings)
        if self.order is not None:
            return order_outer(dict(tensors), embeddings, norm, outer.head, self.order)
        if self.basis is None:
            return dict(tensors)
        own = dict(tensors)
        own.setdefault(outer.head, own[outer.embedding])
        return rotate_outer(own, embeddings, norm, outer.head, frame.final_offset, self.basis)
