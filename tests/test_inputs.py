"""What happens to inputs on their way into a product, against loops in float64."""

import pytest
import torch

from lowbit.grid import (
    CrossQuant,
    InputQuantizer,
    KVGrid,
    LLMInt8,
    PerToken,
    QuantizedStates,
    Rotation,
    activation_grid,
)
from lowbit.kernels.integer import quantized


def inputs(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- CrossQuant -----------------------------------------------------------------------------------


def cross(x, bits, a, columns):
    """Equation by equation: scales t**a * c**(1 - a) / (2**(bits - 1) - 1) of one call."""
    x = x.double()
    out, scales = torch.empty_like(x), torch.empty_like(x)
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            for channel in range(x.shape[2]):
                t = max(abs(v) for v in x[row, token].tolist())
                seen = x[:, :, channel] if columns == "call" else x[row, :, channel]
                c = max(abs(v) for v in seen.flatten().tolist())
                scales[row, token, channel] = t**a * c ** (1 - a) / (2 ** (bits - 1) - 1)
                steps = x[row, token, channel] / scales[row, token, channel]
                out[row, token, channel] = steps
    return out, scales


@pytest.mark.parametrize("columns", ["call", "sequence"])
@pytest.mark.parametrize("a", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_crossquant_element_by_element(bits, a, columns):
    x = inputs(2, 4, 6, seed=bits)
    x[..., 2] *= 20
    steps, scale = cross(x, bits, a, columns)
    codes, got = CrossQuant(bits, a, columns).codes(x)
    torch.testing.assert_close(got.double(), scale, rtol=1e-5, atol=0)
    away = (codes.double() - steps).abs()
    assert float(away.max()) <= 0.5 + 1e-4 and torch.equal(codes, codes.round())
    assert float(codes.abs().max()) <= 2 ** (bits - 1) - 1  # nothing is clipped
    torch.testing.assert_close(CrossQuant(bits, a, columns)(x), codes * got)


@pytest.mark.parametrize(
    "a, columns, depends",
    [
        (1.0, "call", False),
        (1.0, "sequence", False),
        (0.15, "call", True),
        (0.15, "sequence", False),
    ],
)
def test_which_rows_a_rows_numbers_depend_on(a, columns, depends):
    x = inputs(3, 5, 8)
    louder = x.clone()
    louder[1] *= 10
    grid = CrossQuant(4, a, columns)
    assert torch.equal(grid(x)[0], grid(louder)[0]) == (not depends)
    assert not torch.equal(grid(x)[1], grid(louder)[1])


@pytest.mark.parametrize(
    "grid, flat, mixes, option",
    [
        (PerToken(8), False, False, None),
        (PerToken(8), True, False, None),
        (CrossQuant(8), False, True, "--set activations.columns=sequence"),
        (CrossQuant(8), True, True, None),
        (CrossQuant(8, columns="sequence"), False, False, "--set activations.columns=sequence"),
        (CrossQuant(8, columns="sequence"), True, True, None),
        (LLMInt8(), False, True, None),
        (LLMInt8(), True, True, None),
    ],
)
def test_grids_say_whether_rows_mix(grid, flat, mixes, option):
    assert grid.mixes_rows(flat) == mixes and grid.apart(flat) == option


EVERY = [PerToken(4), PerToken(4, True), PerToken(8, True, full_range=True), LLMInt8(4)]


@pytest.mark.parametrize(
    "grid, shape",
    [
        *((g, s) for g in [*EVERY, CrossQuant(4)] for s in ((1, 1, 8), (2, 3, 8))),
        *((g, (0, 3, 8)) for g in EVERY),  # an expert that gets no token
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_and_nothing_changes_shape_or_dtype(grid, shape, dtype):
    zeros = torch.zeros(shape, dtype=dtype)
    out = grid(zeros)
    assert out.dtype == dtype and out.shape == zeros.shape and not out.any()
    assert bool(grid(inputs(*shape, dtype=dtype)).isfinite().all())


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({}, PerToken),
        ({"clip": 0.9}, PerToken),
        ({"symmetric": True, "full_range": True}, PerToken),
        ({"row_exponent": 0.5}, CrossQuant),
        ({"row_exponent": 0.5, "columns": "call"}, CrossQuant),
        ({"threshold": 5.0}, LLMInt8),
    ],
)
def test_the_kind_follows_from_the_options(fields, kind):
    assert activation_grid(fields) is kind
    assert isinstance(kind(bits=8, **fields), kind)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PerToken(1), "activation bits must be 2 to 8 .or 16 for none., got 1"),
        (lambda: PerToken(16), "got 16"),
        (lambda: PerToken(8, clip=0), r"clip must be in \(0, 1\], got 0"),
        (lambda: PerToken(8, clip=1.01), r"clip must be in \(0, 1\], got 1.01"),
        (lambda: PerToken(8, full_range=True), "set symmetric too"),
        (lambda: CrossQuant(9), "activation bits must be 2 to 8"),
        (lambda: CrossQuant(8, -0.1), r"row_exponent must be in \[0, 1\], got -0.1"),
        (lambda: CrossQuant(8, 1.1), r"row_exponent must be in \[0, 1\], got 1.1"),
        (lambda: CrossQuant(8, float("nan")), "row_exponent must be in"),
        (lambda: CrossQuant(8, columns="batch"), "one of call, sequence, got 'batch'"),
        (lambda: LLMInt8(9), "activation bits must be 2 to 8"),
        (lambda: LLMInt8(8, 0.0), "threshold must be positive, got 0.0"),
        (lambda: LLMInt8(8, float("nan")), "threshold must be positive"),
    ],
)
def test_options_out_of_range_are_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- LLM.int8() -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 2.0, 100.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_mixed_decomposition_channel_by_channel(bits, threshold):
    x = inputs(2, 5, 12, seed=bits)
    x[1, 3, 7] = -threshold  # reaches it exactly
    kept = [c for c in range(12) if max(abs(v) for v in x[..., c].flatten().tolist()) >= threshold]
    assert 7 in kept
    grid = LLMInt8(bits, threshold)
    assert grid.outliers(x).nonzero()[:, 0].tolist() == kept
    out, top = grid(x), 2 ** (bits - 1) - 1
    assert torch.equal(out[..., kept], x[..., kept])
    rest = [c for c in range(12) if c not in kept]
    values, got = (t.flatten(0, 1)[:, rest].double() for t in (x, out))
    if rest:
        scale = values.abs().amax(1, keepdim=True) / top  # of a token, what is kept left out
        assert bool(((got - values).abs() <= 0.5001 * scale).all())


# --- input quantizers -----------------------------------------------------------------------------


def hadamard(size):
    """The orthogonal matrix of Sylvester's construction, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / len(h) ** 0.5


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("grid", [None, PerToken(8), PerToken(3, True), CrossQuant(4)], ids=str)
def test_an_input_is_rotated_then_divided_then_quantized(grid, factored, rotated):
    x, factor = inputs(2, 3, 16), torch.rand(16) + 0.5
    quantizer = InputQuantizer(Rotation.hadamard(16) if rotated else None, grid)
    if factored:
        quantizer = quantizer.with_factor(factor)
    expected = (x.double() @ hadamard(16) if rotated else x.double()).float()
    torch.testing.assert_close(quantizer.exact()(x), expected)
    assert quantizer.exact().grid is None and quantizer.exact().factor is None
    if grid is not None:
        expected = grid(expected / factor) * factor if factored else grid(expected)
    found = quantizer(x)
    near = (found - expected).abs() < 1e-4  # but where the rotation's rounding moves a code
    assert float(near.double().mean()) > 0.95 and found.dtype == x.dtype


def test_a_factor_makes_another_value():
    one = InputQuantizer(grid=PerToken(4))
    two = one.with_factor(torch.full((8,), 2.0))
    x = inputs(4, 8)
    assert one.factor is None and two.grid is one.grid
    torch.testing.assert_close(two(x), one(x))  # a power of two changes no code
    assert not torch.equal(one.with_factor(torch.rand(8) + 0.1)(x), one(x))


# --- keys and values ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [False, True])
def test_keys_head_by_head(rotated, dtype):
    grid, k = PerToken(4), inputs(2, 3, 5, 8, dtype=dtype)
    kv = KVGrid(grid, Rotation.hadamard(8) if rotated else None)
    expected = grid(k)
    if rotated:
        matrix = hadamard(8).float()
        expected = (grid(k.float() @ matrix) @ matrix.T).to(dtype)
    close = torch.isclose(kv.keys(k).float(), expected.float(), rtol=1e-2, atol=1e-2)
    # But for a head in which the rotation's rounding moves a code.
    assert kv.keys(k).dtype == dtype and float(close.all(-1).double().mean()) >= 29 / 30
    one = kv.keys(k[1:, 2:, 3:4])  # of each head and token by itself
    torch.testing.assert_close(one, kv.keys(k)[1:, 2:, 3:4], rtol=1e-2, atol=1e-2)
    assert torch.equal(kv.values(k), grid(k))


class Cache:
    """Keeps what it is given, as a cache of transformers does."""

    layers = "kept"

    def __init__(self):
        self.seen, self.asked = [], []

    def update(self, k, v, *args, **kwargs):
        self.seen.append((k, v))
        self.asked.append((args, kwargs))
        return tuple(torch.cat(part, 2) for part in zip(*self.seen, strict=True))


@pytest.mark.parametrize("rotation", [None, Rotation.hadamard(8)], ids=["plain", "rotated"])
def test_a_cache_keeps_what_was_quantized_once(rotation):
    kv, inner = KVGrid(PerToken(4), rotation), Cache()
    states = QuantizedStates(kv, inner)
    one, two = inputs(1, 2, 3, 8), inputs(1, 2, 1, 8, seed=1)
    states.update(one, one, 0, position="a")
    k, v = states.update(two, two, 1)
    assert inner.asked == [((0,), {"position": "a"}), ((1,), {})]
    assert torch.equal(k, torch.cat([kv.keys(one), kv.keys(two)], 2))
    assert torch.equal(v, torch.cat([kv.values(one), kv.values(two)], 2))
    assert states.layers == "kept"
    alone = QuantizedStates(kv).update(two, two)
    assert torch.equal(alone[0], kv.keys(two)) and torch.equal(alone[1], kv.values(two))


# --- as integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_say_what_the_grid_gives(bits, symmetric):
    grid, x = PerToken(bits, symmetric), inputs(6, 24, seed=bits)
    codes, scale, zero = quantized(x, grid)
    assert (zero is None) is (symmetric and bits == 8)  # all zeros, said without a look at them
    zero = torch.zeros(6, 1, dtype=torch.int32) if zero is None else zero
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    assert scale.shape == zero.shape == (6, 1)
    value = (codes.int() - zero).double() * scale.double()
    torch.testing.assert_close(value, grid(x).double(), rtol=1e-6, atol=1e-7)
    assert int((codes.int() - zero).abs().max()) <= (
        2**bits - 1 if not symmetric else 2 ** (bits - 1)
    )
