"""Every kind of grid against the levels that its definition gives, written down in float64."""

import math

import pytest
import torch

from lowbit.grid import (
    MXFP4,
    Affine,
    AffineParams,
    Codebook,
    CodebookParams,
    KQuant,
    MXFP4Params,
    OrderedGrid,
    RangedGrid,
)
from lowbit.grid.kmeans import NotFiniteError
from lowbit.grid.kquant_fit import Moments, multiples, ranges, signed_ranges
from lowbit.grid.names import parse_grid

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
SUBS = {"q2_k": 16, "q3_k": 16, "q4_k": 32, "q6_k": 16}
MIDDLE = {"q2_k": 0, "q3_k": 4, "q4_k": 0, "q6_k": 32}

NAMES = [
    "W1g32",
    "W2",
    "W2g16",
    "W3g64sym",
    "W4sym",
    "W5g8",
    "W8g128",
    "W1:column",
    "W2:column",
    "W3g4:column",
    "W4:row",
    "W3:tensor",
    "gguf:q2_k",
    "gguf:q3_k",
    "gguf:q4_k",
    "gguf:q6_k",
    "mxfp4",
]


def levels_of(grid, params, rows, width):
    """(rows, width, codes) float64: what every code of every weight stands for."""
    if isinstance(grid, Affine):
        size = grid.group_size or width
        code = torch.arange(2**grid.bits, dtype=torch.float64)
        scale = params.scale.double().repeat_interleave(size, 1)[..., None]
        zero = params.zero_point.double().repeat_interleave(size, 1)[..., None]
        return (code - zero) * scale
    if isinstance(grid, Codebook):
        levels = params.levels.double()
        if grid.per == "row":
            return levels[:, None].expand(rows, width, -1)
        if grid.per == "tensor":
            return levels[None].expand(rows, width, -1)
        shared = levels.repeat_interleave(grid.group_size or 1, 0)
        return shared[None].expand(rows, width, -1)
    if isinstance(grid, KQuant):
        size, code = SUBS[grid.kind], torch.arange(2**grid.bits, dtype=torch.float64)

        def wide(unit, small):
            unit = unit.double().repeat_interleave(256, 1)
            return (unit * small.double().repeat_interleave(size, 1))[..., None]

        scale, least = wide(params.unit, params.scale), wide(params.unit_min, params.min)
        return scale * (code - MIDDLE[grid.kind]) - least
    numbers = torch.tensor([*(-m for m in E2M1[:0:-1]), *E2M1], dtype=torch.float64)
    return numbers * params.scale.double().repeat_interleave(32, 1)[..., None]


def fitted(name, seed=0, rows=5, width=256):
    """Weights, some of them far beyond the range, and params fitted without those."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator)
    grid = parse_grid(name)
    params = grid.stored(grid.fit(w), torch.float32)
    w[:, ::17] *= 9
    return grid, w, params, levels_of(grid, params, rows, width)


@pytest.mark.parametrize("name", NAMES)
def test_codes_stand_for_the_levels_of_the_definition(name):
    grid, w, params, levels = fitted(name)
    for code in range(levels.shape[-1]):
        decoded = grid.decode(torch.full(w.shape, code, dtype=torch.uint8), params)
        torch.testing.assert_close(decoded.double(), levels[..., code], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_nearest_level(name, seed):
    grid, w, params, levels = fitted(name, seed)
    distance = (w.double()[..., None] - levels).abs()
    codes = grid.encode(w, params).long()
    mine = distance.gather(-1, codes[..., None])[..., 0]
    assert bool((mine <= distance.amin(-1) + 1e-6).all())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_neighbours_are_the_levels_next_to_a_weight(name, seed):
    grid, w, params, levels = fitted(name, seed)
    assert isinstance(grid, OrderedGrid)
    low, high, fraction = grid.neighbours(w, params)
    exact = w.double()[..., None]
    inside = (exact > levels.amin(-1, True)) & (exact < levels.amax(-1, True))
    assert float(inside.double().mean()) > 0.3  # of one bit, half of a row may lie outside
    below = levels.masked_fill(levels > exact, float("-inf")).amax(-1)
    above = levels.masked_fill(levels < exact, float("inf")).amin(-1)
    found = torch.stack([levels.gather(-1, t.long()[..., None])[..., 0] for t in (low, high)])
    at = inside[..., 0] & ((exact - levels).abs().amin(-1) > 1e-5)  # not on a level
    torch.testing.assert_close(found.amin(0)[at], below[at], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.amax(0)[at], above[at], rtol=0, atol=1e-6)
    assert bool(((fraction >= 0) & (fraction < 1)).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_nearer_neighbour_is_the_nearest_level_beyond_the_ends_too(name):
    grid, w, params, levels = fitted(name)
    low, high, fraction = grid.neighbours(w, params)
    nearer = torch.where(fraction > 0.5, high, low).long()
    distance = (w.double()[..., None] - levels).abs()
    mine = distance.gather(-1, nearer[..., None])[..., 0]
    assert bool((mine <= distance.amin(-1) + 1e-5).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("toward", [-1, 1])
def test_no_code_lies_beside_the_last_one(name, toward):
    grid, w, params, levels = fitted(name)
    codes = grid.encode(w * 1e3, params).long()
    end = torch.full_like(w, toward)
    for _ in range(levels.shape[-1]):
        codes = grid.beside(codes.to(torch.uint8), end, params).long()
    at = levels.gather(-1, codes[..., None])[..., 0]
    expected = levels.amax(-1) if toward > 0 else levels.amin(-1)
    torch.testing.assert_close(at, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(parse_grid(n), RangedGrid)])
def test_ends_are_those_of_each_group_with_zero_between(name):
    grid, w, _, _ = fitted(name)
    w[0] = w[0].abs() + 0.5
    w[1] = -w[1].abs() - 0.5
    low, high = grid.ends(w)
    size = grid.group(256)
    for row in range(len(w)):
        for group in range(256 // size):
            part = w[row, group * size : group * size + size].tolist()
            assert float(low[row, group]) == min([*part, 0.0])
            assert float(high[row, group]) == max([*part, 0.0])


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(parse_grid(n), RangedGrid)])
def test_rounding_is_coding_and_decoding(name):
    grid, w, params, levels = fitted(name)
    codes = grid.encode(w, params).long()[..., None]
    torch.testing.assert_close(
        grid.rounded(w, params).double(), levels.gather(-1, codes)[..., 0], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "grid, low, high, scale, zero",
    [
        (Affine(2), -1.0, 2.0, 1.0, 1),
        (Affine(2), 0.0, 3.0, 1.0, 0),
        (Affine(2), -3.0, 0.0, 1.0, 3),
        (Affine(4), -7.5, 7.5, 1.0, 8),  # 7.5 is halfway: to even
        (Affine(3), -3.5, 3.5, 1.0, 4),
        (Affine(8), -255.0, 0.0, 1.0, 255),
        (Affine(1), -1.0, 0.0, 1.0, 1),
        (Affine(2), 0.0, 0.0, 1e-5 / 3, 0),
        (Affine(2, None, True), -1.0, 2.0, 2.0, 2),
        (Affine(3, None, True), -3.0, 2.0, 1.0, 4),
        (Affine(4, None, True), -1.0, 7.0, 1.0, 8),
        (Affine(8, None, True), -127.0, 1.0, 1.0, 128),
        (Affine(4, None, True), 0.0, 0.0, 1e-5 / 7, 8),
    ],
)
def test_uniform_params_follow_from_the_ends(grid, low, high, scale, zero):
    ends = (torch.tensor([[float(v)]], dtype=torch.float64) for v in (low, high))
    params = grid.from_range(*ends)
    assert float(params.scale) == pytest.approx(scale, rel=1e-12)
    assert float(params.zero_point) == zero


@pytest.mark.parametrize(
    "w, code",
    [(-9.0, 0), (-2.0, 0), (-1.5, 0), (-1.4, 1), (-0.5, 2), (0.5, 2), (0.6, 3), (1.5, 3), (9.0, 3)],
)
def test_halfway_a_uniform_code_is_that_of_the_even_step(w, code):
    params = AffineParams(torch.ones(1, 1), torch.full((1, 1), 2.0))
    assert Affine(2).encode(torch.tensor([[w]]), params).tolist() == [[code]]


# --- what is stored -------------------------------------------------------------------------------

SMALLEST = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


@pytest.mark.parametrize(
    "dtype, scale, stored",
    [
        (torch.float32, 1 + 2.0**-20, 1 + 2.0**-20),
        (torch.bfloat16, 1 + 2.0**-7, 1 + 2.0**-7),
        (torch.bfloat16, 1 + 2.0**-8, 1.0),  # halfway, to even
        (torch.bfloat16, 1 + 3 * 2.0**-8, 1 + 2.0**-6),
        (torch.float16, 1 + 2.0**-10, 1 + 2.0**-10),
        (torch.float16, 1 + 2.0**-11, 1.0),
        (torch.float16, 65504.0, 65504.0),
        *((d, 0.0, least) for d, least in SMALLEST.items()),
        (torch.float16, 2.0**-20, 2.0**-14),
    ],
)
def test_uniform_scales_are_held_in_the_models_dtype(dtype, scale, stored):
    params = AffineParams(torch.full((2, 1), scale), torch.ones(2, 1))
    held = Affine(4).stored(params, dtype)
    assert held.scale.dtype == torch.float32
    assert held.scale[:, 0].tolist() == [stored, stored]
    assert torch.equal(held.zero_point, params.zero_point)
    Affine(4).check_finite(held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["W2:column", "W4:row", "gguf:q2_k", "gguf:q6_k"])
def test_levels_and_units_are_numbers_of_float16_whatever_the_model(name, dtype):
    grid = parse_grid(name)
    held = grid.stored(grid.fit(torch.randn(4, 256)), dtype)
    numbers = [held.levels] if isinstance(grid, Codebook) else [held.unit, held.unit_min]
    for t in numbers:
        assert t.dtype == torch.float32 and torch.equal(t.half().float(), t)
    assert grid.stored(held, dtype).differing(held) is None


@pytest.mark.parametrize(
    "name, size, dtype, words",
    [
        ("W4g32", 1e6, torch.float16, "a number of W4g32 is beyond what is stored"),
        ("W4g32sym", 1e6, torch.float16, "a number of W4g32sym is beyond"),
        ("W4g32", 1e6, torch.bfloat16, None),
        ("W2:column", 1e5, torch.bfloat16, "a level does not fit in float16"),
        ("W2:column", 6e4, torch.bfloat16, None),
        ("gguf:q2_k", 1e8, torch.bfloat16, "a unit of gguf:q2_k does not fit in float16"),
        ("gguf:q6_k", 1e9, torch.float32, "a unit of gguf:q6_k does not fit in float16"),
        ("gguf:q2_k", 1e30, torch.bfloat16, "a unit of gguf:q2_k does not fit"),
        ("gguf:q3_k", 1e30, torch.bfloat16, "a unit of gguf:q3_k does not fit"),
        ("gguf:q4_k", 1e9, torch.bfloat16, "a unit of gguf:q4_k does not fit"),
        ("gguf:q4_k", float("inf"), torch.bfloat16, "a unit of gguf:q4_k does not fit"),
        ("gguf:q6_k", float("nan"), torch.bfloat16, "a unit of gguf:q6_k does not fit"),
        ("gguf:q4_k", 1e4, torch.bfloat16, None),
        ("gguf:q2_k", 9e5, torch.bfloat16, None),
        ("gguf:q2_k", 1e6, torch.bfloat16, "a unit of gguf:q2_k does"),  # a minimum is 15 units
        ("mxfp4", 1e30, torch.float16, None),
        ("mxfp4", float("inf"), torch.bfloat16, "a number of mxfp4 is beyond what is stored"),
    ],
)
def test_what_no_file_can_hold_is_refused_in_words(name, size, dtype, words):
    grid = parse_grid(name)
    w = torch.linspace(-1, 1, 256).repeat(4, 1) * size
    if not math.isfinite(size):
        w = torch.ones(4, 256).index_fill(1, torch.tensor([7]), size)
    held = grid.stored(grid.fit(w), dtype)
    if words is None:
        grid.check_finite(held)
        return
    with pytest.raises(NotFiniteError, match=words):
        grid.check_finite(held)


@pytest.mark.parametrize(
    "name, width, words",
    [
        ("W4g32", 48, "group size 32 does not divide the 48 inputs"),
        ("W4g32sym", 31, "group size 32 does not divide the 31 inputs"),
        ("W4", 31, None),
        ("W2g5:column", 12, "group size 5 does not divide the 12 inputs"),
        ("W2g4:column", 12, None),
        ("W2:column", 7, None),
        ("W2:row", 7, None),
        ("W2:tensor", 7, None),
        ("gguf:q2_k", 128, "gguf:q2_k comes in blocks of 256 inputs, .* the 128 inputs"),
        ("gguf:q6_k", 384, "gguf:q6_k comes in blocks of 256 inputs, .* the 384 inputs"),
        ("gguf:q4_k", 512, None),
        ("mxfp4", 48, "mxfp4 comes in blocks of 32 inputs, .* the 48 inputs"),
        ("mxfp4", 32, None),
    ],
)
def test_widths_are_checked_in_words(name, width, words):
    grid = parse_grid(name)
    if words is None:
        grid.check(width)
        w = torch.randn(3, width)
        assert grid.encode(w, grid.fit(w)).shape == (3, width)
    else:
        with pytest.raises(ValueError, match=words):
            grid.check(width)


@pytest.mark.parametrize(
    "name, bits, group, period, rows_apart, scales_with_inputs",
    [
        ("W4", 4, None, 512, True, False),
        ("W3g64", 3, 64, 64, True, False),
        ("W2:column", 2, None, 1, False, True),
        ("W2g1:column", 2, 1, 1, False, True),
        ("W2g4:column", 2, 4, None, False, False),
        ("W2:row", 2, None, None, True, False),
        ("W2:tensor", 2, None, None, False, False),
        ("gguf:q2_k", 2, 16, None, True, False),
        ("gguf:q3_k", 3, 16, None, True, False),
        ("gguf:q4_k", 4, 32, None, True, False),
        ("gguf:q6_k", 6, 16, None, True, False),
        ("mxfp4", 4, 32, 32, True, False),
    ],
)
def test_what_a_grid_says_of_itself(name, bits, group, period, rows_apart, scales_with_inputs):
    grid = parse_grid(name)
    assert (grid.bits, grid.group_size, grid.period(512)) == (bits, group, period)
    assert (grid.rows_apart, grid.scales_with_inputs) == (rows_apart, scales_with_inputs)
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    whole = grid.fit(w)
    if period is not None:
        parts = [grid.fit(part) for part in w.split(period, 1)]
        assert grid.join(parts).differing(whole) is None
    elif isinstance(grid, KQuant):
        with pytest.raises(NotImplementedError, match=f"{name} has no periods"):
            grid.join([whole])
    factor = torch.exp2(torch.arange(512) % 3 - 1.0)
    scaled = w * factor
    same = torch.equal(grid.encode(scaled, grid.fit(scaled)), grid.encode(w, whole))
    assert same == scales_with_inputs


@pytest.mark.parametrize("name", ["W3g64", "W4sym", "W2:row", "gguf:q2_k", "gguf:q6_k", "mxfp4"])
def test_rows_that_are_apart_are_fitted_apart(name):
    grid = parse_grid(name)
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(3))
    whole = grid.fit(w)
    for at in (slice(0, 2), slice(2, 3), slice(3, 6)):
        assert grid.fit(w[at]).differing(whole.rows(at)) is None


# --- codebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "levels, factor, moved",
    [  # gap of a book: (last - first) / (count - 1)
        ([0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]),
        ([0.0, 1.0, 2.0, 3.0], [2.0, 1.0, 0.0, 1.5], [1.0, 1.0, 1.0, 3.5]),
        ([-6.0, 0.0, 1.0, 6.0], [0.5, 1.0, 1.25, 2.0], [-8.0, 0.0, 2.0, 10.0]),
        ([65504.0 - 3, 65504 - 2, 65504 - 1, 65504.0], [1.0, 1.0, 1.0, 2.0], None),
    ],
)
def test_levels_move_by_shares_of_the_mean_gap(levels, factor, moved):
    params = CodebookParams(torch.tensor([levels]), torch.tensor([2]))
    got = Codebook(2, "tensor").moved(params, torch.tensor([factor])).levels[0].tolist()
    if moved is None:  # no further than float16 reaches
        assert got[-1] == 65504.0
    else:
        assert got == pytest.approx(moved)


@pytest.mark.parametrize(
    "levels, width, ordered, place",
    [  # place: where each code's level went
        ([3.0, 1.0, 2.0, 0.0], 2, [0.0, 1.0, 2.0, 3.0], [3, 1, 2, 0]),
        ([0.0, 1.0, 2.0, 3.0], 2, [0.0, 1.0, 2.0, 3.0], [0, 1, 2, 3]),
        ([5.0, 4.0, 4.0, 4.0], 1, [4.0, 5.0, 5.0, 5.0], [1, 0]),
        ([1.0, 1.0, 0.0, 0.0], 2, [0.0, 0.0, 1.0, 1.0], [2, 3, 0, 1]),
    ],
)
def test_levels_that_passed_each_other_come_back_into_order(levels, width, ordered, place):
    grid = Codebook(2, "tensor")
    params = CodebookParams(torch.tensor([levels]), torch.tensor([width]))
    codes = torch.arange(2**width, dtype=torch.uint8)[None]
    arranged, held = grid.arranged(codes, params)
    assert held.levels[0].tolist() == ordered and arranged[0].tolist() == place
    assert torch.equal(grid.decode(arranged, held), grid.decode(codes, params))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_refined_levels_are_lloyd_steps(steps):
    w = torch.randn(50, 1, generator=torch.Generator().manual_seed(2))
    levels = [-2.0, -0.1, 0.1, 0.2]
    params = CodebookParams(torch.tensor([[9.0] * 4, levels]), torch.tensor([2, 2]))
    got = Codebook(2).refined(params, 1, w, steps).levels[0].tolist()
    for _ in range(steps):
        parts = [[] for _ in levels]
        for value in w[:, 0].tolist():
            parts[min(range(4), key=lambda i: abs(levels[i] - value))].append(value)
        levels = [sum(p) / len(p) if p else at for p, at in zip(parts, levels, strict=True)]
    assert got == pytest.approx(levels, rel=1e-5)


@pytest.mark.parametrize("widths", [[1, 1, 1, 1], [2, 1, 3, 1], [3, 3, 2, 2]])
def test_columns_of_other_bits_are_fitted_as_alone(widths):
    w = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    params = Codebook(2).fit_columns(w, torch.tensor(widths))
    assert params.levels.shape == (4, 2 ** max(widths)) and params.widths.tolist() == widths
    for column, bits in enumerate(widths):
        alone = Codebook(bits).fit(w[:, column : column + 1]).levels[0]
        assert torch.equal(params.levels[column, : 2**bits], alone)
        assert bool((params.levels[column, 2**bits :] == alone[-1]).all())
    codes = Codebook(2).encode(w, params)
    assert all(int(codes[:, c].max()) < 2**b for c, b in enumerate(widths))
    assert Codebook(2).with_bits(3) == Codebook(3)


@pytest.mark.parametrize("widths", [[1, 3, 2, 3], [3, 1, 1, 1]])
def test_no_code_of_a_narrow_book_is_one_of_a_wider(widths):
    """Its repeated last level is there to fill the row."""
    grid, w = Codebook(3), torch.randn(60, 4, generator=torch.Generator().manual_seed(7)) * 3
    params = grid.fit_columns(w / 3, torch.tensor(widths))
    low, high, fraction = grid.neighbours(w, params)
    up = torch.ones_like(w)
    beyond = grid.beside(grid.beside(high, up, params), up, params)
    for column, bits in enumerate(widths):
        levels = params.levels[column, : 2**bits].double()
        exact = w[:, column].double()
        below = [max([i for i, v in enumerate(levels) if v <= x], default=0) for x in exact]
        above = [min(i + 1, 2**bits - 1) for i in below]
        assert low[:, column].tolist() == below and high[:, column].tolist() == above
        assert int(beyond[:, column].max()) == 2**bits - 1
        last = low[:, column] == 2**bits - 1
        assert bool(last.any()) and not fraction[:, column][last].any()


# --- the search of K-quants -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "integers, unit, least, most",
    [
        ([1, 3, 7, 15], 0.5, 0, 15),
        ([15, 0, 0, 0], 2.0**-6, 0, 15),
        ([-32, 5, 31, -1], 0.25, -32, 31),
        ([63, 62, 1, 40], 3 * 2.0**-9, 0, 63),
        ([0, 0, 0, 0], 0.0, 0, 15),
    ],
)
def test_multiples_of_a_half_are_found_exactly(integers, unit, least, most):
    exact = torch.tensor([integers], dtype=torch.float64)
    values = exact * unit
    weight = torch.rand(1, 4, dtype=torch.float64) + 0.1
    found, small = multiples(values, weight, least, most, range(1, most + 2))
    torch.testing.assert_close(found[..., None] * small, values, rtol=0, atol=0)
    assert int(small.min()) >= least and int(small.max()) <= most
    assert torch.equal(found.half().double(), found)


@pytest.mark.parametrize("weighted", [False, True])
def test_lines_and_rays_are_least_squares(weighted):
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(16, 3, 2, generator=generator, dtype=torch.float64) - 1.5
    weight = torch.ones_like(g)
    if weighted:
        weight = torch.rand(g.shape, generator=generator, dtype=torch.float64) + 0.1
    codes = torch.randint(0, 4, g.shape, generator=generator).double()
    moments = Moments(g, weight)
    scale, offset, error = moments.line(codes)
    slope, least = moments.ray(codes)
    for row in range(3):
        for sub in range(2):
            root = weight[:, row, sub].sqrt()
            c, y = codes[:, row, sub], g[:, row, sub]
            one = (c * root)[:, None]
            ray = torch.linalg.lstsq(one, (y * root)[:, None]).solution[0, 0]
            torch.testing.assert_close(slope[row, sub], ray)
            torch.testing.assert_close(
                least[row, sub], ((y - ray * c).square() * weight[:, row, sub]).sum()
            )
            two = torch.stack([c * root, -root], 1)
            s, o = torch.linalg.lstsq(two, (y * root)[:, None]).solution[:, 0]
            if float(o) < 0:  # no offset is below zero
                s, o = ray, torch.zeros_like(o)
            if float(s) > 0:
                torch.testing.assert_close((scale[row, sub], offset[row, sub]), (s, o))
            assert float(scale[row, sub]) >= 0 and float(offset[row, sub]) >= 0
            line = scale[row, sub] * c - offset[row, sub]
            torch.testing.assert_close(
                error[row, sub], ((y - line).square() * weight[:, row, sub]).sum()
            )


@pytest.mark.parametrize("top", [3, 15])
def test_a_searched_range_is_no_worse_than_the_whole_one(top):
    g = torch.randn(16, 20, 4, generator=torch.Generator().manual_seed(6))
    moments = Moments(g, torch.ones_like(g))

    def lost(scale, offset, low, high):
        code = ((g + offset) / scale.clamp(min=1e-30)).round().clamp(low, high)
        return (scale * code - offset - g).square().sum(0)

    floor = g.amin(0).clamp(max=0)
    plain = lost((g.amax(0) - floor) / top, -floor, 0, top)
    assert bool((lost(*ranges(g, moments, top), 0, top) <= plain * 1.0001).double().mean() > 0.95)
    half = (top + 1) // 2
    size = g.abs().amax(0) / (half - 0.5)
    scale, offset = signed_ranges(g, moments, half)
    assert not offset.any()
    code = (g / scale).round().clamp(-half, half - 1)
    signed = (scale * code - g).square().sum()
    plain = (size * (g / size).round().clamp(-half, half - 1) - g).square().sum()
    assert float(signed) < float(plain)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Affine(0), "bits must be 1 to 8, got 0"),
        (lambda: Affine(9), "bits must be 1 to 8, got 9"),
        (lambda: Affine(1, None, True), "needs at least 2 bits"),
        (lambda: Affine(4, 0), "group_size must be positive, got 0"),
        (lambda: Codebook(0), "bits must be 1 to 8, got 0"),
        (lambda: Codebook(2, "layer"), "per column, row or tensor, not per 'layer'"),
        (lambda: Codebook(2, "row", 4), "only per column"),
        (lambda: Codebook(2, "column", 0), "at least 1"),
        (lambda: KQuant("q5_k"), "one of q2_k, q3_k, q4_k, q6_k, not 'q5_k'"),
        (lambda: parse_grid("w4g32x"), "no grid is called 'w4g32x'"),
        (lambda: KQuant("q4_k").group(100), "a q4_k holds 256 inputs, which does not divide 100"),
    ],
)
def test_grids_that_are_none_are_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_grids_are_values(name):
    grid = parse_grid(name)
    assert grid == parse_grid(name) and hash(grid) == hash(parse_grid(name))
    assert grid.name == name and not any(grid == parse_grid(n) for n in NAMES if n != name)


@pytest.mark.parametrize("exponent", [-126, -125, -30, -1, 0, 1, 30, 124, 125])
def test_a_scale_that_is_a_power_of_two_stays(exponent):
    params = MXFP4Params(torch.full((1, 1), 2.0**exponent))
    assert torch.equal(MXFP4().stored(params, torch.float16).scale, params.scale)
