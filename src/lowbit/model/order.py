"""The same model with the channels of its residual stream in another order, and blocks with those
inside them reordered.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LowbitError
from .block import Block
from .graph import Described, Graph, Site


def check_order(described: Described, family: str) -> None:
    """Raise LowbitError if the channels of a family's residual stream cannot change places."""
    if described.frame.open or not all(graph.rotatable for graph in described.kinds):
        raise LowbitError(
            f"the residual channels of this '{family}' model cannot be put in another order: it is "
            "normalised after each addition or "
            "projected at its ends. Use --set crossquant.fold=channel."
        )


def order_block(weights: Mapping[str, Tensor], graph: Graph, order: Tensor) -> dict[str, Tensor]:
    """A block's parameters with channel i of the residual stream the one that was ``order[i]``.

    Args:
        weights: by their names inside the block. order: (hidden,) int64.
    """
    out = dict(weights)
    at = order.to(next(iter(out.values())).device)
    for site in graph.sites:
        if site.residual and site.source is not None:
            for key in (f"{site.source.module}.weight", f"{site.source.module}.bias"):
                if key in out:
                    out[key] = out[key][at]
            for key in (*(f"{name}.weight" for name in site.reads), *site.beside):
                out[key] = out[key][..., at]
    for name in graph.writers:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in out:
                out[key] = out[key][at]
    return out


def order_outer(
    tensors: Mapping[str, Tensor],
    embeddings: tuple[str, ...],
    norm: str | None,
    head: str,
    order: Tensor,
) -> dict[str, Tensor]:
    """The tensors outside the blocks, channels likewise; a head tied to the embedding stays so.

    Args:
        tensors: by full name. embeddings: names of the embedding tensors. norm: the final norm's
            prefix or None. head: name of the head's weight.
    """
    out = dict(tensors)
    for key in {*embeddings, head} & set(tensors):
        out[key] = tensors[key][:, order].contiguous()
    for key in (f"{norm}.weight", f"{norm}.bias"):
        if key in tensors:
            out[key] = tensors[key][order]
    return out


def reorder(block: Block, site: Site, order: Tensor) -> Block:
    """The block with the channels of one site in another order: its source's rows (or gain) and its
    readers' columns.

    Linears that read what the source reads, such as a gate, have theirs moved along, unless the
    source is attention's values.

    Args:
        order: (channels,) int64, on the block's device; for attention's output it must stay within
            heads.
    """
    source = site.source
    if source is None:
        raise ValueError("this site has no source whose channels could change places")
    graph = block.graph
    changes: dict[str, Tensor] = {f"{n}.weight": block.weight(n)[:, order] for n in site.reads}
    changes |= {name: block.weights[name][..., order] for name in site.beside}
    moved: list[tuple[str, Tensor]] = []
    if source.kind == "norm":
        moved.append((source.module, order))
    elif site.probe == (graph.heads.output if graph.heads else None):
        moved.append(
            (source.module, _all_rows(len(block.weight(source.module)), source.rows, order))
        )
    if not set(site.reads).isdisjoint(graph.inner):
        moved += [
            (n, torch.cat([order + k for k in range(0, len(block.weight(n)), len(order))]))
            for n in graph.makers(site)
        ]
    for module, rows in moved:
        for key in (f"{module}.weight", f"{module}.bias"):
            if key in block.weights:
                changes[key] = changes.get(key, block.weights[key])[rows]
    return block.with_weights(changes)


def _all_rows(count: int, rows: tuple[int, int] | None, order: Tensor) -> Tensor:
    """The order of all of a linear's rows when some of them are reordered."""
    start, stop = rows or (0, count)
    everything = torch.arange(count, device=order.device)
    everything[start:stop] = order + start
    return everything
