"""Layouts of other runtimes: against decoding word by word as their documents say, back and forth,
and their refusals.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.formats import affine, awq, gptq, mlx
from lowbit.grid import Affine, QTensor


def weight(bits, group, symmetric, rows=32, columns=128, seed=0):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = Affine(bits, group, symmetric)
    params = grid.stored(grid.fit(w), torch.float16)
    return QTensor(grid, grid.encode(w, params), params)


def field(words, bits, index):
    """Code ``index`` of a little-endian bit stream of 32-bit words, bit by bit."""
    return sum(
        (int(words[(index * bits + b) // 32]) >> ((index * bits + b) % 32) & 1) << b
        for b in range(bits)
    )


def unsigned(t):
    return t.numpy().view(np.uint32)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    group=st.sampled_from([None, 32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gptq_word_by_word_and_back(bits, group, symmetric, seed):
    q = weight(bits, group, symmetric, seed=seed)
    version = gptq.V1 if symmetric else gptq.V2
    t = gptq.pack(q, version)
    qweight, qzeros = unsigned(t["qweight"]), unsigned(t["qzeros"])
    for row, column in ((0, 0), (31, 127), (5, 77), (17, 31)):
        g = int(t["g_idx"][column])
        z = (field(qzeros[g], bits, row) + (version == gptq.V1)) & ((1 << bits) - 1)
        assert (field(qweight[:, row], bits, column) - z) * float(
            t["scales"][g, row]
        ) == pytest.approx(float(q.decode()[row, column]), abs=1e-7)
    assert gptq.unpack(t, q.grid, version).same_as(q) is None
    config = gptq.describe(
        {"a.b": q.grid, "a.c": Affine(8, None, True)}, ["lm_head", "x"], version, "m"
    )
    assert [gptq.grid_of(config, n) for n in ("a.b", "a.c", "x", "lm_head")] == [
        q.grid,
        Affine(8, None, True),
        None,
        None,
    ]


@settings(max_examples=15, deadline=None)
@given(group=st.sampled_from([None, 32, 128]), symmetric=st.booleans(), seed=st.integers(0, 999))
def test_awq_nibble_by_nibble_and_back(group, symmetric, seed):
    q = weight(4, group, symmetric, seed=seed)
    t = awq.pack(q)
    qweight, qzeros = unsigned(t["qweight"]), unsigned(t["qzeros"])
    for row, column in ((0, 0), (31, 127), (5, 77), (18, 30)):
        g, k = column // (group or 128), [0, 2, 4, 6, 1, 3, 5, 7].index(row % 8)
        code, zero = (int(w[row // 8]) >> (4 * k) & 15 for w in (qweight[column], qzeros[g]))
        assert (code - zero) * float(t["scales"][g, row]) == pytest.approx(
            float(q.decode()[row, column]), abs=1e-7
        )
    held = awq.unpack(t, q.grid)
    assert held.same_as(q) is None


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(mlx.BITS),
    group=st.sampled_from([None, 32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_mlx_word_by_word_and_back(bits, group, symmetric, seed):
    q = weight(bits, group, symmetric, columns=256, seed=seed)
    t = mlx.pack(q, torch.float32)
    assert t["weight"].dtype == torch.uint32
    words, size = unsigned(t["weight"].view(torch.int32)), mlx.group_of(q.grid, 256, "w")
    assert t["scales"].shape == t["biases"].shape == (32, 256 // size)
    for row, column in ((0, 0), (31, 255), (5, 77), (18, 130)):
        g = column // size
        value = field(words[row], bits, column) * float(t["scales"][row, g]) + float(
            t["biases"][row, g]
        )
        assert value == pytest.approx(float(q.decode()[row, column]), abs=1e-5)
    held = mlx.unpack(t, mlx.grid_of(mlx.describe({"w": q.grid}, {"w": (32, 256)}), "w"))
    assert torch.equal(held.codes, q.codes)
    held = mlx.unpack(t, q.grid)
    torch.testing.assert_close(
        held.params.zero_point.float(), q.params.zero_point.float(), rtol=0, atol=1e-5
    )


def test_what_the_layouts_cannot_say():
    with pytest.raises(LowbitError, match="Export to gptq_v2"):
        gptq.pack(weight(2, 64, False), gptq.V1)
    with pytest.raises(LowbitError, match="5-bit weights; GPTQ takes 2, 3, 4, 8 bits"):
        gptq.pack(weight(5, 64, True), gptq.V1)
    with pytest.raises(LowbitError, match="packs 32 weights at a time"):
        gptq.pack(weight(4, None, True, rows=24), gptq.V1)
    with pytest.raises(LowbitError, match="AWQ's layout takes 4 bits"):
        awq.pack(weight(2, 64, False))
    with pytest.raises(LowbitError, match="MLX takes 32, 64 and 128"):
        mlx.pack(weight(4, 16, False), torch.float32)
    q = weight(4, 64, True)
    q.params.scale[0, 0] = 1e-9
    with pytest.raises(LowbitError, match="which float16 does not hold"):
        gptq.pack(q, gptq.V1, "layer")


@pytest.mark.parametrize("group", [32, 128])
def test_awq_as_compressed_tensors_own_converter_reads_it(group):
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    q = weight(4, group, False)
    converter = AutoAWQConverter(group_size=group)
    found = converter.process({f"layer.{k}": t for k, t in awq.pack(q, "layer").items()})
    expected = affine.pack(q, torch.float16)
    for key in ("weight_packed", "weight_scale", "weight_zero_point"):
        assert torch.equal(found[f"layer.{key}"], expected[key]), key
