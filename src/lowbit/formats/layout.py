"""How a weight on one kind of grid lies in files: one row of `lowbit.formats.LAYOUTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..grid import AnyGrid, Params, QTensor
from .dense import Dense

P = TypeVar("P", bound=Params)
Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Scheme:
    """What compressed-tensors says of weights on a grid.

    Attributes:
        format: its name for how they are packed. weights: the "weights" of a config group.
        decoded: the dtype in which loaders decode them, whatever that of the model; None for the
            model's own.
        unpacked: whether plain transformers must be told to decode while it loads.
    """

    format: str
    weights: Mapping[str, Any]
    decoded: torch.dtype | None = None
    unpacked: bool = False


def _nothing(*_: Any) -> None:
    return None


def _empty(*_: Any) -> dict[str, Any]:
    return {}


def _never(_: Any) -> bool:
    return False


@dataclass(frozen=True)
class Layout(Generic[P]):
    """How weights on one type of grid lie in files, and in memory while they are packed.

    Functions take the grid as `Any`: each is of the one type under which the table has the layout.
    Weights kept apart lie in tensors of their own beside these, see `lowbit.formats.outliers`.

    Attributes:
        kind: such weights in words, in the plural.
        pack: (weight, dtype of stored scales) -> tensors by local names. unpack: the inverse,
            (tensors, grid, full name) -> weight without outliers. opened: the same, its codes still
            packed; None where they cannot be.
        tensor_bytes: (grid, outputs, inputs, bytes of a scale) -> bytes of the tensors.
        buffers: (grid, outputs, inputs, dtype of stored scales, columns by their bits) -> shape
            and dtype of every tensor by its local name.
        mark: local name of a tensor that every such weight has, and no linear in floating point.
        scheme: grid -> what compressed-tensors says of it; None if it cannot. read_scheme: the
            inverse; None for weights on another kind of grid.
        entry: (grid, columns by their bits) -> what only the library's own config says. read_entry:
            such an entry -> grid; None for another kind.
        counts: weight -> what the report says of it besides its shape and bytes.
        words: grid -> the grid in words.
        stays_packed: grid -> whether products are computed from packed tensors.
        is_gguf: whether the tensors are the very blocks that a GGUF file holds.
    """

    kind: str
    pack: Callable[[QTensor[Any, P], torch.dtype], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any, str], QTensor[Any, P]]
    tensor_bytes: Callable[[Any, int, int, int], int]
    buffers: Callable[[Any, int, int, torch.dtype, Mapping[int, int]], Buffers]
    mark: str = "weight_shape"
    scheme: Callable[[Any], Scheme | None] = _nothing
    read_scheme: Callable[[Scheme], AnyGrid | None] = _nothing
    entry: Callable[[Any, Mapping[Any, int]], dict[str, Any]] = _empty
    read_entry: Callable[[Mapping[str, Any]], AnyGrid | None] = _nothing
    counts: Callable[[QTensor[Any, P]], dict[str, Any]] = _empty
    words: Callable[[Any], str] = str
    stays_packed: Callable[[Any], bool] = _never
    is_gguf: bool = False
    opened: Callable[[Mapping[str, Tensor], Any, str], Dense] | None = None
