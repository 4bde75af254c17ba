"""Uniform weights whose codes stay packed: what exports move from one layout to another, word by
word, without a byte for every code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from ..grid import Affine, AffineParams, QTensor
from ..grid.bits import pack, packed_words, unpack

_TILE = 256  # rows of words turned at a time: they stay in cache
_GROUPS = 32  # of eight rows of nibbles, likewise
_LANES = ((4, 0xFFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))  # nibbles apart, and which of a word


@dataclass(frozen=True)
class Dense:
    """A weight on a uniform grid, its codes in the bit stream of `lowbit.grid.bits`.

    Attributes:
        grid: which numbers the codes stand for.
        words: (out, ceil(in * bits / 32)) int32.
        columns: in.
        params: of the grid.

    Raises:
        ValueError: the words are not as many as the columns take.
    """

    grid: Affine
    words: Tensor
    columns: int
    params: AffineParams

    def __post_init__(self) -> None:
        count = packed_words(self.columns, self.grid.bits)
        if self.words.dtype != torch.int32 or self.words.dim() != 2 or self.words.shape[1] != count:
            raise ValueError(
                f"{self.columns} codes of {self.grid.bits} bits are {count} int32 words a row, got "
                f"{tuple(self.words.shape)} {self.words.dtype}"
            )

    @classmethod
    def of(cls, q: QTensor[Affine, AffineParams]) -> Dense:
        """A weight packed. Raises ValueError if a code does not fit its grid."""
        return cls(q.grid, pack(q.codes, q.grid.bits), q.codes.shape[1], q.params)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.words), self.columns

    @property
    def codes(self) -> Tensor:
        """(out, in) uint8, unpacked anew."""
        return unpack(self.words, self.grid.bits, self.columns)

    def same_codes(self, other: Dense) -> bool:
        """Whether the codes are those of another weight, whatever they stand for."""
        same = (self.grid.bits, self.columns) == (other.grid.bits, other.columns)
        return same and torch.equal(self.words, other.words)

    def coded(self) -> QTensor[Affine, AffineParams]:
        """The weight unpacked."""
        return QTensor(self.grid, self.codes, self.params)

    def ordered(self, order: Tensor) -> Dense:
        """The weight with its rows in another order, (out,) int64."""
        params = self.params.map(lambda t: t[order])
        return Dense(self.grid, self.words[order], self.columns, params)


Weight = Union[Dense, QTensor[Affine, AffineParams]]  # packed already, or not


def packed(q: Weight) -> Dense:
    """A weight packed, if it is not. Raises ValueError if a code does not fit its grid."""
    return q if isinstance(q, Dense) else Dense.of(q)


def turned(words: Tensor) -> Tensor:
    """The transpose of (a, b) words, contiguous. Raises ValueError if they are no matrix."""
    if words.dim() != 2:
        raise ValueError(f"words of shape {tuple(words.shape)} are no matrix")
    out = words.new_empty(words.shape[::-1])
    for at in range(0, len(words), _TILE):
        out[:, at : at + _TILE] = words[at : at + _TILE].T
    return out


def nibbles_turned(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The transpose of 4-bit codes, packed along the rows as along the columns before.

    Args:
        words: (8 a, b) int32, eight codes each. order: which of eight rows goes where in a word,
            lowest bits first.

    Returns:
        (8 b, a) int32.
    """
    groups, n = len(words) // 8, words.shape[1]
    rows, which = words.reshape(groups, 8, n), torch.tensor(order, device=words.device)
    out = words.new_empty(n, 8, groups)
    for at in range(0, groups, _GROUPS):
        part = rows[at : at + _GROUPS].index_select(1, which)
        out[:, :, at : at + _GROUPS] = _transposed(part).permute(2, 1, 0)
    return out.view(8 * n, groups)


def nibbles_turned_back(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `nibbles_turned`: (8 b, a) -> (8 a, b) int32."""
    n, groups = len(words) // 8, words.shape[1]
    columns, which = turned(words).view(groups, n, 8), torch.tensor(order, device=words.device)
    out = words.new_empty(groups, 8, n)
    for at in range(0, groups, _GROUPS):
        part = columns[at : at + _GROUPS].transpose(1, 2).contiguous()
        out[at : at + _GROUPS].index_copy_(1, which, _transposed(part))
    return out.view(8 * groups, n)


def _transposed(planes: Tensor) -> Tensor:
    """(g, 8, n) int32: nibble k of plane c changes places with nibble c of plane k, in place."""
    g, _, n = planes.shape
    for distance, mask in _LANES:
        pairs = planes.view(g, 4 // distance, 2, distance, n)
        swap(pairs[:, :, 0], pairs[:, :, 1], 4 * distance, mask)
    return planes


def swap(high: Tensor, low: Tensor, shift: int, mask: int) -> None:
    """Exchange the bits of one tensor that lie ``shift`` above ``mask`` with those of another under
    ``mask``, in place.
    """
    t = high >> shift
    t ^= low
    t &= mask
    low ^= t
    t <<= shift
    high ^= t
