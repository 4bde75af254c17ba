"""Dense n-bit packing: a little-endian bit stream, code ``i`` in bits ``[i*b, i*b + b)``, as
compressed-tensors >= 0.17 lays it out.

Eight b-bit codes are exactly b bytes, for every b. So one 64-bit word that holds eight codes, a
byte each, is squeezed in three shift-and-mask steps (8 -> 16 -> 32 -> 64-bit lanes) and its low b
bytes are the stream. No per-width code, no loops over codes, and the same three steps backwards
unpack it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

if sys.byteorder != "little":  # the words are views of byte buffers
    raise ImportError("lowbit packs codes on little-endian machines only")

_CHUNK = 1 << 21  # codes squeezed at a time: the temporaries stay in cache


def _lane_mask(width: int, lane: int, at: int = 0) -> int:
    """A 64-bit mask (as a signed int) of ``width`` bits from bit ``at`` of every ``lane``-bit
    lane.
    """
    mask = sum(((1 << width) - 1) << (start + at) for start in range(0, 64, lane))
    return mask - (1 << 64) if mask >> 63 else mask


def _squeeze(words: Tensor, bits: int) -> Tensor:
    for lane in (8, 16, 32):
        width = bits * lane // 8
        low, high = _lane_mask(width, 2 * lane), _lane_mask(width, 2 * lane, width)
        words = (words & low) | ((words >> (lane - width)) & high)
    return words


def _spread(words: Tensor, bits: int) -> Tensor:
    for lane in (32, 16, 8):
        width = bits * lane // 8
        low, high = _lane_mask(width, 2 * lane), _lane_mask(width, 2 * lane, lane)
        words = (words & low) | ((words << (lane - width)) & high)
    return words


def packed_words(count: int, bits: int) -> int:
    """How many int32 words ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the last dimension.

    Args:
        codes: (rows, n) uint8, each in [0, 2**bits - 1].
        bits: 1 to 8.

    Returns:
        (rows, ceil(n * bits / 32)) int32; unused high bits of each row's last word are zero.

    Raises:
        ValueError: wrong dtype, rank or width, or a code that does not fit.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(
            f"pack takes a (rows, n) uint8 tensor, got {tuple(codes.shape)} {codes.dtype}"
        )
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, which does not fit in {bits} bits")
    rows, n = codes.shape
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, 8 - n % 8))
    # A single row may keep an odd stride and still count as contiguous: flatten before changing the
    # element size.
    # (rows, ceil(n/8)), eight codes a word.
    octets = codes.reshape(-1).view(torch.int64).view(rows, -1)
    stream = octets.new_empty((*octets.shape, bits), dtype=torch.uint8)
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for at in range(0, rows, step):
        squeezed = octets[at : at + step] if bits == 8 else _squeeze(octets[at : at + step], bits)
        stream[at : at + step] = squeezed.unsqueeze(-1).view(torch.uint8)[..., :bits]
    flat = _resized(stream.flatten(1), 4 * packed_words(n, bits))
    return flat.reshape(-1).view(torch.int32).view(rows, -1)


def _resized(stream: Tensor, size: int) -> Tensor:
    """(rows, n) -> (rows, size): cut, or filled up with zeros."""
    missing = size - stream.shape[1]
    return stream[:, :size] if missing <= 0 else torch.nn.functional.pad(stream, (0, missing))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (rows, ceil(count * bits / 32)) int32 -> (rows, count) uint8.

    Raises:
        ValueError: wrong dtype, or a number of words that does not belong to ``count`` codes of
            this width.
    """
    if (
        words.dtype != torch.int32
        or words.dim() != 2
        or words.shape[1] != packed_words(count, bits)
    ):
        raise ValueError(
            f"{count} codes of {bits} bits are {packed_words(count, bits)} int32 words a row, got "
            f"{tuple(words.shape)} {words.dtype}"
        )
    rows, octets = words.shape[0], -(-count // 8)
    # A single column may keep an odd stride and still count as contiguous: flatten before changing
    # the element size.
    stream = words.contiguous().reshape(-1).view(torch.uint8).view(rows, -1)
    stream = _resized(stream, octets * bits).reshape(rows, octets, bits)
    codes = words.new_empty((rows, octets * 8), dtype=torch.uint8)
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    for at in range(0, rows, step):
        part = stream[at : at + step]
        wide = part.new_zeros((*part.shape[:2], 8))
        wide[..., :bits] = part
        spread = wide.view(torch.int64).squeeze(-1)
        codes[at : at + step] = (
            (spread if bits == 8 else _spread(spread, bits))
            .view(torch.uint8)
            .view(part.shape[0], -1)
        )
    return codes[:, :count].contiguous() if codes.shape[1] != count else codes
