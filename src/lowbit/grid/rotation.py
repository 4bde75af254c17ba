"""Orthogonal Hadamard rotations as Kronecker products, applied to the last dimension of a tensor.

A Hadamard matrix of size 2**m * K is the product of a Sylvester matrix and a tabulated K x K one (K
= 1, 12, 20, 28, ...); the tables are those that come with compressed-tensors. An artifact stores
the K x K matrix it was made with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LowbitError

_DENSE = 64  # Sylvester factors up to this size are applied as one matrix product


def sylvester(size: int) -> Tensor:
    """The (size, size) int8 matrix of +-1 for a power of two."""
    # Also while a loader builds on the meta device.
    h = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _table(size: int) -> Tensor | None:
    """A size x size matrix of +-1 with orthogonal rows, or None if no table has one."""
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    try:
        found = random_hadamard_matrix(size, torch.float64, gen=torch.Generator().manual_seed(0))
    except ValueError:
        return None
    signs = found.sign().to(torch.int8)  # normalised or not, as versions differ
    square = signs.to(torch.int32)
    exact = torch.equal(square @ square.T, size * torch.eye(size, dtype=torch.int32))
    return signs if exact else None


def hadamard_factors(size: int, what: str) -> tuple[Tensor, ...]:
    """Matrices of +-1 whose Kronecker product is a Hadamard matrix of this size.

    Args:
        what: names the dimension in the error.

    Raises:
        LowbitError: there is no such matrix, or none is tabulated.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    factors: list[Tensor] = []
    rest = size
    if odd > 1:
        k = 4 * odd
        while size % k == 0:
            table = _table(k)
            if table is not None:
                factors.append(table)
                rest //= k
                break
            k *= 2
        else:
            raise LowbitError(
                f"{what} is {size} = {size // odd} x {odd}: no Hadamard matrix of that size is "
                "known here, so it cannot be rotated."
            )
    while rest > 1:
        factors.insert(0, sylvester(min(rest, _DENSE)))
        rest //= min(rest, _DENSE)
    return tuple(factors)


@dataclass(frozen=True, eq=False)
class Rotation:
    """x -> x R with R = (F_1 kron ... kron F_n) / sqrt(size of the factors that are matrices).

    Attributes:
        factors: matrices of +-1 with orthogonal rows, int8, or a number n for the identity of that
            size.
    """

    factors: tuple[Tensor | int, ...]
    _copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor | None, ...]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def hadamard(cls, size: int, what: str = "the dimension") -> Rotation:
        """A full Hadamard rotation. Raises LowbitError if the size has none."""
        return cls(hadamard_factors(size, what))

    @classmethod
    def across_heads(cls, heads: int, width: int) -> Rotation:
        """Mixes the heads of (..., heads * width) and leaves the place within a head alone."""
        return cls((*hadamard_factors(heads, "the number of attention heads"), width))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the factors; their product is the size of the rotated dimension."""
        return tuple(f if isinstance(f, int) else len(f) for f in self.factors)

    @property
    def size(self) -> int:
        """The size of the rotated dimension."""
        return math.prod(self.shape)

    @property
    def scale(self) -> float:
        """1 / sqrt(size of the factors that are matrices), what their product of +-1 is multiplied
        by.
        """
        return 1 / math.sqrt(math.prod([len(f) for f in self.factors if not isinstance(f, int)]))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size), in x's dtype, computed in float32 at least;
        differentiable.
        """
        return self._applied(x, inverse=False)

    def inverse(self, x: Tensor) -> Tensor:
        """x -> x R^T, the inverse."""
        return self._applied(x, inverse=True)

    def _applied(self, x: Tensor, inverse: bool) -> Tensor:
        # 16 bits would round the scale (1/sqrt(28) by 0.24 % in bfloat16) and every sum between two
        # factors; signs are exact in any.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide).reshape(*x.shape[:-1], *self.shape)
        for at, matrix in enumerate(self._placed(x.device, wide), x.dim() - 1):
            if matrix is not None:
                y = (y.movedim(at, -1) @ (matrix.T if inverse else matrix)).movedim(-1, at)
        return (y.reshape(x.shape) * self.scale).to(x.dtype)

    def _placed(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The factors on a device in a floating-point dtype, None for an identity. Kept: a copy
        would make every pass wait for it.
        """
        kept = self._copies.get((device, dtype))
        if kept is None:
            with torch.inference_mode(False):  # else a later pass with gradients could not use them
                kept = tuple(
                    None if isinstance(f, int) else f.to(device, dtype) for f in self.factors
                )
            # A tracer's tensors mean nothing outside of its graph.
            if not torch.compiler.is_compiling():
                self._copies[device, dtype] = kept
        return kept


def dense(factors: Sequence[Tensor]) -> Tensor:
    """The orthogonal float64 matrix of a Hadamard rotation's factors."""
    out = torch.ones(1, 1, dtype=torch.float64)
    for f in factors:
        out = torch.kron(out, f.double() * len(f) ** -0.5)
    return out
