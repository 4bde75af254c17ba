"""Grids and packing: golden vectors, round trips, agreement with compressed-tensors' own packer."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.formats import affine
from lowbit.grid import Affine, QTensor
from lowbit.grid.bits import pack, unpack

W = torch.tensor(
    [
        [-0.50, -0.31, -0.12, 0.04, 0.13, 0.22, 0.37, 0.70],
        [0.02, 0.05, -0.07, 0.11, -0.20, 0.16, 0.24, -0.03],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize(
    "bits, scale, zero, codes",
    [
        (2, [0.4, 0.146666666], [1, 1], [[0, 0, 1, 1, 1, 2, 2, 3], [1, 1, 1, 2, 0, 2, 3, 1]]),
        (3, [0.17142857, 0.06285714], [3, 3], [[0, 1, 2, 3, 4, 4, 5, 7], [3, 4, 2, 5, 0, 6, 7, 3]]),
    ],
)
def test_golden_vectors(bits, scale, zero, codes):
    grid = Affine(bits, 8)
    params = grid.fit(W)
    torch.testing.assert_close(params.scale[:, 0], torch.tensor(scale, dtype=torch.float64))
    assert params.zero_point[:, 0].tolist() == zero
    assert grid.encode(W, params).tolist() == codes


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8), rows=st.integers(1, 5), n=st.integers(1, 130), seed=st.integers(0, 1000)
)
def test_pack_is_invertible_and_is_the_published_layout(bits, rows, n, seed):
    codes = torch.randint(
        0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, n), codes)
    assert torch.equal(packed, pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits))


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit in 2 bits"):
        pack(torch.full((1, 8), 4, dtype=torch.uint8), 2)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 16]),
    symmetric=st.booleans(),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_decoded_weights_lie_within_half_a_step_inside_the_range(
    bits, group, symmetric, shift, seed
):
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) + shift
    grid = Affine(bits, group, symmetric)
    params = grid.fit(w)
    codes = grid.encode(w, params)
    assert int(codes.max()) <= grid.top
    error = grid.grouped(grid.decode(codes, params) - w).abs() / params.scale[..., None]
    # rounding the zero point shifts the grid by up to half a step, which the ends pay
    assert float(error.max()) <= 1.0 + 1e-4
    assert torch.equal(grid.encode(grid.decode(codes, params), params), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "grid", [Affine(2, 16), Affine(3, 16, True), Affine(4), Affine(5, 8), Affine(8, None, True)]
)
def test_format_is_exactly_invertible(grid, dtype):
    w = torch.randn(20, 48)
    params = grid.stored(grid.fit(w), dtype)
    q = QTensor(grid, grid.encode(w, params), params)
    packed = affine.pack(q, dtype)
    assert affine.unpack(packed, grid).same_as(q) is None
    assert sum(t.nbytes for t in packed.values()) == affine.tensor_bytes(
        grid, 20, 48, dtype.itemsize
    )


def test_bad_grids_are_refused():
    for bad in (
        dict(bits=0),
        dict(bits=9),
        dict(bits=1, symmetric=True),
        dict(bits=4, group_size=0),
    ):
        with pytest.raises(ValueError):
            Affine(**bad)
    with pytest.raises(ValueError, match="does not divide"):
        Affine(4, 5).fit(torch.randn(2, 16))
