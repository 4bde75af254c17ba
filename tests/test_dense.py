"""Codes moved from layout to layout while they stay packed, against codes moved one by one."""

import pytest
import torch

from lowbit.formats import awq, gptq, mlx
from lowbit.formats.dense import Dense, nibbles_turned, nibbles_turned_back, packed, turned
from lowbit.formats.ggml import BLOCKS, open_affine, pack_affine
from lowbit.grid import Affine, AffineParams, QTensor
from lowbit.grid.bits import pack, unpack


def weight(grid, rows=32, columns=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, grid.top + 1, (rows, columns), generator=g, dtype=torch.uint8)
    groups = columns // grid.group(columns)
    scale = torch.rand(rows, groups, generator=g).half().float() + 0.01
    zero = torch.full((rows, groups), float(1 << (grid.bits - 1)))
    return QTensor(grid, codes, AffineParams(scale, zero))


@pytest.mark.parametrize("rows, columns", [(8, 8), (32, 64), (272, 520), (8 * 257, 24)])
@pytest.mark.parametrize("order", [awq.ORDER, tuple(range(8))])
def test_nibbles_change_places_as_codes_do(rows, columns, order):
    codes = weight(Affine(4), rows, columns).codes
    words = nibbles_turned(pack(codes, 4), order)
    there = unpack(words, 4, rows).view(columns, -1, 8)
    assert torch.equal(there, codes.T.reshape(columns, -1, 8)[..., list(order)])
    assert torch.equal(nibbles_turned_back(words, order), pack(codes, 4))


@pytest.mark.parametrize("shape", [(1, 1), (256, 3), (300, 513)])
def test_words_are_turned(shape):
    words = torch.randint(-(2**31), 2**31, shape).int()
    assert torch.equal(turned(words), words.T) and turned(words).is_contiguous()


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_packed_weight_is_the_weight(bits):
    q = weight(Affine(bits, 32), columns=96)
    d = Dense.of(q)
    assert d.shape == q.shape and torch.equal(d.codes, q.codes) and d.coded().same_as(q) is None
    order = torch.arange(32).flip(0)
    assert torch.equal(d.ordered(order).codes, q.codes[order])
    assert packed(d) is d and packed(q).same_codes(d)
    other = QTensor(q.grid, q.codes.clone(), q.params)
    other.codes[3, 95] ^= 1
    assert not d.same_codes(Dense.of(other))


@pytest.mark.parametrize(
    "words, columns",
    [(torch.zeros(4, 7).int(), 64), (torch.zeros(4, 8), 64), (torch.zeros(32).int(), 64)],
)
def test_words_that_are_no_weight(words, columns):
    with pytest.raises(ValueError, match="64 codes of 4 bits are 8 int32 words a row"):
        Dense(Affine(4, 32), words, columns, weight(Affine(4, 32)).params)


@pytest.mark.parametrize(
    "pair, grid, rows, columns",
    [
        ((lambda q: gptq.pack(q, gptq.V2), gptq.opened, gptq.V2), Affine(3, 32), 64, 96),
        ((lambda q: gptq.pack(q, gptq.V1), gptq.opened, gptq.V1), Affine(8, 32, True), 32, 64),
        ((awq.pack, awq.opened), Affine(4, 20), 24, 100),
        ((awq.pack, awq.opened), Affine(4), 8, 4),
        ((lambda q: mlx.pack(q, torch.float32), mlx.opened), Affine(5, 32), 3, 96),
    ],
)
def test_layouts_take_packed_weights_and_give_them_back(pair, grid, rows, columns):
    to, back, *version = pair
    q = weight(grid, rows, columns)
    tensors = to(Dense.of(q))
    assert all(torch.equal(t, tensors[k]) for k, t in to(q).items())
    held = back(tensors, grid, *version)
    assert held.same_codes(Dense.of(q)) and torch.equal(held.codes, q.codes)


@pytest.mark.parametrize(
    "kind, bits, symmetric",
    [
        ("Q4_0", 4, True),
        ("Q4_0", 3, True),
        ("Q4_0", 2, True),
        ("Q4_1", 4, False),
        ("Q4_1", 2, False),
        ("Q8_0", 8, True),
        ("Q8_0", 6, True),
        ("Q2_0", 2, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 64, 131])
def test_blocks_take_packed_weights_and_give_them_back(kind, bits, symmetric, rows):
    q = weight(Affine(bits, 64, symmetric), rows)
    held = pack_affine(Dense.of(q), BLOCKS[kind])
    assert torch.equal(held, pack_affine(q, BLOCKS[kind]))
    assert open_affine(held, BLOCKS[kind], q.grid).same_codes(Dense.of(q))
