"""Orders of methods by their roles, and what they cost, counted by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.grid import MXFP4, Affine, Codebook, KQuant
from lowbit.methods import (
    AWQ,
    CLAQ,
    GPTQ,
    METHODS,
    RTN,
    CrossQuant,
    OmniQuant,
    Polish,
    QuaRot,
    SmoothQuant,
    TesseraQ,
    _hessian,
    gptq,
)
from lowbit.methods.cost import Cost, Layer, Rows, Shapes, Work, passes
from lowbit.recipe import Recipe

PLACE = {  # method: role, its number in order
    "quarot": ("rotation", 0),
    "smoothquant": ("transform", 1),
    "crossquant": ("transform", 1),
    "awq": ("clip", 2),
    "omniquant": ("clip", 2),
    "rtn": ("solver", 3),
    "gptq": ("solver", 3),
    "claq": ("solver", 3),
    "tesseraq": ("learner", 4),
    "polish": ("polish", 6),
}
MADE = {
    "quarot": QuaRot(),
    "smoothquant": SmoothQuant(),
    "crossquant": CrossQuant(),
    "awq": AWQ(),
    "omniquant": OmniQuant(),
    "rtn": RTN(),
    "gptq": GPTQ(),
    "claq": CLAQ(outlier_bits=0.14),
    "tesseraq": TesseraQ(),
    "polish": Polish(tokens=1, batch=2, apart=3),  # fewer rows than the calibration has
}


def recipe_of(names):
    return Recipe(Affine(4), tuple(MADE[n] for n in names))


def test_every_method_has_its_role():
    assert {name: entry.role for name, entry in METHODS.items()} == {
        name: role for name, (role, _) in PLACE.items()
    }
    assert {name: type(m) for name, m in MADE.items()} == {n: e.kind for n, e in METHODS.items()}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(PLACE)), unique=True, max_size=6))
def test_an_order_is_taken_where_roles_rise_and_once_is_once(names):
    numbers = [PLACE[n][1] for n in names]
    fine = numbers == sorted(numbers) and max(map(numbers.count, (2, 3, 6))) <= 1
    try:
        recipe = recipe_of(names)
    except LowbitError as e:
        assert not fine, e
        assert any(f"'{n}'" in str(e) for n in names)
    else:
        assert fine
        assert [name for name, _, _ in recipe.entries] == names


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(sorted(set(PLACE) - {"omniquant", "gptq", "claq"})), max_size=6))
def test_methods_of_different_places_have_one_order(names):
    ordered = sorted(names, key=lambda n: (PLACE[n][1], n))
    recipe = recipe_of(ordered)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    "names, words",
    [
        ("awq quarot", "'quarot' must come first in a recipe, before 'awq': rotations mix"),
        ("smoothquant quarot", "'quarot' must come first in a recipe, before 'smoothquant'"),
        ("tesseraq quarot", "'quarot' must come first in a recipe, before 'tesseraq'"),
        ("quarot quarot", "'quarot' must come first"),
        ("rtn gptq", "'gptq' after 'rtn' in a recipe would do nothing: everything is coded"),
        ("gptq rtn", "'rtn' after 'gptq' in a recipe would do nothing"),
        ("gptq claq", "'claq' after 'gptq' in a recipe would do nothing"),
        ("tesseraq rtn", "'rtn' after 'tesseraq' in a recipe would do nothing"),
        ("awq smoothquant", "what scales weights comes before what fixes their ranges"),
        ("omniquant crossquant", "'crossquant' after 'omniquant' in a recipe: what scales"),
        ("awq omniquant", "'omniquant' after 'awq' in a recipe: both fix the ranges of weights"),
        ("gptq awq", "'awq' after 'gptq' in a recipe: what changes weights or ranges comes"),
        ("rtn smoothquant", "'smoothquant' after 'rtn' in a recipe: what changes weights"),
        ("tesseraq omniquant", "'omniquant' after 'tesseraq' in a recipe: what changes weights"),
        ("quarot gptq awq tesseraq", "'awq' after 'gptq'"),
    ],
)
def test_another_order_is_refused_with_its_reason(names, words):
    with pytest.raises(LowbitError, match=words):
        recipe_of(names.split())


GRIDS = {
    "W4": Affine(4),
    "column": Codebook(2),
    "shared": Codebook(2, "column", 4),
    "row": Codebook(2, "row"),
    "gguf": KQuant("q4_k"),
    "mxfp4": MXFP4(),
}
RANGED = {"W4", "mxfp4"}


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "name, takes, words",
    [
        ("rtn", set(GRIDS), ""),
        ("gptq", set(GRIDS), ""),
        ("awq", set(GRIDS), ""),
        ("tesseraq", set(GRIDS), ""),
        ("quarot", set(GRIDS), ""),
        ("polish", set(GRIDS), ""),
        ("omniquant", RANGED, "omniquant learns ranges of uniform grids, and .* has none"),
        ("claq", RANGED | {"column"}, "claq needs a codebook per column, not .*: use gptq"),
    ],
)
def test_grids_are_checked_before_any_work_also_in_overrides(name, takes, words, grid, override):
    grids = (Affine(4), (("*.q_proj", GRIDS[grid]),)) if override else (GRIDS[grid], ())
    if grid in takes:
        Recipe(grids[0], (MADE[name],), grids[1])
        return
    with pytest.raises(LowbitError, match=words):
        Recipe(grids[0], (MADE[name],), grids[1])


@pytest.mark.parametrize(
    "method, words",
    [
        (CLAQ(), "keeps outliers or does nothing of its own"),
        (CLAQ(adaptive_bits=0.1), "claq.adaptive_bits needs a codebook per column"),
        (CLAQ(adaptive_bits=0.1, outlier_bits=0.1), "claq.adaptive_bits needs a codebook"),
    ],
)
def test_what_claq_cannot_do_on_a_uniform_grid(method, words):
    with pytest.raises(LowbitError, match=words):
        Recipe(Affine(4), (method,))


# --- cost -----------------------------------------------------------------------------------------

LAYER = Layer({"a": (8, 4), "b": (6, 8)}, rest=10, outside=100, hidden=8, vocab=50)


def shapes(grid=None, count=10, length=16, compute=torch.float32, ranks=1, layer=LAYER):
    rows = Rows(count, length, 2, compute.itemsize, ranks)
    sites, device = [["a"], ["b"]], torch.device("cpu")
    return Shapes(layer, grid or Affine(4), sites, ["b"], rows, 2, device, compute)


@pytest.mark.parametrize(
    "what, number",
    [
        ("weights", 8 * 4 + 6 * 8),
        ("largest", 48),
        ("widest", 8),
        ("activations", (8 + 4) + (6 + 8) + 10 * 8 + 2 * 8),
    ],
)
def test_sizes_of_a_layer(what, number):
    assert getattr(LAYER, what) == number


@pytest.mark.parametrize(
    "count, ranks, rows, mine",
    [(10, 1, 4, 4), (10, 1, 99, 10), (10, 3, 99, 4), (10, 4, 8, 2), (10, 4, 9, 3), (10, 16, 8, 1)],
)
def test_a_rank_works_on_its_share_rounded_up(count, ranks, rows, mine):
    assert Rows(count, 16, 2, 4, ranks).mine(rows) == mine


@pytest.mark.parametrize(
    "count, length, ranks, most, tokens",
    [
        (10, 16, 1, 64, 64),
        (10, 16, 1, 70, 64),  # whole rows
        (10, 16, 1, 8192, 160),  # no more than there are
        (10, 16, 2, 8192, 80),
        (10, 16, 1, 5, 16),  # one at least
    ],
)
def test_batches_are_whole_rows(count, length, ranks, most, tokens):
    assert Rows(count, length, 2, 4, ranks).tokens(most) == tokens


@pytest.mark.parametrize(
    "at_once, levels, waiting",
    [
        (1 << 20, [["a"], ["b"]], 0),  # one after another
        (1 << 20, [["a"], ["b"] * 5], 4 * 512),  # experts that fit together
        (3 * 512, [["a"], ["b"] * 5], 2 * 512 + 512),  # that are cut, and the sum over all
        (1, [["a"] * 3, ["b"] * 5], 512),
    ],
)
def test_hessians_of_experts_that_wait(monkeypatch, at_once, levels, waiting):
    """Inputs: a has 4, b has 8."""
    monkeypatch.setattr(_hessian, "_AT_ONCE", at_once)
    own = replace(shapes(), levels=[[[name] for name in level] for level in levels])
    more = gptq.cost(GPTQ(), own).held - gptq.cost(GPTQ(), shapes()).held
    assert GPTQ().true_sequential and more == waiting


@pytest.mark.parametrize(
    "most, ranks, rows", [(0, 1, 8), (3, 1, 3), (8, 1, 8), (100, 1, 8), (0, 4, 2), (3, 2, 2)]
)
def test_held_out_rows_teach_nothing(most, ranks, rows):
    assert shapes(ranks=ranks).tuned == 8 and shapes(ranks=ranks).learned(most) == rows


@pytest.mark.parametrize(
    "compute, cast, numbers",
    [(torch.float32, 0, 4), (torch.bfloat16, 160, 2), (torch.float16, 160, 2)],
)
def test_bytes_of_passes(compute, cast, numbers):
    s = shapes(compute=compute)
    assert s.widths == [4, 8] and s.cast == cast
    assert s.passing == 160 * numbers * (3 * 8 + 4 * 8) + cast
    assert s.training(4) == 4 * 16 * numbers * 122 + cast
    assert s.training(100) == 10 * 16 * numbers * 122 + cast


@pytest.mark.parametrize(
    "compute, half, kind",
    [
        (torch.float32, None, "single"),
        (torch.bfloat16, None, "half"),
        (torch.float16, None, "half"),
        (torch.bfloat16, False, "single"),
        (torch.float32, True, "half"),
    ],
)
def test_work_of_a_pass(compute, half, kind):
    work = shapes(compute=compute).forward(2, half)
    flops = 32 * (2 * 80 + 4 * 16 * 8)  # products with weights, and of attention
    moved = 2 * 32 * compute.itemsize * 122
    assert work == Work(**{kind: flops, "moved": moved})
    assert work * 3 == work + work + work


@pytest.mark.parametrize(
    "cost, held",
    [
        (METHODS["rtn"].cost(RTN(), shapes()), 80 + 12 * 48),
        (passes(None, shapes()), 4 * 80 + 160 * 4 * 56),
        (passes(None, shapes(length=1, count=3)), 4 * 80 + 24 * 48),
        (METHODS["omniquant"].cost(OmniQuant(clips="f"), shapes()), 40 * 80),
    ],
)
def test_bytes_held(cost, held):
    assert cost.held == held and cost.streams == cost.batch == 0 and cost.work == Work()


def test_a_pass_over_the_float_model_is_counted():
    """10 rows more through the block, and for CLAQ the Hessians of both sites at once."""
    plain, sorted_ = CrossQuant(), CrossQuant(fold="group")
    cost = METHODS["crossquant"].cost
    assert cost(sorted_, shapes()).work == cost(plain, shapes()).work + shapes().forward(10)
    own = CLAQ(adaptive_bits=0.5, allocation="greedy")
    survey = CLAQ(adaptive_bits=0.5, allocation="greedy", scope="model")
    cost = METHODS["claq"].cost
    assert cost(survey, shapes()).held - cost(own, shapes()).held == 8 * (4 * 4 + 8 * 8)
    factors = sum(2 * 8 * 16 * n**2 + 2 * n**3 for n in (4, 8))
    more = cost(own, shapes()).work + shapes().forward(10) + Work(single=factors)
    assert cost(survey, shapes()).work == more


@pytest.mark.parametrize("name", METHODS)
def test_no_cost_falls_with_rows_or_sizes(name):
    wider = Layer({n: (2 * a, 2 * b) for n, (a, b) in LAYER.linears.items()}, 20, 200, 16, 50)
    cost = METHODS[name].cost(MADE[name], shapes())
    for more in (shapes(count=40), shapes(length=64), shapes(layer=wider)):
        other = METHODS[name].cost(MADE[name], more)
        assert isinstance(other, Cost)
        for field in ("held", "least", "keeps", "streams", "batch"):
            assert getattr(other, field) >= getattr(cost, field), field
        for field in ("half", "single", "moved"):
            assert getattr(other.work, field) >= getattr(cost.work, field), field
    fewer = METHODS[name].cost(MADE[name], shapes(ranks=4))
    assert fewer.held <= cost.held and fewer.work.single <= cost.work.single


@pytest.mark.parametrize(
    "method, grid, number",
    [
        (CLAQ(), Codebook(2), 0),
        (CLAQ(outlier_bits=0.14), Affine(4), None),
        # a quarter of 12 columns with 12 more levels of 2 bytes, and 2 bytes a column
        (CLAQ(adaptive_bits=0.5, upper=4), Codebook(2), 0.5 * 96 / 8 + 0.25 * 12 * 2 * 12 + 24),
    ],
)
def test_bytes_beyond_the_grid(method, grid, number):
    found = METHODS["claq"].extra_bytes(method, grid, 8, 12)
    if number is None:  # an outlier is a number and its column, 4 bytes; a row start 4
        number = 4 * method.outlier_rate * 96 + 4 * 8
        assert METHODS["claq"].outliers(method) == "claq.outlier_bits"
    assert found == pytest.approx(number)
    assert METHODS["gptq"].extra_bytes(GPTQ(), grid, 8, 12) == 0
