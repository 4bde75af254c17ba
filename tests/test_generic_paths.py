"""Grids by what they can do: what takes a fast path gives the answers of the path that any ordered
grid takes.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import begin, projected, save_tiny

from lowbit.formats import LAYOUTS
from lowbit.grid import Affine, AffineParams, Codebook, KQuant, LinearGrid, OrderedGrid
from lowbit.grid.params import picked, stacked
from lowbit.grid.straight import through
from lowbit.methods import GPTQ, TesseraQ
from lowbit.methods._coder import GridColumns
from lowbit.methods._columns import code_columns, inverse_factor
from lowbit.methods._soft import SoftBlock
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

FAST = TesseraQ(schedule="exponential-4-4", iters=4, lr=3e-2)


@dataclass(frozen=True)
class Unhurried(OrderedGrid[AffineParams]):
    """A uniform grid that does not say that it is linear."""

    own: Affine

    @property
    def bits(self):
        return self.own.bits

    @property
    def group_size(self):
        return self.own.group_size

    @property
    def name(self):
        return f"unhurried {self.own.name}"

    @classmethod
    def parse(cls, text):
        return None

    @property
    def rows_apart(self):
        return True

    @property
    def of_lists(self):
        return Unhurried(self.own.of_lists)

    def with_bits(self, bits):
        return Unhurried(self.own.with_bits(bits))

    def check(self, width):
        self.own.check(width)

    def fit(self, w, importance=None):
        return self.own.fit(w, importance)

    def encode(self, w, params):
        return self.own.encode(w, params)

    def decode(self, codes, params):
        return self.own.decode(codes, params)

    def stored(self, params, dtype):
        return self.own.stored(params, dtype)

    def take(self, params, column):
        return self.own.take(params, column)

    def period(self, width):
        return self.own.period(width)

    def join(self, parts):
        return self.own.join(parts)

    def lists(self, w):
        return self.own.lists(w)

    def unlisted(self, lists, rows):
        return self.own.unlisted(lists, rows)

    def neighbours(self, w, params):
        return self.own.neighbours(w, params)

    def beside(self, codes, toward, params):
        return self.own.beside(codes, toward, params)

    def freedom(self, params):
        return self.own.freedom(params)

    def moved(self, params, factor):
        return self.own.moved(params, factor)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A block on a uniform grid, and the same on one that takes no fast path."""
    stream = ModelStream(save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0)))
    kwargs = stream.block_kwargs(24)[0]
    grids = (Affine(3, 16), Unhurried(Affine(3, 16)))
    with pytest.MonkeyPatch.context() as patch:
        # Plans refuse what no format holds.
        held = replace(LAYOUTS[Affine], scheme=lambda grid: None, words=str)
        patch.setitem(LAYOUTS, Unhurried, held)
        return [begin(stream, 0, Recipe(g), Streams(x, x, 8), kwargs, 0) for g in grids]


def test_the_other_path_is_taken(blocks):
    fast, plain = (SoftBlock(b) for b in blocks)
    assert all(isinstance(b.grid, LinearGrid) for b in fast.buckets)
    assert not any(isinstance(b.grid, LinearGrid) for b in plain.buckets)
    assert len(plain.buckets) == len(plain.names) > len(fast.buckets)


def test_soft_weights_and_their_gradients_are_those_of_the_fast_path(blocks):
    softs = [SoftBlock(b) for b in blocks]
    found = []
    for soft, block in zip(softs, blocks, strict=True):
        for b in soft.buckets:
            b.v.add_(0.1)
        torch.manual_seed(3)
        _, slopes = projected(soft, block)
        by_name = {
            n: (slopes[p.bucket][0][p.rows], slopes[p.bucket][1][p.rows])
            for n, p in soft.places.items()
        }
        found.append((soft.weights(), by_name))
    (weights, by_name), (others, by_other) = found
    for key in softs[0].keys:
        torch.testing.assert_close(weights[key], others[key], rtol=1e-5, atol=1e-6)
    for name, pair in by_name.items():
        for one, other in zip(pair, by_other[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_tesseraq_ends_at_the_same_loss(blocks):
    fast, plain = (FAST(b).notes["tesseraq"] for b in blocks)
    assert plain["before"] == pytest.approx(fast["before"], rel=1e-5)
    assert plain["after"] == pytest.approx(fast["after"], rel=0.03)
    assert plain["after"] < 0.8 * plain["before"]


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}])
def test_gptq_gives_the_same_codes(blocks, options):
    """But where a sum in another order decides a tie: then the rest of the row may differ."""
    fast, plain = (GPTQ(**options)(b).coded for b in blocks)
    for name, q in fast.items():
        same = (q.codes == plain[name].codes).all(1)
        assert float(same.double().mean()) > 0.9, name


@pytest.mark.parametrize("order", [None, "falling"])
@pytest.mark.parametrize("grid", [Affine(3, 8), Affine(2), Codebook(2), Codebook(3, "row")])
def test_the_column_coder_is_nearest_rounding_without_correlations(grid, order):
    """On an identity, no column has an error of another to make up for."""
    w = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    at = torch.arange(32) if order is None else torch.arange(31, -1, -1)
    params = grid.stored(grid.fit(w), torch.float32)
    factor = inverse_factor(torch.eye(32, dtype=torch.float64)).float()
    coder = GridColumns(grid, at, torch.float32, params)
    codes = torch.empty(20, 32, dtype=torch.uint8)
    codes[:, at] = code_columns(w[:, at], factor, coder, 8)
    assert torch.equal(codes, grid.encode(w, params))
    assert coder.params() is params


@pytest.mark.parametrize("grid", [Affine(3, 8), Codebook(2)])
def test_params_fitted_on_the_way_are_joined_in_the_order_of_the_inputs(grid):
    w = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))

    def fit(ahead, column):
        return grid.stored(grid.fit(ahead), torch.float32)

    coder = GridColumns(grid, torch.arange(32), torch.float32, fit=fit)
    factor = inverse_factor(torch.eye(32, dtype=torch.float64)).float()
    codes = code_columns(w, factor, coder, 8)
    whole = grid.stored(grid.fit(w), torch.float32)
    assert whole.differing(coder.params()) is None
    assert torch.equal(codes, grid.encode(w, whole))


# --- what grids promise ---------------------------------------------------------------------------

ORDERED = [
    Affine(3, 16),
    Affine(2, None, True),
    Codebook(2),
    Codebook(2, "row"),
    Codebook(2, "tensor"),
    Codebook(3, "column", 4),
    KQuant("q2_k"),
    KQuant("q3_k"),
]


def fitted(grid, seed=0):
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(seed))
    return w, grid.stored(grid.fit(w), torch.float32)


@pytest.mark.parametrize("grid", ORDERED, ids=str)
def test_neighbours_enclose_a_weight_and_say_where_it_lies(grid):
    w, params = fitted(grid)
    low, high, fraction = grid.neighbours(w, params)
    below, above = grid.decode(low, params), grid.decode(high, params)
    ends = torch.stack([below, above])
    inside = (low != high) & (w >= ends.amin(0)) & (w <= ends.amax(0))  # not beyond the last level
    assert float(inside.double().mean()) > 0.7
    between = below + fraction * (above - below)
    torch.testing.assert_close(between[inside], w[inside], rtol=1e-4, atol=1e-5)
    nearest = grid.encode(w, params)
    assert bool(((nearest == low) | (nearest == high))[inside].all())


@pytest.mark.parametrize("grid", ORDERED, ids=str)
def test_the_code_beside_moves_the_weight_as_asked(grid):
    w, params = fitted(grid)
    codes = grid.encode(w, params)
    for sign in (-1, 1):
        other = grid.beside(codes, torch.full_like(w, sign), params)
        change = grid.decode(other, params) - grid.decode(codes, params)
        assert bool((change * sign >= 0).all())
        assert bool((change != 0).double().mean() > 0.3)
    assert torch.equal(grid.beside(codes, torch.zeros_like(w), params), codes)


@pytest.mark.parametrize("grid", ORDERED, ids=str)
def test_lists_are_a_weight_seen_otherwise(grid):
    w, params = fitted(grid)
    lists = grid.lists(w)
    assert torch.equal(grid.unlisted(lists, len(w)), w)
    cut = grid.cut(params, len(lists))
    assert params.differing(grid.uncut(cut, len(w))) is None
    codes = grid.encode(w, params)
    seen = grid.of_lists.decode(grid.lists(codes), cut)
    torch.testing.assert_close(grid.unlisted(seen, len(w)), grid.decode(codes, params))


@pytest.mark.parametrize("grid", ORDERED, ids=str)
def test_one_input_alone_has_the_levels_it_has_in_the_weight(grid):
    w, params = fitted(grid)
    codes = grid.encode(w, params)
    decoded = grid.decode(codes, params)
    for column in (0, 7, 100, 255):
        levels = grid.take(params, column)
        assert torch.equal(levels.encode(w[:, column, None])[:, 0], codes[:, column])
        assert torch.equal(levels.decode(codes[:, column, None])[:, 0], decoded[:, column])


@pytest.mark.parametrize("grid", ORDERED, ids=str)
def test_a_factor_of_one_moves_nothing_and_others_have_gradients(grid):
    w, params = fitted(grid)
    codes = grid.encode(w, params)
    factor = torch.ones(grid.freedom(params), requires_grad=True)
    moved = grid.stored(grid.moved(params, factor), torch.float32)
    assert params.differing(moved.map(torch.Tensor.detach)) is None
    (grid.decode(codes, moved) * w).sum().backward()
    assert factor.grad is not None
    numeric = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            raw = grid.moved(params, torch.full_like(factor, 1 + step))
            numeric.append(float((grid.decode(codes, raw) * w).sum()))
    expected = (numeric[0] - numeric[1]) / 2e-2
    assert float(factor.grad.sum()) == pytest.approx(expected, rel=2e-2, abs=1e-2)


@pytest.mark.parametrize("grid", [g for g in ORDERED if isinstance(g, LinearGrid)], ids=str)
def test_the_linear_form_is_the_grid(grid):
    w, params = fitted(grid)
    codes = grid.encode(w, params)
    zero, scale, offset = grid.linear(params)
    rows = codes.reshape(len(scale), -1).float()
    decoded = (rows - zero) * scale - (0 if offset is None else offset)
    torch.testing.assert_close(decoded.reshape(w.shape), grid.decode(codes, params))
    assert grid.shifted == (offset is not None)


@pytest.mark.parametrize("grid", ORDERED, ids=str)
def test_importance_is_taken_from_inputs_or_weights(grid):
    """A grid that ignores it gives the same params, any other a smaller weighted error."""
    w, params = fitted(grid)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2)) ** 4 + 1e-3
    weighed = grid.stored(grid.fit(w, importance), torch.float32)

    def error(p):
        return float(((grid.decode(grid.encode(w, p), p) - w).square() * importance).sum())

    assert error(weighed) <= 1.02 * error(params)


# --- params ---------------------------------------------------------------------------------------


def test_params_are_put_together_field_by_field():
    one = AffineParams(torch.ones(2, 3), torch.zeros(2, 3))
    two = AffineParams(torch.full((2, 3), 2.0), torch.full((2, 3), 5.0))
    above, beside = stacked([one, two]), stacked([one, two], 1)
    assert above.scale.shape == (4, 3)
    assert beside.scale.shape == (2, 6)
    assert above.rows(slice(2, 4)).differing(two) is None
    best = torch.tensor([0, 1, 0, 1, 1, 0])
    assert picked([one, two], best).scale.flatten().tolist() == [1, 2, 1, 2, 2, 1]
    assert one.where(best.reshape(2, 3) == 0, two).differing(picked([one, two], best)) is None
    assert one.differing(two) == "scale"
    assert one.finite()
    assert not AffineParams(torch.full((1, 1), float("inf")), torch.zeros(1, 1)).finite()


def test_a_rounded_value_is_exact_and_its_gradient_that_of_what_was_rounded():
    smooth = torch.tensor([0.3, 1.7, 2.5], requires_grad=True)
    rounded = through(smooth, smooth.round())
    assert rounded.tolist() == [0.0, 2.0, 2.0]
    (rounded * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert smooth.grad.tolist() == [1.0, 2.0, 3.0]
    with torch.no_grad():
        assert not through(smooth, smooth.round()).requires_grad


class Whole(Affine):
    """Groups of inputs whose params are fitted together, as scales of scales would be."""

    def period(self, width):
        return None


def test_groups_that_are_fitted_together_are_told_apart_in_compiled_loops():
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    w[:, 16:32] *= 8  # ranges differ from group to group
    grid, order = Whole(3, 16), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    params = grid.stored(grid.fit(w), torch.float32)
    steps, stop = GridColumns(grid, order, torch.float32, params).steps(0, 64, w)
    assert stop == 64 and steps.scale.shape == (4, 6)
    assert torch.equal(steps.scale[steps.group.long()].T, params.scale[:, order // 16])
