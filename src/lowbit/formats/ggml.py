"""ggml's block types, as GGUF files hold weights: rows of blocks, each with its codes, scales and
units together.

Source: the block structures of ggml. Codes of this library are kept; what they stand for is w =
scale * (code - zero_point), with

    Q4_0   32 inputs: d, then nibbles, input i beside input i + 16                                d
    * (q - 8)
    Q4_1   32: d, m, nibbles as above                                                             d
    * q + m
    Q8_0   32: d, int8                                                                            d
    * q
    Q2_0   64: d, two bits each, four to a byte                                                   d
    * (q - 1); so d = -scale, q = 3 - code
    Q2_K, Q3_K, Q4_K, Q6_K   256: see `lowbit.grid.kquant`
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import Affine, AffineParams, KQuant, KQuantParams, QTensor
from ..grid.bits import pack as pack_bits
from ..grid.bits import unpack as unpack_bits
from ..grid.kquant import SUPER, Kind
from ..grid.names import scheme_name
from .dense import Dense, Weight, packed, swap
from .half import in_half


@dataclass(frozen=True)
class BlockType:
    """How a file holds numbers.

    Attributes:
        name: as ggml has it. number: in the file. size: inputs of a block. bytes: of a block.
            file_type: `general.file_type` of a model in it.
    """

    name: str
    number: int
    size: int
    bytes: int
    file_type: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.size * self.bytes


BLOCKS = {
    b.name: b
    for b in (
        BlockType("F32", 0, 1, 4, 0),
        BlockType("F16", 1, 1, 2, 1),
        BlockType("BF16", 30, 1, 2, 32),
        BlockType("Q4_0", 2, 32, 18, 2),
        BlockType("Q4_1", 3, 32, 20, 3),
        BlockType("Q8_0", 8, 32, 34, 7),
        BlockType("Q2_0", 42, 64, 18, 41),
        BlockType("Q2_K", 10, SUPER, 84, 10),
        BlockType("Q3_K", 11, SUPER, 110, 11),
        BlockType("Q4_K", 12, SUPER, 144, 14),
        BlockType("Q6_K", 14, SUPER, 210, 18),
    )
}
# Of the types that uniform grids go to: bits of a code.
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8, "Q2_0": 2}
_ROWS = 64  # that are laid out at a time: they stay in cache
_SIGNS = -0x7F7F7F80  # the highest bit of every byte
# Nibbles of two words of 32 bits take turns: exchanges of halves, bytes and nibbles in the middle.
_SHUFFLE = ((16, 0xFFFF0000), (8, 0x0000FF000000FF00), (4, 0x00F000F000F000F0))
BY_NUMBER = {b.number: b for b in BLOCKS.values()}
# The grids that types are made for.
_MADE_FOR: tuple[tuple[KQuant | Affine, BlockType], ...] = (
    *((KQuant(kind), BLOCKS[kind.upper()]) for kind in get_args(Kind)),
    (Affine(2, 64, True), BLOCKS["Q2_0"]),
    (Affine(4, 32, True), BLOCKS["Q4_0"]),
    (Affine(4, 32), BLOCKS["Q4_1"]),
    (Affine(8, 32, True), BLOCKS["Q8_0"]),
)


def fitting_schemes(widths: Iterable[int]) -> list[str]:
    """Schemes whose types have blocks that divide all rows, each with its type.

    Args:
        widths: inputs of every linear.
    """
    distinct = set(widths)
    return [
        f"{scheme_name(grid)} ({kind.name.lower()})"
        for grid, kind in _MADE_FOR
        if all(width % kind.size == 0 for width in distinct)
    ]


def _half_bytes(t: Tensor) -> Tensor:
    """(out, blocks) -> (out, blocks, 2) bytes of float16."""
    return t.to(torch.float16).contiguous().view(torch.uint8).view(*t.shape, 2)


def _halves(b: Tensor) -> Tensor:
    """(out, blocks, 2) bytes -> (out, blocks) float32."""
    return b.contiguous().view(torch.float16).squeeze(-1).float()


# --- K-quants -------------------------------------------------------------------------------------


def pack_k(q: QTensor[KQuant, KQuantParams]) -> Tensor:
    """(out, bytes of a row) uint8 of a weight on a `KQuant` grid."""
    grid, p = q.grid, q.params
    rows, columns = q.codes.shape
    n, subs = columns // SUPER, SUPER // grid.group_size
    codes = q.codes.view(rows, n, SUPER)
    scale, least = (t.view(rows, n, subs).to(torch.int16) for t in (p.scale, p.min))
    d, dmin = _half_bytes(p.unit), _half_bytes(p.unit_min)
    if grid.kind == "q2_k":
        return torch.cat(
            [(scale | least << 4).to(torch.uint8), _planes(codes), d, dmin], -1
        ).flatten(1)
    if grid.kind == "q3_k":
        high = (codes >> 2).view(rows, n, 8, 32)
        mask = torch.zeros(rows, n, 32, dtype=torch.uint8, device=codes.device)
        for i in range(8):
            mask |= high[:, :, i] << i
        return torch.cat(
            [mask, _planes(codes & 3), _six_bits((scale + 32).to(torch.uint8)), d], -1
        ).flatten(1)
    if grid.kind == "q4_k":
        pairs = codes.view(rows, n, 4, 2, 32)
        nibbles = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4).flatten(2)
        return torch.cat(
            [d, dmin, _scales_and_minima(scale.to(torch.uint8), least.to(torch.uint8)), nibbles], -1
        ).flatten(1)
    c = codes.view(rows, n, 2, 4, 32)
    low = torch.stack(
        [
            (c[:, :, :, 0] & 15) | (c[:, :, :, 2] & 15) << 4,
            (c[:, :, :, 1] & 15) | (c[:, :, :, 3] & 15) << 4,
        ],
        3,
    ).flatten(2)
    high = (
        ((c >> 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=c.device)[:, None])
        .sum(3, dtype=torch.uint8)
        .flatten(2)
    )
    return torch.cat([low, high, scale.to(torch.int8).view(torch.uint8), d], -1).flatten(1)


def unpack_k(blocks: Tensor, grid: KQuant) -> QTensor[KQuant, KQuantParams]:
    """The inverse of `pack_k`."""
    kind = BLOCKS[grid.kind.upper()]
    rows = len(blocks)
    b = blocks.view(rows, -1, kind.bytes)
    n = b.shape[1]
    if grid.kind == "q2_k":
        codes, scale, least = _from_planes(b[..., 16:80]), b[..., :16] & 15, b[..., :16] >> 4
        d, dmin = _halves(b[..., 80:82]), _halves(b[..., 82:84])
    elif grid.kind == "q3_k":
        high = torch.stack([(b[..., :32] >> i) & 1 for i in range(8)], 2).flatten(2)
        codes = _from_planes(b[..., 32:96]) | high << 2
        scale, d = _from_six_bits(b[..., 96:108]).to(torch.int16) - 32, _halves(b[..., 108:110])
        dmin, least = torch.zeros_like(d), torch.zeros_like(scale)
    elif grid.kind == "q4_k":
        d, dmin = _halves(b[..., :2]), _halves(b[..., 2:4])
        scale, least = _from_scales_and_minima(b[..., 4:16])
        nibbles = b[..., 16:].reshape(rows, n, 4, 1, 32)
        codes = torch.cat([nibbles & 15, nibbles >> 4], 3).flatten(2)
    else:
        low = b[..., :128].reshape(rows, n, 2, 2, 32)
        high = b[..., 128:192].reshape(rows, n, 2, 1, 32)
        quarters = [*(low & 15).unbind(3), *(low >> 4).unbind(3)]
        codes = torch.stack(
            [q | ((high[:, :, :, 0] >> 2 * i) & 3) << 4 for i, q in enumerate(quarters)], 3
        ).flatten(2)
        scale, d = b[..., 192:208].contiguous().view(torch.int8), _halves(b[..., 208:210])
        dmin, least = torch.zeros_like(d), torch.zeros_like(scale)
    params = KQuantParams(d, scale.reshape(rows, -1).float(), dmin, least.reshape(rows, -1).float())
    return QTensor(grid, codes.reshape(rows, n * SUPER), params)


def _planes(codes: Tensor) -> Tensor:
    """(out, n, 256) two-bit codes -> (out, n, 64): byte l of a half holds inputs l, l + 32, l + 64
    and l + 96 of it.
    """
    c = codes.reshape(*codes.shape[:2], 2, 4, 32)
    return (c[..., 0, :] | c[..., 1, :] << 2 | c[..., 2, :] << 4 | c[..., 3, :] << 6).flatten(2)


def _from_planes(b: Tensor) -> Tensor:
    halves = b.reshape(*b.shape[:2], 2, 1, 32)
    return torch.cat([(halves >> shift) & 3 for shift in (0, 2, 4, 6)], 3).flatten(2)


def _six_bits(scale: Tensor) -> Tensor:
    """(out, n, 16) six-bit numbers -> 12 bytes: low nibbles of the first and last eight, then the
    high pairs by fours.
    """
    low = (scale[..., :8] & 15) | (scale[..., 8:] & 15) << 4
    top = (scale >> 4).reshape(*scale.shape[:2], 4, 4)
    return torch.cat(
        [low, top[..., 0, :] | top[..., 1, :] << 2 | top[..., 2, :] << 4 | top[..., 3, :] << 6], -1
    )


def _from_six_bits(b: Tensor) -> Tensor:
    low = torch.cat([b[..., :8] & 15, b[..., :8] >> 4], -1)
    top = torch.cat([(b[..., 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    return low | top << 4


def _scales_and_minima(scale: Tensor, least: Tensor) -> Tensor:
    """(out, n, 8) six-bit pairs -> 12 bytes: four scales, four minima, four nibble pairs whose high
    bits sit on top of the first eight.
    """
    first = scale[..., :4] | (scale[..., 4:] >> 4) << 6
    second = least[..., :4] | (least[..., 4:] >> 4) << 6
    return torch.cat([first, second, (scale[..., 4:] & 15) | (least[..., 4:] & 15) << 4], -1)


def _from_scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    first, second, rest = b[..., :4], b[..., 4:8], b[..., 8:]
    scale = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], -1)
    return scale, torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], -1)


# --- uniform grids --------------------------------------------------------------------------------


def pack_affine(q: Weight, kind: BlockType, name: str = "weight") -> Tensor:
    """(out, bytes of a row) uint8 of a weight on a uniform grid in Q4_0, Q4_1, Q8_0 or Q2_0, codes
    kept, scales repeated per block.

    Raises:
        LowbitError: float16 does not hold a scale.
    """
    grid, params = q.grid, q.params
    rows, columns = q.shape
    n, repeat = columns // kind.size, grid.group(columns) // kind.size
    scale = _each(in_half(params.scale, name), repeat)
    heads = [-scale if kind.name == "Q2_0" else scale]
    if kind.name == "Q4_1":
        least = _each(-params.scale.double() * params.zero_point.double(), repeat)
        if not bool((least.abs() <= torch.finfo(torch.float16).max).all()):
            raise LowbitError(f"'{name}' has zero points beyond float16.")
        heads.append(least.to(torch.float16))
    words = _as_held(q, kind)
    out = words.new_empty(rows, n, kind.bytes // 2, dtype=torch.int16)
    for i, head in enumerate(heads):
        out[:, :, i] = head.view(torch.int16)
    for at in range(0, rows, _ROWS):
        held = _in_blocks(words[at : at + _ROWS].clone(), kind)
        out[at : at + _ROWS, :, len(heads) :] = held.view(torch.int16).view(len(held), n, -1)
    return out.view(torch.uint8).flatten(1)


def unpack_affine(blocks: Tensor, kind: BlockType, grid: Affine) -> QTensor[Affine, AffineParams]:
    """The inverse of `pack_affine`: codes on the grid that was packed, scale and zero point of each
    block in float64.
    """
    return open_affine(blocks, kind, grid).coded()


def own_grid(kind: BlockType) -> Affine:
    """The uniform grid that a type is: all of its codes, a group for each of its blocks."""
    return Affine(_BITS[kind.name], kind.size, kind.name != "Q4_1")


def open_affine(blocks: Tensor, kind: BlockType, grid: Affine) -> Dense:
    """The same weight, its codes still packed."""
    rows = len(blocks)
    b = blocks.view(torch.int16).view(rows, -1, kind.bytes // 2)
    columns, heads = b.shape[1] * kind.size, 2 if kind.name == "Q4_1" else 1
    words = b.new_empty(rows, columns * _BITS[kind.name] // 32, dtype=torch.int32)
    for at in range(0, rows, _ROWS):
        held = b[at : at + _ROWS, :, heads:].contiguous().view(torch.int32)
        words[at : at + _ROWS] = _out_of_blocks(held.view(len(held), -1), kind)
    d = b[:, :, 0].contiguous().view(torch.float16).double()
    if kind.name == "Q4_1":
        zero = -b[:, :, 1].contiguous().view(torch.float16).double() / d
    else:
        d = -d if kind.name == "Q2_0" else d
        zero = torch.full_like(d, 1 << (grid.bits - 1))
    own = Affine(grid.bits, kind.size, grid.symmetric)
    return Dense(own, _as_tuned(words, columns, kind, grid), columns, AffineParams(d, zero))


def _each(t: Tensor, repeat: int) -> Tensor:
    """(out, groups) -> (out, blocks)."""
    return t if repeat == 1 else t.repeat_interleave(repeat, 1)


def _as_held(q: Weight, kind: BlockType) -> Tensor:
    """(out, words) int32: codes in as many bits as the type has, counted from its own middle."""
    bits, grid = _BITS[kind.name], q.grid
    if bits == grid.bits:
        return packed(q).words
    moved = (1 << (bits - 1)) - (1 << (grid.bits - 1)) if grid.symmetric else 0
    return pack_bits(q.codes + moved, bits)


def _as_tuned(words: Tensor, columns: int, kind: BlockType, grid: Affine) -> Tensor:
    """The inverse of `_as_held`."""
    bits = _BITS[kind.name]
    if bits == grid.bits:
        return words
    moved = (1 << (bits - 1)) - (1 << (grid.bits - 1)) if grid.symmetric else 0
    return pack_bits(unpack_bits(words, bits, columns) - moved, grid.bits)


def _in_blocks(words: Tensor, kind: BlockType) -> Tensor:
    """(out, words) int32, a dense stream, as the type orders and signs its codes; written over."""
    if kind.name == "Q8_0":
        words ^= _SIGNS
    elif kind.name == "Q2_0":
        words.bitwise_not_()  # 3 - code
    else:
        pairs = words.view(torch.int64).view(len(words), -1, 2)
        swap(pairs[..., 0], pairs[..., 1], 32, 0xFFFFFFFF)
        for shift, mask in _SHUFFLE:
            _swap_within(pairs, shift, mask)
    return words


def _out_of_blocks(words: Tensor, kind: BlockType) -> Tensor:
    """The inverse of `_in_blocks`."""
    if kind.name in ("Q8_0", "Q2_0"):
        return _in_blocks(words, kind)
    pairs = words.view(torch.int64).view(len(words), -1, 2)
    for shift, mask in reversed(_SHUFFLE):
        _swap_within(pairs, shift, mask)
    swap(pairs[..., 0], pairs[..., 1], 32, 0xFFFFFFFF)
    return words


def _swap_within(words: Tensor, shift: int, mask: int) -> None:
    """Exchange the bits under ``mask`` with those ``shift`` above them, in place."""
    t = words >> shift
    t ^= words
    t &= mask
    words ^= t
    t <<= shift
    words ^= t
