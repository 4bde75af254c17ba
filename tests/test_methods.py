"""Promises of the methods, gradients against finite differences, and the quantile against numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import apply_methods, assert_slopes, begin, projected, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.grid import Affine, PerToken
from lowbit.methods import AWQ, GPTQ, RTN, OmniQuant, QuaRot, SmoothQuant, TesseraQ, _prefetch
from lowbit.methods._batches import copied
from lowbit.methods._prefetch import Prefetcher
from lowbit.methods._race import least
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._rounding import FROZEN, inverse_rectified, rectified
from lowbit.methods._rounding.hardening import quantile
from lowbit.methods._scale_search import best_scale, collect_inputs
from lowbit.methods._soft import SoftBlock
from lowbit.methods.awq import pick_tokens, search_clip
from lowbit.methods.tesseraq import soft_shares
from lowbit.model.block import Block
from lowbit.model.model import Streams
from lowbit.model.rewrite import fold
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

FAST = TesseraQ(schedule="exponential-4-6", iters=8, lr=3e-2)


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    stream = ModelStream(save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    return begin(stream, 0, Recipe(Affine(2, 16)), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)


EVERY = [
    RTN(),
    AWQ(),
    AWQ(clip="symmetric"),
    GPTQ(),
    GPTQ(act_order=True, clip="mse"),
    FAST,
    replace(FAST, rounds=2),
    replace(FAST, refit=5),
    SmoothQuant(),
    OmniQuant(epochs=1),
    QuaRot(),
]


@pytest.mark.parametrize("method", EVERY)
def test_every_method_ends_on_the_grid_and_is_deterministic(block, method):
    once, twice = (apply_methods(block, Recipe(Affine(2, 16), (method,))) for _ in range(2))
    assert set(once.coded) == set(block.graph.linears)
    for name, q in once.coded.items():
        assert int(q.codes.max()) <= 3
        assert q.same_as(twice.coded[name]) is None


@pytest.mark.parametrize("method", EVERY)
def test_every_method_computes_in_float64(tmp_path, method):
    stream = ModelStream(save_tiny(tmp_path, dtype=torch.float32), compute=torch.float64)
    x = stream.embed(torch.randint(3, 280, (6, 16), generator=torch.Generator().manual_seed(0)))
    recipe = Recipe(Affine(3, 16), (method,), activations=PerToken(8))
    block = begin(stream, 0, recipe, Streams(x, x, 4), stream.block_kwargs(16)[0], 0)
    assert set(apply_methods(block, recipe).coded) == set(block.graph.linears)


def test_losses_fall_from_method_to_method(block):
    def error(*methods):
        done = apply_methods(block, Recipe(Affine(2, 16), methods))
        return Reconstruction(done, 4).loss(done.decoded(), 8)

    rtn, awq, tesseraq = error(RTN()), error(AWQ()), error(AWQ(), FAST)
    assert awq < rtn
    assert tesseraq < 0.8 * awq


def test_a_16_bit_forward_pass_leaves_the_rounding_in_float32(tmp_path):
    stream = ModelStream(save_tiny(tmp_path), compute=torch.bfloat16)
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    block = begin(stream, 0, Recipe(Affine(3, 16)), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)
    exact = block.within(compute=torch.float32)
    assert block.forward(x[:2]).dtype == torch.bfloat16
    for name, q in RTN()(block).coded.items():
        assert q.same_as(RTN()(exact).coded[name]) is None
    start, tuned = SoftBlock(block), apply_methods(block, Recipe(Affine(3, 16), (AWQ(), FAST)))
    # Not the few values that 8 bits leave.
    assert all(b.nu.unique().numel() > 0.5 * b.nu.numel() for b in start.buckets)
    assert tuned.notes["loss_after"] < 0.6 * tuned.notes["loss_before"]


def test_soft_weights_start_as_the_float_ones_except_at_range_ends(block):
    soft = SoftBlock(block)
    weights = soft.weights()
    for name in block.graph.linears:
        grid, params = block.grids[name], block.range_of(name)
        inside = grid.neighbours(block.weight(name), params)
        inside = inside.low != inside.high
        torch.testing.assert_close(
            weights[f"{name}.weight"][inside], block.weight(name)[inside], rtol=1e-5, atol=1e-6
        )


def test_gradients_match_finite_differences(block):
    soft = SoftBlock(block)
    for b in soft.buckets:
        b.v.add_(0.1)
    loss, found = projected(soft, block)
    b = soft.buckets[0]
    for variable, grad in zip((b.nu, b.v), found[0], strict=True):
        assert_slopes(loss, variable, grad)


@pytest.mark.parametrize("tune_scale", [True, False])
def test_a_refit_moves_scales_and_no_codes(block, tune_scale):
    plain, refit = (replace(FAST, tune_scale=tune_scale, refit=n)(block) for n in (0, 20))
    for name, q in plain.coded.items():
        assert torch.equal(q.codes, refit.coded[name].codes)
        assert not torch.equal(q.params.scale, refit.coded[name].params.scale)
    assert refit.notes["tesseraq"]["after"] < plain.notes["tesseraq"]["after"]


def test_another_round_aims_each_weight_where_its_own_loss_falls(block):
    soft, job = SoftBlock(block), Reconstruction(block, 8)
    soft.harden_all()
    hard = soft.hard_weights()
    FAST._restart(soft, job, 1)
    b = soft.buckets[0]
    assert float(rectified(b.nu).max()) <= 0.2 + 1e-6
    key = soft.keys[0]
    place = soft.places[soft.names[0]]
    scale, codes = b.now().scale[place.rows], b.other[place.rows].to(torch.int8)
    step = codes - b.base[place.rows].to(torch.int8)
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 3
    before = job.loss(hard, 8)
    free = step.nonzero()[::97]
    assert len(free) > 10
    for row, column in free.tolist():
        nudged = hard[key].clone()
        nudged.view_as(step)[row, column] += 1e-2 * step[row, column] * scale[row, 0]
        assert job.loss({**hard, key: nudged}, 8) < before


def test_hardening_follows_the_schedule_and_never_thaws(block):
    soft, frozen = SoftBlock(block), None
    for share in soft_shares("handcrafted-20"):
        soft.harden(share)
        assert abs(soft.soft_share() - share) < 5e-3
        now = torch.cat([(b.nu * (b.nu.abs() >= FROZEN)).flatten() for b in soft.buckets])
        if frozen is not None:
            assert torch.equal(now[frozen != 0], frozen[frozen != 0])
        frozen = now


def test_codes_differ_from_nearest_by_at_most_one(block):
    tuned, nearest = (apply_methods(block, Recipe(Affine(2, 16), (m,))) for m in (FAST, RTN()))
    moved = 0
    for name in block.graph.linears:
        difference = (tuned.coded[name].codes.int() - nearest.coded[name].codes.int()).abs()
        assert int(difference.max()) <= 1
        moved += int(difference.sum())
    assert moved > 0


def test_steps_in_bfloat16_end_as_good_and_are_reported(block):
    plain, half = (replace(FAST, precision=p)(block) for p in ("float32", "bfloat16"))
    assert (
        half.notes["tesseraq"]["steps"] == "torch.bfloat16"
        and plain.notes["tesseraq"]["steps"] == "torch.float32"
    )
    # Judged in float32.
    assert half.notes["tesseraq"]["before"] == plain.notes["tesseraq"]["before"]
    assert half.notes["tesseraq"]["after"] == pytest.approx(
        plain.notes["tesseraq"]["after"], rel=0.15
    )
    assert any(not torch.equal(q.codes, half.coded[n].codes) for n, q in plain.coded.items())
    with pytest.raises(LowbitError, match="unknown precision for tesseraq 'half'"):
        replace(FAST, precision="half")


def test_rows_copied_one_by_one_are_those_asked_for():
    stream, rows = torch.randn(9, 3, 4), torch.tensor([7, 0, 7, 2])
    assert torch.equal(copied(stream, rows, torch.device("cpu")), stream[rows])


def scarce(block, rows):
    """A block whose device has room for so many rows at a time."""

    class Scarce(Block):
        def passed(self, x, *rest):
            if len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().passed(x, *rest)

    return Scarce(**vars(block))


def test_out_of_memory_is_met_by_smaller_parts_with_the_same_result(block):
    plain, tight = Reconstruction(block, 4), Reconstruction(scarce(block, 1), 4)
    rows = plain.draw()
    keys = [f"{n}.weight" for n in block.graph.linears]
    shifted = {k: w + 0.01 for k, w in block.weights.items()}
    loss, gradients = plain.gradients(shifted, keys, rows)
    again, parts = tight.gradients(shifted, keys, rows)
    torch.testing.assert_close(again, loss)
    for a, b in zip(parts, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
    assert tight.loss(shifted) == pytest.approx(plain.loss(shifted), rel=1e-5)
    assert len(tight.remarks) == 2 + 3  # 4 to 2 to 1 in tuning, 8 to 1 in judging
    torch.testing.assert_close(scarce(block, 3).run(block.x), block.run(block.x))
    done = FAST(scarce(block, 2))
    assert any(
        "ran out of memory while tuning" in t and "2 now" in t for t in done.notes["trouble"]
    )
    for name, q in FAST(block).coded.items():
        assert float((q.codes != done.coded[name].codes).float().mean()) < 0.02
    with pytest.raises(LowbitError, match="with a single row at a time"):
        FAST(scarce(block, 0))


@pytest.mark.parametrize("objective", ["block", "logits"])
def test_a_restart_in_parts_aims_at_the_same(block, objective):
    jobs = [Reconstruction(b, 4, objective) for b in (last(block), scarce(last(block), 1))]
    keys = [f"{n}.weight" for n in block.graph.linears]
    shifted = {k: w + 0.01 for k, w in block.weights.items()}
    found = [
        j.derivatives(shifted, keys, torch.arange(4), torch.Generator().manual_seed(3))
        for j in jobs
    ]
    assert len(jobs[1].remarks) == 2 and jobs[0].objective == objective
    for whole, parts in zip(*(sum(f, ()) for f in found), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    whole = jobs[0].gradients(shifted, keys, torch.arange(4))[1]
    for summed, mean in zip(found[0][0], whole, strict=True):
        torch.testing.assert_close(
            summed, mean * 4 * 32, rtol=1e-3, atol=1e-4 * float(summed.abs().max())
        )


@pytest.mark.parametrize("objective", ["block", "logits"])
def test_random_probes_average_to_the_curvature(block, objective):
    """By one weight: the Gauss-Newton second derivative is that of the loss along a line, but for
    the curvature of the output itself.
    """
    job, key = Reconstruction(last(block), 4, objective), "self_attn.q_proj.weight"
    rows, generator, weights = (
        torch.arange(4),
        torch.Generator().manual_seed(0),
        dict(block.weights),
    )
    direction, x = torch.randn(weights[key].shape, generator=generator), block.xq[rows]
    target = block.forward(x).detach()  # at the optimum the Gauss-Newton matrix is the Hessian
    job.block.target[rows] = target
    squares = [
        float((job.derivatives(weights, [key], rows, generator)[1][0] * direction).sum()) ** 2
        for _ in range(200)
    ]

    def loss(step):
        with torch.no_grad():
            return float(
                job.distance(
                    block.forward(x, {**weights, key: weights[key] + step * direction}), target
                )
            )

    eps = 0.05
    curvature = (loss(eps) + loss(-eps) - 2 * loss(0)) / eps**2
    assert sum(squares) / len(squares) == pytest.approx(curvature, rel=0.35)


def last(block):
    """The block as if it were the model's last one, on a head of its own."""
    head = torch.randn(40, block.x.shape[-1], generator=torch.Generator().manual_seed(5)) / 4
    return block.within(readout=lambda y: y @ head.T, target=block.target.clone())


@pytest.mark.parametrize("second_loss", ["on", "off"])
def test_omniquant_in_parts_learns_the_same(block, second_loss):
    method = OmniQuant(epochs=2, batch=4, second_loss=second_loss)
    plain, tight = method(block), method(scarce(block, 2))
    assert (
        any("ran out of memory while tuning" in t for t in tight.notes["trouble"])
        and "trouble" not in plain.notes
    )
    assert tight.notes["omniquant"]["after"] == pytest.approx(
        plain.notes["omniquant"]["after"], rel=1e-3
    )
    for name, params in plain.params.items():
        torch.testing.assert_close(tight.params[name].scale, params.scale, rtol=1e-2, atol=1e-6)


def test_no_step_is_made_in_float16(block, monkeypatch):
    monkeypatch.setattr("lowbit.methods.tesseraq.multiplies_bfloat16", lambda device: True)
    half = block.computing(torch.float16)
    assert TesseraQ()._stepped(half).compute == torch.float32
    assert TesseraQ(precision="auto")._stepped(half).compute == torch.bfloat16
    assert (
        TesseraQ(precision="auto")._stepped(block.computing(torch.bfloat16)).compute
        == torch.bfloat16
    )


class Side:
    """A stream of an accelerator, as far as `Prefetcher` uses it."""

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self):
        return "event"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_what_was_read_ahead_is_what_a_step_gets(block, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Side())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None, raising=False)
    job = Reconstruction(block, 4)
    job._prefetcher._side = Side()
    keys, asked, taken = ["mlp.down_proj.weight"], [], []
    plain = job._prefetcher.take
    job._prefetcher.take = lambda rows: (
        (asked.append(job._prefetcher._ahead), taken.append(plain(rows)))[1] or taken[-1]
    )
    for _ in range(3):
        rows = job.draw()
        job.gradients(block.weights, keys, rows)
        assert all(
            torch.equal(t, s[rows])
            for t, s in zip(taken[-1], (block.xq, block.target), strict=True)
        )
    assert asked[0] is None and [a[1] for a in asked[1:]] == taken[1:]  # not copied again


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("bug")])
def test_a_step_goes_on_where_there_is_no_memory_to_read_ahead(block, monkeypatch, error):
    def copies(*_):
        raise error

    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Side())
    monkeypatch.setattr(_prefetch, "copied", copies)
    ahead = Prefetcher(block)
    ahead._side, rows = Side(), torch.tensor([2, 0])
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            ahead.prepare(rows)
        return
    ahead.prepare(rows)
    assert ahead._side is None  # nor is it tried again
    assert torch.equal(ahead.take(rows)[0], block.xq[rows])


def test_non_finite_loss_falls_back_and_is_recorded(block):
    broken = block.within(target=torch.full_like(block.target, float("nan")))
    done = FAST(broken)
    assert done.notes["trouble"]
    assert all(int(q.codes.max()) <= 3 for q in done.coded.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 3000), st.floats(0, 1), st.floats(0, 0.9), st.integers(0, 100))
def test_quantile_equals_numpy(n, q, saturated, seed):
    v = torch.rand(n, generator=torch.Generator().manual_seed(seed)) / 2
    v[: int(n * saturated)] = 0.5
    assert math.isclose(
        float(quantile(v, q)), float(np.quantile(v.double().numpy(), q)), rel_tol=1e-5, abs_tol=1e-6
    )


def test_golden_rounding_variables():
    r = torch.tensor([0.75, 0.225, 0.7, 0.1, 0.325, 0.55, 0.925, 0.75], dtype=torch.float64)
    nu = [0.887303, -0.990399, 0.693147, -1.609438, -0.600774, 0.167054, 1.767662, 0.887303]
    torch.testing.assert_close(
        inverse_rectified(r), torch.tensor(nu, dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(rectified(inverse_rectified(r)), r)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_search_equals_brute_force(symmetric):
    g = torch.Generator().manual_seed(0)
    w, x, grid = torch.randn(3, 16, generator=g), torch.randn(40, 16, generator=g), Affine(2, 8)
    parts = x.reshape(40, 2, 8)
    low, high = search_clip(
        w, torch.einsum("tgi,tgj->gij", parts, parts), grid, 10, symmetric=symmetric
    )
    for row in range(3):
        for group in range(2):
            part, inputs = (
                w[row, group * 8 : group * 8 + 8].double(),
                x[:, group * 8 : group * 8 + 8].double(),
            )
            ends = (-part.abs().max(), part.abs().max()) if symmetric else (part.min(), part.max())
            errors = []
            for i in range(10):
                clamped = part.clamp(ends[0] * (1 - i / 20), ends[1] * (1 - i / 20))[None]
                params = grid.fit(clamped)
                errors.append(
                    float(
                        (inputs @ (grid.decode(grid.encode(clamped, params), params)[0] - part))
                        .pow(2)
                        .sum()
                    )
                )
            best = int(np.argmin(errors))
            assert math.isclose(
                float(high[row, group]), float(ends[1]) * (1 - best / 20), rel_tol=1e-5
            )
            assert math.isclose(
                float(low[row, group]), float(ends[0]) * (1 - best / 20), rel_tol=1e-5
            )


def test_transform_after_solver_raises(block):
    with pytest.raises(LowbitError, match="transforms come before clips, and clips before solvers"):
        AWQ()(RTN()(block))


@pytest.mark.parametrize("tokens", [0, 100])
def test_group_moments_are_the_inputs_seen_by_the_linears(block, tokens):
    moments = AWQ(rows=8, clip_tokens=tokens)._moments(block, block.grids, 8)
    seen = []
    block.observe(
        ["self_attn.q_proj"],
        "quantized",
        8,
        lambda _, call: seen.append(call.args[0].flatten(0, -2).double()),
    )
    x = torch.cat(seen)
    picked = pick_tokens(len(x), tokens, "random", torch.Generator().manual_seed(block.seed))
    x = x if picked is None else x[picked]
    assert len(x) == (tokens or 8 * 32)
    for g in range(x.shape[1] // 16):
        part = x[:, 16 * g : 16 * g + 16]
        assert torch.allclose(
            moments["self_attn.q_proj", 16][0][g].double(), part.T @ part, rtol=1e-5, atol=1e-5
        )


def brute_scale(block, site, rows, exponents):
    """AWQ's choice by its definition: every candidate's block part on all tokens, in float64."""
    weights = {k: v.double() for k, v in block.weights.items()}
    wide = replace(block, weights=weights).within(compute=torch.float64)
    seen, probe = [], []

    def outputs(weights):
        found, module = [], block.module.get_submodule(site.probe)
        handle = module.register_forward_hook(
            lambda _m, _a, y: found.append(y[0] if isinstance(y, tuple) else y)
        )
        wide.forward(block.x[:rows].double(), {**wide.weights, **weights})
        handle.remove()
        return found[0]

    wide.observe(
        [site.reads[0]],
        "float",
        rows,
        lambda _, call: seen.append(call.args[0].flatten(0, -2)),
    )
    mean, errors, factors = torch.cat(seen).abs().mean(0), [], []
    with torch.no_grad():
        probe = outputs({})
        for n in range(exponents):
            factor = mean.pow(n / exponents).clamp(min=1e-4)
            factor = factor / (factor.max() * factor.min()).sqrt()
            weights = {}
            for name in site.reads:
                scaled = (block.weight(name).double() * factor).float()
                params = block.grids[name].stored(block.grids[name].fit(scaled), block.stored)
                weights[f"{name}.weight"] = (
                    block.grids[name]
                    .decode(block.grids[name].encode(scaled, params), params)
                    .double()
                    / factor
                )
            errors.append(float((outputs(weights) - probe).pow(2).sum()))
            factors.append(factor)
    best = int(np.argmin(errors))
    return factors[best], best / exponents


@pytest.mark.parametrize("tokens", [32, 100_000])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_scale_search_equals_brute_force(tmp_path, monkeypatch, family, tokens):
    """Candidates left early would not have won, whatever the size of the parts; and all sites'
    inputs come from one pass.
    """
    monkeypatch.setattr("lowbit.methods._scale_search._TOKENS", tokens)
    stream = ModelStream(save_tiny(tmp_path, family, dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    block = begin(stream, 0, Recipe(Affine(2, 16)), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)
    found = AWQ(clip="none")(block)
    sites = [s for s in block.graph.sites if s.source is not None]
    assert len(sites) > 1
    for site in sites:
        factor, exponent = brute_scale(block, site, 8, 20)
        assert found.notes["awq_exponents"][site.reads[0]] == exponent
        if exponent > 0:
            block = fold(block, site, factor)
    for name, w in block.weights.items():
        torch.testing.assert_close(found.weights[name], w.float(), rtol=1e-4, atol=1e-5)


def test_candidates_that_are_no_numbers_never_win(block):
    site = block.graph.sites[0]
    seen = collect_inputs(block, [site], 8)[site.reads[0]]
    ones = torch.ones(len(seen.size), dtype=torch.float64)
    candidates = [(ones * float("nan"), 0.1), (ones, 0.2), (ones, 0.3)]
    assert best_scale(block, site, seen, candidates)[1] == 0.2  # of equals the first
    assert best_scale(block, site, seen, candidates[:1])[1] == 0.0


@pytest.mark.parametrize(
    "compute, bad, exponent",
    [(torch.bfloat16, 1, 0.0), (torch.bfloat16, 0, 0.7), (torch.float32, 1, 0.7)],
)
def test_what_wins_in_16_bits_is_checked_in_float32(block, monkeypatch, compute, bad, exponent):
    """Against no factor at all; in float32 nothing is checked."""
    block = block.computing(compute)
    (site, *_) = [s for s in block.graph.sites if s.probe not in s.reads]
    seen = collect_inputs(block, [site], 8)[site.reads[0]]
    ones = torch.ones(len(seen.size), dtype=torch.float64)
    spread = torch.logspace(-4, 0, len(ones), dtype=torch.float64)
    factors, asked = ([spread, ones] if bad == 0 else [ones, spread]), []

    def wrong_at_first(count, parts, errors, doubt=0.0):
        asked.append(count)
        return 1 if len(asked) == 1 else least(count, parts, errors, doubt)

    monkeypatch.setattr("lowbit.methods._scale_search.least", wrong_at_first)
    found = best_scale(block, site, seen, list(zip(factors, (0.0, 0.7), strict=True)))
    assert found[1] == exponent and len(asked) == (1 if compute == torch.float32 else 2)
