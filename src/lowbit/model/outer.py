"""The tensors outside the blocks: which the checkpoint has, and whether the output head is the
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint import Checkpoint, Stored

_ROWS = 4096  # of a matrix compared at a time


@dataclass(frozen=True)
class Outer:
    """The parameters outside the blocks.

    Attributes:
        names: name of a parameter -> name of the tensor that the checkpoint stores for it.
        embedding, head: names of the input embedding's and of the output head's weight.
        tied: they are one matrix, under the embedding's name.
        left_out: tensors of the checkpoint that are not needed -> why.
        remarks: what a person should know.
    """

    names: Mapping[str, str]
    embedding: str
    head: str
    tied: bool
    left_out: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def outer_of(
    checkpoint: Checkpoint,
    skeleton: Any,
    names: Mapping[str, str],
    stored: Mapping[str, Stored],
    tied: bool,
) -> Outer:
    """What a checkpoint holds of a skeleton without blocks, as transformers would load it.

    A tied head may lie under either name or under both. Where both are there and differ,
    transformers does not tie them.

    Args:
        skeleton: the transformers model, its blocks taken out. names: parameter -> the tensor that
            it is read from. stored: of the checkpoint. tied: what config.json says of the head.
    """
    embedding = _name_of(skeleton, skeleton.get_input_embeddings())
    head = _name_of(skeleton, skeleton.get_output_embeddings())
    held, left, remarks = dict(names), dict(checkpoint.left_out), []
    if tied:
        one, other = held[embedding], held.pop(head)
        if one != other and _equal(checkpoint, stored, one, other):
            left[other] = f"the same numbers as '{one}', to which config.json ties it"
        elif one != other:
            tied, held[head] = False, other
            remarks.append(
                f"config.json ties '{other}' to '{one}', but the checkpoint holds two "
                "matrices that differ: both are kept, as "
                "transformers does, and the artifact's config.json says so"
            )
    return Outer(held, embedding, head, tied, left, tuple(remarks))


def _name_of(skeleton: Any, module: Any) -> str:
    name: str = next(n for n, m in skeleton.named_modules() if m is module)
    return f"{name}.weight"


def _equal(checkpoint: Checkpoint, stored: Mapping[str, Stored], one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers; rows are read some at a time."""
    if stored[one] != stored[other]:
        return False
    rows = stored[one].shape[0]
    pairs = (checkpoint.rows((one, other), at, at + _ROWS) for at in range(0, rows, _ROWS))
    return all(torch.equal(a, b) for a, b in pairs)
