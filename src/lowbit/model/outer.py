"""The tensors outside the blocks: which the checkpoint has, and whether the output head is the
embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LowbitError
from .checkpoint import Checkpoint, Stored

_ROWS = 4096  # of a matrix compared at a time


@dataclass(frozen=True)
class Outer:
    """The parameters outside the blocks.

    Attributes:
        names: name of a parameter -> name of the tensor that the checkpoint stores for it.
        embedding, head: names of the input embedding's and of the output head's weight.
        tied: they are one matrix, under the embedding's name.
        left_out: stored tensors that are not needed -> why.
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
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    tied: bool,
) -> Outer:
    """Find every parameter of a skeleton without blocks in a checkpoint, as transformers would load
    it.

    A tied head may lie under either name or under both. Where both are there and differ,
    transformers does not tie them.

    Args:
        skeleton: the transformers model, its blocks taken out. shapes: of everything in it that is
            stored. stored: of the checkpoint. tied: what config.json says of the head.

    Raises:
        LowbitError: a tensor is missing, or has another shape than config.json wants.
    """
    embedding = _name_of(skeleton, skeleton.get_input_embeddings())
    head = _name_of(skeleton, skeleton.get_output_embeddings())
    names, left, remarks = {n: n for n in shapes}, {}, []
    if tied:
        del names[head]
        if head in stored and embedding not in stored:
            names[embedding] = head
        elif head in stored and _equal(checkpoint, stored, embedding, head):
            left[head] = f"the same numbers as '{embedding}', to which config.json ties it"
        elif head in stored:
            tied, names[head] = False, head
            remarks.append(
                f"config.json ties '{head}' to '{embedding}', but the checkpoint holds two "
                "matrices that differ: both are kept, as "
                "transformers does, and the artifact's config.json says so"
            )
    for name, source in names.items():
        check_stored(source, stored, shapes[name], checkpoint.name)
    return Outer(names, embedding, head, tied, left, tuple(remarks))


def check_stored(name: str, stored: Mapping[str, Stored], shape: Iterable[int], model: str) -> None:
    """Raise LowbitError if a tensor is missing or not of this shape."""
    if name not in stored:
        raise LowbitError(
            f"tensor '{name}' is missing from '{model}': the checkpoint does not fit its "
            "config.json."
        )
    if stored[name].shape != tuple(shape):
        raise LowbitError(
            f"tensor '{name}' of '{model}' has shape {stored[name].shape}, config.json wants "
            f"{tuple(shape)}."
        )


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
