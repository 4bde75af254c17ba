"""Params field by field, and weights as values: what equals what, and what stays as it was."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from lowbit.grid import (
    Affine,
    AffineParams,
    CodebookParams,
    KQuantParams,
    MXFP4Params,
    Outliers,
    QTensor,
)
from lowbit.grid.names import parse_grid
from lowbit.grid.params import picked, stacked
from lowbit.grid.sums import sums_by

KINDS = [AffineParams, CodebookParams, KQuantParams, MXFP4Params]
NAMED = [(kind, f.name) for kind in KINDS for f in fields(kind)]


def numbered(kind, start=0.0, shape=(3, 4)):
    """Params all of whose numbers differ."""
    size = shape[0] * shape[1]
    parts = {
        f.name: torch.arange(size).reshape(shape) + start + 100 * i
        for i, f in enumerate(fields(kind))
    }
    return kind(**parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_reaches_every_field_of_a_new_value(kind):
    one = numbered(kind)
    two = one.map(lambda t: 2 * t)
    assert type(two) is kind
    for f in fields(kind):
        assert torch.equal(getattr(two, f.name), 2 * getattr(one, f.name))
    assert one.differing(numbered(kind)) is None
    assert one.to(torch.device("cpu")).differing(one) is None
    meta = one.to(torch.device("meta"))
    assert {getattr(meta, f.name).device.type for f in fields(kind)} == {"meta"}
    with pytest.raises(FrozenInstanceError):
        setattr(one, fields(kind)[0].name, torch.zeros(3, 4))


@pytest.mark.parametrize("kind, name", NAMED)
def test_what_differs_is_named(kind, name):
    one = numbered(kind)
    changed = {f.name: getattr(one, f.name).clone() for f in fields(kind)}
    changed[name][2, 3] += 1
    assert one.differing(kind(**changed)) == name and kind(**changed).differing(one) == name
    changed[name] = getattr(one, name)[:, :3]
    assert one.differing(kind(**changed)) == name
    wider = one.map(torch.Tensor.double)  # of another dtype, the same numbers
    assert one.differing(wider) is None


@pytest.mark.parametrize("kind, name", NAMED)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_none_is_found_in_any_field(kind, name, number):
    one = numbered(kind)
    assert one.finite()
    changed = {f.name: getattr(one, f.name).clone() for f in fields(kind)}
    changed[name][1, 2] = number
    assert not kind(**changed).finite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "at", [slice(0, 1), slice(1, 3), slice(0, 3), slice(3, 3), slice(-1, None)]
)
def test_rows_are_copies(kind, at):
    one = numbered(kind)
    some = one.rows(at)
    for f in fields(kind):
        mine, own = getattr(some, f.name), getattr(one, f.name)
        assert mine.tolist() == own.tolist()[at]
        mine.fill_(-1.0)
    assert one.differing(numbered(kind)) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stacked_params_are_cut_where_they_meet(kind, dim, count):
    parts = [
        numbered(kind, 1000.0 * i, (2 + i, 4) if dim == 0 else (2, 4 + i)) for i in range(count)
    ]
    whole = stacked(parts, dim)
    at = 0
    for i, part in enumerate(parts):
        size = (2 if dim == 0 else 4) + i
        again = whole.map(lambda t, at=at, size=size: t.narrow(dim, at, size))
        assert part.differing(again) is None
        at += size
    assert getattr(whole, fields(kind)[0].name).shape[dim] == at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_picked_and_chosen_entries_against_a_loop(kind, seed):
    tried = [numbered(kind, 1000.0 * i) for i in range(3)]
    generator = torch.Generator().manual_seed(seed)
    best = torch.randint(0, 3, (12,), generator=generator)
    got, mask = picked(tried, best), torch.rand(3, 4, generator=generator) < 0.5
    chosen = tried[0].where(mask, tried[1])
    for f in fields(kind):
        every = [getattr(p, f.name) for p in tried]
        for row in range(3):
            for column in range(4):
                of = int(best[4 * row + column])
                assert getattr(got, f.name)[row, column] == every[of][row, column]
                side = 0 if mask[row, column] else 1
                assert getattr(chosen, f.name)[row, column] == every[side][row, column]


# --- a weight -------------------------------------------------------------------------------------

GRID = Affine(2, 2)


def weight(outliers=None):
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    zero = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    return QTensor(GRID, codes, AffineParams(scale, zero), outliers)


KEPT = Outliers(torch.tensor([1, 6]), torch.tensor([-7.5, 0.25]))
PLAIN = [[-1.0, 0.0, 4.0, 6.0], [0.0, -0.5, -4.0, -8.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "outliers, rows",
    [(None, PLAIN), (KEPT, [[-1.0, -7.5, 4.0, 6.0], [0.0, -0.5, 0.25, -8.0]])],
)
def test_a_weight_is_what_its_codes_say_but_for_what_is_kept(dtype, outliers, rows):
    decoded = weight(outliers).decode(dtype)
    assert decoded.dtype == dtype and decoded.tolist() == rows


def edited(field, at, value):
    tensor = getattr(weight().params, field).clone()
    tensor[at] = value
    return {**vars(weight().params), field: tensor}


@pytest.mark.parametrize(
    "one, other, part",
    [
        (weight(), weight(), None),
        (weight(KEPT), weight(KEPT), None),
        (weight(KEPT), weight(Outliers(KEPT.index.clone(), KEPT.values.clone())), None),
        (weight(), weight(KEPT), "outliers"),
        (weight(KEPT), weight(Outliers(torch.tensor([1, 5]), KEPT.values)), "outliers"),
        (weight(KEPT), weight(Outliers(KEPT.index, torch.tensor([-7.5, 0.5]))), "outliers"),
        (weight(KEPT), weight(Outliers(KEPT.index[:1], KEPT.values[:1])), "outliers"),
        (weight(), QTensor(GRID, weight().codes.flip(0), weight().params), "codes"),
        (
            weight(),
            QTensor(GRID, weight().codes, AffineParams(**edited("scale", (0, 1), 2.5))),
            "scale",
        ),
        (
            weight(),
            QTensor(GRID, weight().codes, AffineParams(**edited("zero_point", (1, 0), 0.0))),
            "zero_point",
        ),
    ],
)
def test_which_part_of_two_weights_differs(one, other, part):
    assert one.same_as(other) == part and other.same_as(one) == part


def test_another_grid_is_named_first():
    other = QTensor(Affine(2, 2, True), weight().codes.flip(0), weight().params)
    assert weight().same_as(other) == "grid (W2g2 against W2g2sym)"
    assert other.same_as(weight()) == "grid (W2g2sym against W2g2)"


@pytest.mark.parametrize("name", ["W3g64", "W2:column", "W2:row", "gguf:q4_k", "mxfp4"])
def test_a_weight_moves_whole(name):
    grid = parse_grid(name)
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    params = grid.stored(grid.fit(w), torch.bfloat16)
    q = QTensor(grid, grid.encode(w, params), params, KEPT)
    assert q.to(torch.device("cpu")).same_as(q) is None
    meta = q.to(torch.device("meta"))
    assert meta.codes.is_meta and meta.outliers.values.is_meta and meta.outliers.index.is_meta
    assert meta.grid == grid and meta.codes.shape == q.codes.shape


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_sums_by_index_against_a_loop(count, length):
    generator = torch.Generator().manual_seed(count + length)
    index = torch.randint(0, count, (3, length), generator=generator)
    values = torch.randn(3, length, generator=generator, dtype=torch.float64)
    expected = torch.zeros(3, count, dtype=torch.float64)
    for row in range(3):
        for i in range(length):
            expected[row, index[row, i]] += values[row, i]
    torch.testing.assert_close(sums_by(index, values, count), expected)
