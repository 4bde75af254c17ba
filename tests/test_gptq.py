"""GPTQ against brute force, and what happens to dead inputs, singular Hessians, fixed ranges and
coded linears.
"""

from dataclasses import replace

import pytest
import torch
from helpers import apply_methods, begin, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.errors import LowbitError
from lowbit.grid import Affine, Codebook, InputQuantizer, PerToken
from lowbit.grid.kmeans import kmeans
from lowbit.methods import AWQ, GPTQ, RTN
from lowbit.methods._coder import GridColumns
from lowbit.methods._columns import code_columns, inverse_factor
from lowbit.methods._hessian import Inputs, factored, input_hessians
from lowbit.methods._parts import whole
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods.gptq import fit_range
from lowbit.methods.gptq import solve as solve_inputs
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe


def solve(weight, factor, grid, params, stored, *, order, clip="none", block_size=128):
    dead = torch.zeros(weight.shape[1], dtype=torch.bool)
    return solve_inputs(weight, Inputs(factor, order, dead), grid, params, stored, clip, block_size)


def block_of(folder, grid, family="llama", rows=12):
    stream = ModelStream(save_tiny(folder, family, dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (rows, 32), generator=torch.Generator().manual_seed(0)))
    return begin(stream, 0, Recipe(grid), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    return block_of(tmp_path_factory.mktemp("m"), Affine(3, 16))


def case(rows, columns, seed, tokens=None):
    """A weight and the damped Hessian of correlated inputs, float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 3 * columns, columns, generator=g, dtype=torch.float64)
    x = (
        x
        @ torch.randn(columns, columns, generator=g, dtype=torch.float64)
        * torch.rand(columns, generator=g, dtype=torch.float64)
    )
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), hessian


def ascending(weight):
    return torch.arange(weight.shape[1])


def brute_force(weight, hessian, grid, static, order, stored):
    """Optimal brain quantization in a given order: after every column, the rest by the inverse of
    what remains of the Hessian.
    """
    rows, columns = weight.shape
    w, single, size = weight.clone(), replace(grid, group_size=None), grid.group(columns)
    codes, groups, left = torch.zeros(rows, columns, dtype=torch.uint8), {}, order.tolist()
    if static:
        for i in range(columns // size):
            groups[i] = single.stored(single.fit(weight[:, i * size : (i + 1) * size]), stored)
    while left:
        c, after = left[0], left[1:]
        if c // size not in groups:
            groups[c // size] = single.stored(single.fit(w[:, c : c + size]), stored)
        params = groups[c // size]
        code = single.encode(w[:, c : c + 1], params)
        error = w[:, c] - single.decode(code, params)[:, 0].to(stored).double()
        inverse = torch.linalg.inv(hessian[left][:, left])
        w[:, after] -= torch.outer(error, inverse[0, 1:]) / inverse[0, 0]
        codes[:, c], left = code[:, 0], after
    return codes, torch.cat([groups[i].scale for i in sorted(groups)], 1)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 4, 6, 16]),
    whole_row=st.booleans(),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    mode=st.sampled_from(["dynamic", "static", "act_order"]),
    block_size=st.integers(1, 40),
    stored=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_codes_and_scales_equal_brute_force(
    rows, groups, size, whole_row, bits, symmetric, mode, block_size, stored, seed
):
    weight, hessian = case(rows, groups * size, seed)
    grid = Affine(bits, None if whole_row else size, symmetric and bits > 1)
    order = (
        hessian.diagonal().argsort(descending=True) if mode == "act_order" else ascending(weight)
    )
    params = None if mode == "dynamic" else fit_range(grid, weight, "none", stored)
    factor = inverse_factor(hessian[order][:, order])
    q = solve(weight, factor, grid, params, stored, order=order, block_size=block_size)
    codes, scale = brute_force(weight, hessian, grid, mode != "dynamic", order, stored)
    assert torch.equal(q.codes, codes)
    torch.testing.assert_close(q.params.scale, scale)


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 30), seed=st.integers(0, 1000))
def test_the_factor_is_the_upper_one_of_the_inverse(columns, seed):
    _, hessian = case(1, columns, seed)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(inverse_factor(hessian), expected, rtol=1e-6, atol=1e-9)


def test_no_factor_of_a_matrix_that_rounding_alone_keeps_positive():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert inverse_factor(x.T @ x) is None
    for least, works in ((-1.0, False), (1e-17, False), (1e-14, True)):
        assert (
            inverse_factor(torch.diag(torch.tensor([1.0, least], dtype=torch.float64))) is not None
        ) == works


@pytest.mark.parametrize("grid", [Affine(2, 8), Affine(3, None, True), Affine(4, 4)])
def test_uncorrelated_inputs_give_nearest_rounding(grid):
    weight, _ = case(5, 24, 0)
    q = solve(
        weight, torch.eye(24), grid, None, torch.float32, order=ascending(weight), block_size=7
    )
    params = grid.stored(grid.fit(weight), torch.float32)
    assert torch.equal(q.codes, grid.encode(weight, params))
    assert torch.equal(q.params.scale, params.scale)


def test_8_bits_lose_next_to_nothing_and_fewer_gain_on_nearest():
    weight, hessian = case(16, 64, 1)

    def loss(q):
        delta = q.decode(torch.float64) - weight
        return float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum())

    def gptq(grid):
        return solve(
            weight, inverse_factor(hessian), grid, None, torch.float64, order=ascending(weight)
        )

    assert loss(gptq(Affine(8, 16))) < 1e-5
    for bits in (2, 3, 4):
        found = gptq(grid := Affine(bits, 16))
        nearest = replace(
            found, codes=grid.encode(weight, grid.fit(weight)), params=grid.fit(weight)
        )
        assert loss(found) < 0.9 * loss(nearest)


def test_ranges_by_squared_error_are_never_worse_and_include_zero():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) ** 3
    grid = Affine(2, 16)

    def errors(params):
        return (
            grid.grouped(grid.decode(grid.encode(weight, params), params) - weight)
            .abs()
            .pow(2.4)
            .sum(-1)
        )

    plain, searched = (fit_range(grid, weight, clip, torch.bfloat16) for clip in ("none", "mse"))
    assert bool((errors(searched) <= errors(plain)).all())
    tried = shrunk_ranges(grid, weight)
    assert torch.equal(errors(searched), torch.stack([errors(p) for p in tried]).amin(0))
    assert bool((searched.zero_point >= 0).all() and (searched.zero_point <= grid.top).all())


def shrunk_ranges(grid, weight):
    """The ranges that "mse" tries."""
    low, high = grid.ends(weight)
    factors = [1 - i / 100 for i in range(80)]
    return [grid.stored(grid.from_range(low * f, high * f), torch.bfloat16) for f in factors]


class _Signs:
    """A codebook per column and no grid: the mean absolute value, with a sign."""

    period = 1

    def code(self, column, values, current):
        positive = values >= 0
        level = values.abs().mean()
        return positive.to(torch.uint8), torch.where(positive, level, -level)


def test_the_loop_takes_any_coder():
    weight, hessian = case(4, 10, 2)
    codes = code_columns(weight, inverse_factor(hessian), _Signs(), 4)
    assert torch.equal(codes, code_columns(weight, inverse_factor(hessian), _Signs(), 128))
    assert torch.equal(codes[:, 0], (weight[:, 0] >= 0).to(torch.uint8))
    assert set(codes.unique().tolist()) <= {0, 1}


def test_every_period_starts_on_weights_that_are_up_to_date():
    """Columns seen at the start of a period are those of a loop that hands every error on at
    once.
    """
    weight, hessian = case(3, 24, 5)
    factor = inverse_factor(hessian)

    class Recorder(_Signs):
        def __init__(self, period):
            self.period, self.seen = period, []

        def code(self, column, values, current):
            if column % self.period == 0:
                self.seen.append(current[:, column : column + self.period].clone())
            return super().code(column, values, current)

    for period in (3, 6, 8, 24):
        by_block = {}
        for size in (1, 4, 7, 128):
            recorder = Recorder(period)
            code_columns(weight, factor, recorder, size)
            by_block[size] = torch.cat(recorder.seen, 1)
        for seen in by_block.values():
            torch.testing.assert_close(seen, by_block[1])


# --- on blocks ------------------------------------------------------------------------------------


def test_a_hessian_is_that_of_the_inputs_on_the_quantized_prefix(block):
    moved = block.within(xq=block.xq + 0.1)
    name = "mlp.gate_proj"
    seen = []
    moved.observe(
        [name], "quantized", 5, lambda _, call: seen.append(call.args[0].flatten(0, -2).double())
    )
    x = torch.cat(seen)
    torch.testing.assert_close(
        input_hessians(moved, [name], 5)[name], 2 / len(x) * x.T @ x, rtol=1e-5, atol=1e-6
    )


def test_only_as_many_rows_as_asked_for_are_used(block):
    some, few = GPTQ(rows=3)(block), GPTQ()(block.within(tuned_rows=3))
    assert all(q.same_as(few.coded[n]) is None for n, q in some.coded.items())
    assert any(q.same_as(some.coded[n]) is not None for n, q in GPTQ(rows=100)(block).coded.items())


def test_a_later_site_sees_the_codes_of_the_earlier_ones(block):
    once, sequential = (GPTQ(true_sequential=t)(block) for t in (False, True))
    for name in block.graph.sites[0].reads:
        assert once.coded[name].same_as(sequential.coded[name]) is None
    assert once.coded["mlp.down_proj"].same_as(sequential.coded["mlp.down_proj"]) is not None
    last = GPTQ()(
        replace(
            sequential, coded={k: q for k, q in sequential.coded.items() if k != "mlp.down_proj"}
        )
    )
    assert last.coded["mlp.down_proj"].same_as(sequential.coded["mlp.down_proj"]) is None


@pytest.mark.parametrize(
    "method", [GPTQ(), GPTQ(act_order=True), GPTQ(clip="mse"), GPTQ(true_sequential=False, rows=4)]
)
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_blocks_come_out_better_than_nearest(tmp_path, family, method):
    done = apply_methods(
        block_of(tmp_path, Affine(3, 16), family), Recipe(Affine(3, 16), (method,))
    )
    assert set(done.coded) == set(done.graph.linears)
    assert done.notes["loss_after"] < 0.9 * done.notes["loss_before"]
    assert "trouble" not in done.notes


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(act_order=True)])
def test_linears_of_a_site_are_coded_as_if_alone(block, method):
    together = method(block)
    for name in block.graph.sites[0].reads:
        others = {n: q for n, q in RTN()(block).coded.items() if n != name}
        assert (
            method(replace(block, coded=others)).coded[name].same_as(together.coded[name]) is None
        )


def test_linears_of_a_site_may_have_different_grids(block):
    grids = {
        **block.grids,
        "self_attn.k_proj": Affine(8, 16),
        "self_attn.v_proj": Affine(4, None, True),
    }
    done = GPTQ()(block.within(grids=grids))
    for name, q in done.coded.items():
        assert q.grid == grids[name]
    assert done.coded["self_attn.q_proj"].same_as(GPTQ()(block).coded["self_attn.q_proj"]) is None


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_coded_to_zero_and_change_nothing_else(block, scale, act_order):
    norm = "input_layernorm.weight"
    gain = block.weights[norm] * scale
    dead = torch.zeros_like(gain, dtype=torch.bool)
    dead[16:32], dead[40] = True, True
    silenced = replace(block, weights={**block.weights, norm: gain.masked_fill(dead, 0)})
    done = GPTQ(act_order=act_order)(silenced)
    weight = silenced.weight("self_attn.q_proj").masked_fill(dead, 0)
    cleared = GPTQ(act_order=act_order)(
        replace(silenced, weights={**silenced.weights, "self_attn.q_proj.weight": weight})
    )
    assert "trouble" not in done.notes
    q = done.coded["self_attn.q_proj"]
    assert not bool(q.decode()[:, dead].any())
    assert q.same_as(cleared.coded["self_attn.q_proj"]) is None


def test_dead_inputs_leave_the_damping_alone(block):
    """Whatever the size of the activations, the same codes: a dead input's diagonal is no share of
    the damping.
    """
    hessian = input_hessians(block, ["self_attn.q_proj"], 8)["self_attn.q_proj"]
    hessian[:, 5] = 0
    hessian[5] = 0
    inputs = [
        factored(block, GPTQ().walk, "self_attn.q_proj", hessian * s, []) for s in (1.0, 2.0**-20)
    ]
    part = whole(block, ["self_attn.q_proj"])
    codes = [GPTQ()._part(block, part, i).codes[0] for i in inputs]
    assert codes[0].same_as(codes[1]) is None


def test_a_linear_that_sees_only_zeros_is_rounded_to_nearest_with_a_remark(block):
    norm = "post_attention_layernorm.weight"
    silenced = replace(
        block, weights={**block.weights, norm: torch.zeros_like(block.weights[norm])}
    )
    done, nearest = GPTQ()(silenced), RTN()(silenced)
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert done.coded[name].same_as(nearest.coded[name]) is None
    assert [
        name in note
        for note, name in zip(
            done.notes["trouble"], ("mlp.gate_proj", "mlp.down_proj"), strict=True
        )
    ] == [True, True]


def test_a_singular_hessian_is_damped_until_it_works_with_a_remark(block):
    # 32 tokens for 64 inputs.
    few = block.within(x=block.x[:1], xq=block.xq[:1], target=block.target[:1], tuned_rows=1)
    done = GPTQ(damping=0.0)(few.with_notes(trouble=["earlier"]))
    assert done.notes["trouble"][0] == "earlier"
    assert (
        "self_attn.q_proj' could not be inverted with damping 0; took 0.01"
        in done.notes["trouble"][1]
    )
    job = Reconstruction(few, 1)
    assert job.loss(done.decoded()) < 0.5 * job.loss(RTN()(few).decoded())
    for name, q in GPTQ(damping=0.01)(few).coded.items():
        assert q.same_as(done.coded[name]) is None


def test_a_hessian_that_no_damping_helps_is_an_error(block, monkeypatch):
    monkeypatch.setattr("lowbit.methods._hessian.inverse_factor", lambda hessian: None)
    with pytest.raises(
        LowbitError,
        match=r"layers.0.self_attn.q_proj' could not be inverted, not even with damping 10:.*raise gptq.damping",
    ):
        GPTQ()(block)


def test_inputs_that_are_not_finite_are_an_error(block):
    norm = "post_attention_layernorm.weight"
    broken = replace(
        block, weights={**block.weights, norm: block.weights[norm].clone().fill_(float("inf"))}
    )
    with pytest.raises(
        LowbitError, match="inputs of 'model.layers.0.mlp.gate_proj' are not finite"
    ):
        GPTQ()(broken)


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(act_order=True, clip="mse")])
def test_fixed_ranges_are_kept(block, method):
    clipped = AWQ(scales=False)(block)
    done = method(clipped)
    for name, q in done.coded.items():
        assert torch.equal(q.params.scale, clipped.params[name].scale)
        assert torch.equal(q.params.zero_point, clipped.params[name].zero_point)
    one = method(block.with_params({"self_attn.k_proj": clipped.params["self_attn.k_proj"]}))
    assert torch.equal(
        one.coded["self_attn.k_proj"].params.scale, clipped.params["self_attn.k_proj"].scale
    )
    assert one.coded["self_attn.q_proj"].same_as(method(block).coded["self_attn.q_proj"]) is None


@pytest.mark.parametrize("clip", ["none", "asymmetric"])
def test_after_awq_statistics_are_fresh(block, clip):
    def loss(*methods):
        done = apply_methods(block, Recipe(Affine(3, 16), methods))
        return Reconstruction(done, 4).loss(done.decoded(), 8)

    assert loss(AWQ(clip=clip), GPTQ()) < 0.9 * loss(AWQ(clip=clip))


def test_coded_linears_are_left_alone_and_what_they_read_costs_nothing(block):
    nearest = RTN()(block)
    some = {
        n: nearest.coded[n]
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    watched = []
    done = GPTQ()(replace(block, coded=some).within(announce=watched.append))
    for name, q in some.items():
        assert done.coded[name] is q
    assert not any("q_proj" in line or "up_proj" in line for line in watched)
    assert GPTQ()(nearest) is nearest
    assert GPTQ(true_sequential=False)(nearest) is nearest


def test_scales_are_those_the_artifact_stores(block):
    done = GPTQ()(block.within(stored=torch.bfloat16))
    for q in done.coded.values():
        assert torch.equal(q.params.scale, q.params.scale.bfloat16().float())


@pytest.mark.parametrize(
    "bad",
    [
        dict(damping=-0.1),
        dict(damping=float("nan")),
        dict(block_size=0),
        dict(rows=-1),
        dict(clip="both"),
    ],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(LowbitError, match=f"gptq.*{next(iter(bad))}"):
        GPTQ(**bad)


@pytest.mark.parametrize("name", ["gptq", "gptq-paper", "awq+gptq"])
def test_recipes_read_back(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert isinstance(recipe.methods[-1], GPTQ)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# --- compiled against plain -----------------------------------------------------------------------


def without_compiler(monkeypatch):
    monkeypatch.setattr("lowbit.methods._columns.library", lambda source: None)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 4, 6, 16, 33]),
    bits=st.integers(1, 8),
    symmetric=st.booleans(),
    mode=st.sampled_from(["dynamic", "static", "act_order"]),
    block_size=st.integers(1, 40),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10_000),
)
def test_the_compiled_loop_codes_as_brute_force(
    rows, groups, size, bits, symmetric, mode, block_size, stored, seed
):
    """Float32 against float64: a code may differ only where rounding error decides, and then the
    rest of its row may.
    """
    weight, hessian = case(rows, groups * size, seed)
    weight, grid = weight.float().double(), Affine(bits, size, symmetric and bits > 1)
    order = (
        hessian.diagonal().argsort(descending=True) if mode == "act_order" else ascending(weight)
    )
    params = None if mode == "dynamic" else fit_range(grid, weight.float(), "none", stored)
    q = solve(
        weight.float(),
        inverse_factor(hessian[order][:, order]),
        grid,
        params,
        stored,
        order=order,
        block_size=block_size,
    )
    codes, scale = brute_force(weight, hessian, grid, mode != "dynamic", order, stored)
    same = (q.codes == codes).all(1)
    assert bool(same.float().mean() >= 0.8 - 1.5 / rows)
    torch.testing.assert_close(q.params.scale.double()[same], scale[same], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e5])
def test_the_compiled_loop_rounds_as_torch_does(stored, scale, monkeypatch):
    """Uncorrelated inputs but one pair: what a column hands on is exactly what its decoded value is
    off by.
    """
    g = torch.Generator().manual_seed(1)
    weight, factor = torch.randn(40, 8, generator=g) * scale, torch.eye(8)
    factor[0, 1], factor[2, 7] = 0.5, -0.25
    grid = Affine(8, 4)
    params = grid.stored(grid.fit(weight), stored)
    fast = solve(weight, factor, grid, params, stored, order=ascending(weight))
    without_compiler(monkeypatch)
    assert (
        fast.same_as(solve(weight, factor, grid, params, stored, order=ascending(weight))) is None
    )


@pytest.mark.parametrize(
    "shape, size", [((7, 64), 16), ((3, 40), 40), ((5, 66), 33), ((70, 12), 1)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_compiled_range_search_finds_the_least_error(shape, size, scale, symmetric):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4)) ** 3 * scale
    weight[0] = 0
    grid = Affine(2, size, symmetric)
    tried = shrunk_ranges(grid, weight)
    errors = torch.stack(
        [
            grid.grouped((grid.decode(grid.encode(weight, p), p) - weight).double())
            .abs()
            .pow(2.4)
            .sum(-1)
            for p in tried
        ]
    )
    found = fit_range(grid, weight, "mse", torch.bfloat16)
    reached = (
        grid.grouped((grid.decode(grid.encode(weight, found), found) - weight).double())
        .abs()
        .pow(2.4)
        .sum(-1)
    )
    torch.testing.assert_close(reached, errors.amin(0), rtol=1e-5, atol=1e-34)


def test_two_threads_give_the_codes_of_one(monkeypatch):
    weight, hessian = case(600, 64, 3)
    factor = inverse_factor(hessian)
    one, two = [], []
    for threads, found in ((1, one), (2, two)):
        monkeypatch.setattr("lowbit.methods._columns.threads", lambda n=threads: n)
        for clip in ("none", "mse"):
            found.append(
                solve(
                    weight.float(),
                    factor,
                    Affine(3, 16),
                    None,
                    torch.bfloat16,
                    order=ascending(weight),
                    clip=clip,
                )
            )
    assert all(a.same_as(b) is None for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_pass_ends_where_the_last_input_asked_for_is_seen(block, name):
    seen, later = [], []
    handle = block.module.get_submodule("mlp").register_forward_pre_hook(lambda *_: later.append(1))
    block.observe(
        [name, "self_attn.k_proj"],
        "quantized",
        8,
        lambda n, call: seen.append((n, call.args[0].shape)),
    )
    handle.remove()
    assert sorted(n for n, _ in seen) == sorted([name, "self_attn.k_proj"])
    assert bool(later) == (name == "mlp.down_proj")


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "bitnet"])
def test_calls_kept_for_the_next_site_give_the_same_codes(tmp_path, monkeypatch, family):
    block = block_of(tmp_path, Affine(3, 16), family)
    replayed, real = [], type(block).observe_inside
    monkeypatch.setattr(
        "lowbit.model.block.Block.observe_inside",
        lambda self, part, *a: replayed.append(part) or real(self, part, *a),
    )
    fast = GPTQ()(block)
    assert replayed == ([] if family == "opt" else ["mlp"])
    monkeypatch.setattr("lowbit.methods._sites._KEPT", 0)
    plain = GPTQ()(block)
    assert replayed == ([] if family == "opt" else ["mlp"])
    assert all(q.same_as(plain.coded[n]) is None for n, q in fast.coded.items())


def test_what_is_kept_sees_codes_and_activation_grids(tmp_path, monkeypatch):
    block = block_of(tmp_path, Affine(3, 16))
    block = block.with_input_quantizers(
        dict.fromkeys(block.graph.linears, InputQuantizer(grid=PerToken(4)))
    )
    fast = GPTQ()(block)
    monkeypatch.setattr("lowbit.methods._sites._KEPT", 0)
    assert all(q.same_as(GPTQ()(block).coded[n]) is None for n, q in fast.coded.items())


class _Waits(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["dynamic", "static", "books"])
def test_the_plain_loop_waits_for_no_column(mode, monkeypatch):
    without_compiler(monkeypatch)
    monkeypatch.setattr("lowbit.grid.kmeans.library", lambda source: None)
    # As on an accelerator, without Lloyd.
    monkeypatch.setattr(
        "lowbit.grid.codebook.kmeans",
        lambda v, k, weights, checked: kmeans(v, k, exact=True, checked=False),
    )
    weight, hessian = case(9, 32, 2)
    weight, factor = weight.float(), inverse_factor(hessian).float()
    grid = Codebook(2) if mode == "books" else Affine(2, 8)

    def fit(ahead, column):
        return fit_range(grid, ahead, "mse", torch.float32)

    fitted = {"params": grid.fit(weight)} if mode == "static" else {"fit": fit}
    coder = GridColumns(grid, torch.arange(32), torch.float32, **fitted)
    with _Waits() as waits:
        code_columns(weight, factor, coder, 16)
    assert waits.count == 0
