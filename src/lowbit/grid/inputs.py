"""What happens to activations on their way into a product: on a linear's input, and on the keys and
values of attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .activation import ActivationGrid, PerToken
from .rotation import Rotation


@dataclass(frozen=True, eq=False)
class InputQuantizer:
    """A linear's input x becomes grid(x R / factor) * factor before it meets the weight.

    Attributes:
        rotation: online rotation R; the weight holds W R, so that the product is unchanged.
        grid: quantizes what enters the product.
        factor: (channels,) what a transform under trial would divide the activation by; None once
            it is folded.
    """

    rotation: Rotation | None = None
    grid: ActivationGrid | None = None
    factor: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., channels) -> what the weight sees, in x's dtype."""
        if self.rotation is not None:
            x = self.rotation(x)
        if self.grid is None:
            return x
        if self.factor is None:
            return self.grid(x)
        factor = self.factor.to(x.dtype)
        return self.grid(x / factor) * factor

    def exact(self) -> InputQuantizer:
        """The same without quantization."""
        return InputQuantizer(self.rotation)

    def with_factor(self, factor: Tensor) -> InputQuantizer:
        """The same with the activation divided by ``factor`` before its grid."""
        return replace(self, factor=factor)


@dataclass(frozen=True, eq=False)
class KVGrid:
    """Keys and values, (rows, heads, length, head width), as a quantized cache would give them
    back.

    Attributes:
        grid: applied to each head of each token.
        rotation: of a head, applied to keys before the grid and undone after it: what rotating
            queries and keys amounts to.
    """

    grid: PerToken
    rotation: Rotation | None = None

    def keys(self, k: Tensor) -> Tensor:
        """Keys after position encoding -> what attention sees."""
        if self.rotation is None:
            return self.grid(k)
        wide = torch.promote_types(k.dtype, torch.float32)
        return self.rotation.inverse(self.grid(self.rotation(k.to(wide)))).to(k.dtype)

    def values(self, v: Tensor) -> Tensor:
        """Values -> what attention sees."""
        return self.grid(v)


class QuantizedStates:
    """Stands where an attention layer expects its cache, and quantizes what is put into it.

    Args:
        kv: the grid. inner: the cache that keeps the states, None to keep nothing (a pass over
            whole rows).
    """

    def __init__(self, kv: KVGrid, inner: Any = None) -> None:
        self._kv, self._inner = kv, inner

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values; give back all that attention should see."""
        key_states, value_states = self._kv.keys(key_states), self._kv.values(value_states)
        if self._inner is None:
            return key_states, value_states
        out: tuple[Tensor, Tensor] = self._inner.update(key_states, value_states, *args, **kwargs)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
