"""K-means against brute force and scikit-learn, the codebook grid, its layout on disk, and soft
rounding on it.
"""

import ctypes
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import apply_methods, assert_slopes, begin, projected, save_tiny, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import StudentT

from lowbit.errors import LowbitError
from lowbit.formats import codebook, packing
from lowbit.grid import Affine, Codebook, CodebookParams, Outliers, QTensor
from lowbit.grid import kmeans as module
from lowbit.grid.compiled import library, pointer
from lowbit.grid.kmeans import kmeans
from lowbit.methods import CLAQ, RTN, TesseraQ
from lowbit.methods._rounding import FROZEN, Adam
from lowbit.methods._soft import SoftBlock
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe


def batched(values, levels, weights=None, exact=False):
    return module._batched(values, levels, weights, exact)


PATHS = [pytest.param(kmeans, id="compiled"), pytest.param(batched, id="torch")]


def brute(values, k, weights=None):
    """The least sum of squares over all ways to cut the sorted values."""
    order = np.argsort(values, kind="stable")
    x, w = (
        values[order].astype(np.float64),
        np.ones(len(values)) if weights is None else weights[order].astype(np.float64),
    )
    best = np.inf
    for cut in itertools.combinations(range(1, len(x)), min(k, len(x)) - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cut, len(x))):
            mean = (w[a:b] * x[a:b]).sum() / w[a:b].sum()
            total += (w[a:b] * (x[a:b] - mean) ** 2).sum()
        best = min(best, total)
    return best


def spent(values, levels, weights=None):
    d = (values[:, :, None].double() - levels[:, None].double()).square().amin(-1)
    return (d if weights is None else d * weights.double()).sum(1)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 11),
    k=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    weighted=st.booleans(),
    rounded=st.booleans(),
)
def test_the_optimum_of_short_lists(path, n, k, seed, weighted, rounded):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(3, n, generator=g)
    values = (values * 2).round() if rounded else values
    weights = torch.rand(3, n, generator=g) + 0.1 if weighted else None
    levels, sse = path(values, k, weights, exact=True)
    assert levels.shape == (3, k)
    assert bool((levels.diff(dim=1) >= 0).all())
    for i in range(3):
        least = brute(values[i].numpy(), k, None if weights is None else weights[i].numpy())
        assert float(sse[i]) == pytest.approx(least, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(spent(values, levels, weights), sse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [4, 8, 16])
def test_the_fast_way_is_close_to_the_optimum(path, k):
    torch.manual_seed(k)
    values = StudentT(5.0).sample((24, 1500))
    _, exact = kmeans(values, k, exact=True)
    levels, sse = path(values, k)
    assert float((sse / exact).max()) < 1.005
    torch.testing.assert_close(spent(values, levels), sse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [4, 16])
def test_never_worse_than_scikit_learn(k):
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(1)
    values = StudentT(5.0).sample((12, 700))
    _, sse = kmeans(values, k)
    for row, ours in zip(values.numpy(), sse.tolist(), strict=True):
        theirs = cluster.KMeans(k, n_init="auto", random_state=10).fit(row[:, None]).inertia_
        assert ours <= theirs * (1 + 1e-5)


@pytest.mark.parametrize("path", PATHS)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-50, 50), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_levels_move_with_the_numbers(path, scale, shift, seed):
    values = torch.randn(2, 300, generator=torch.Generator().manual_seed(seed)).double()
    plain, _ = path(values, 8, exact=True)
    moved, _ = path(values * scale + shift, 8, exact=True)
    torch.testing.assert_close(
        moved.double(),
        plain.double() * scale + shift,
        rtol=1e-3,
        atol=2e-3 * scale + 1e-5 * abs(shift),
    )


@pytest.mark.parametrize("path", PATHS)
def test_few_different_numbers_are_met_exactly(path):
    values = torch.tensor([[0.5, -1.0, 0.5, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    levels, sse = path(values, 4)
    assert levels.tolist() == [[-1.0, 0.5, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]
    assert sse.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(path, bad):
    values = torch.randn(2, 30)
    values[1, 7] = bad
    with pytest.raises(ValueError, match="finite"):
        path(values, 4)


def test_without_a_compiler_torch_does_it():
    script = (
        "import torch; from lowbit.grid import kmeans as m; assert m.library(m._SOURCE) is None; "
        "print(m.kmeans(torch.arange(8.)[None], 2)[0].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "LOWBIT_NO_COMPILER": "1"},
        check=True,
    )
    assert done.stdout.strip() == "[[1.5, 5.5]]"


# --- the grid and its layout ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 40),
    bits=st.integers(1, 4),
    kind=st.sampled_from(["column", "two", "row", "tensor", "mixed"]),
    kept=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_on_disk_and_back(rows, width, bits, kind, kept, seed):
    g = torch.Generator().manual_seed(seed)
    width = width * 2 if kind == "two" else width
    grid = Codebook(
        bits, {"two": "column", "mixed": "column"}.get(kind, kind), 2 if kind == "two" else None
    )
    w = torch.randn(rows, width, generator=g)
    widths = torch.randint(1, 5, (width,), generator=g) if kind == "mixed" else None
    found = grid.fit(w) if widths is None else grid.fit_columns(w, widths)
    params = grid.stored(found, torch.float32)
    index = torch.randperm(rows * width, generator=g)[: rows * width // 7].sort().values
    outliers = (
        Outliers(index, torch.randn(len(index), generator=g).half().float())
        if kept and len(index)
        else None
    )
    q = QTensor(grid, grid.encode(w, params), params, outliers)
    tensors = packing.pack(q, torch.float32)
    assert q.same_as(packing.unpack(tensors, grid, "x")) is None
    nearest = (w[:, :, None] - grid.decode(q.codes, params)[:, :, None]).abs()
    top = (1 << (params.widths if kind == "mixed" else params.widths[:1])).max()
    assert int(q.codes.max()) < int(top)
    assert float(nearest.max()) <= float((w.max() - w.min()).abs()) + 1e-3
    if kind in ("column", "mixed"):
        from lowbit import kernels

        packed = codebook.read(tensors, grid, torch.float32, "x")
        torch.testing.assert_close(kernels.decode(packed), q.decode())


def test_columns_of_one_width_may_be_stored_in_any_order():
    grid = Codebook(2)
    w = torch.randn(9, 8)
    params = grid.stored(grid.fit_columns(w, torch.tensor([2, 4] * 4)), torch.float32)
    q = QTensor(grid, grid.encode(w, params), params)
    tensors = packing.pack(q, torch.float32)
    turned = tensors["weight_columns"].long()[[3, 1, 0, 2, 4, 5, 6, 7]]
    from lowbit.grid.bits import pack

    tensors["weight_columns"] = turned.to(torch.uint16)
    tensors["weight_codes_2"] = pack(q.codes[:, turned[:4]].contiguous(), 2).T.contiguous()
    tensors["weight_levels_2"] = params.levels[turned[:4], :4].half()
    assert q.same_as(packing.unpack(tensors, grid, "x")) is None


def test_codes_are_those_of_the_nearest_levels():
    w = torch.randn(50, 9)
    grid = Codebook(3)
    params = grid.fit_columns(w, torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 2]))
    decoded = grid.decode(grid.encode(w, params), params)
    for j, bits in enumerate(params.widths.tolist()):
        best = (w[:, j, None] - params.levels[j, : 1 << bits]).abs().amin(1)
        torch.testing.assert_close((w[:, j] - decoded[:, j]).abs(), best)


def damaged(tensors, key, change):
    out = {k: t.clone() for k, t in tensors.items()}
    change(out[key])
    return out


def test_damaged_files_are_refused_by_name():
    w = torch.randn(20, 12)
    grid = Codebook(2)
    params = grid.stored(grid.fit_columns(w, torch.tensor([2, 4] * 6)), torch.float32)
    q = QTensor(
        grid, grid.encode(w, params), params, Outliers(torch.tensor([3, 17, 18]), torch.ones(3))
    )
    good = packing.pack(q, torch.float32)
    for key, change, what in [
        ("weight_columns", lambda t: t.__setitem__(0, 11), "not a permutation"),
        ("weight_columns", lambda t: t.__setitem__(0, 500), "not a permutation"),
        ("weight_outlier_columns", lambda t: t.__setitem__(0, 12), "not one of the 12 inputs"),
        ("weight_outlier_starts", lambda t: t.__setitem__(1, 9), "do not rise"),
        ("weight_outlier_starts", lambda t: t.__setitem__(20, 2), "do not rise"),
        (
            "weight_levels_2",
            lambda t: t.__setitem__((0, 0), float("nan")),
            "not finite and ascending",
        ),
        ("weight_levels_4", lambda t: t.__setitem__((0, 0), 99), "not finite and ascending"),
    ]:
        with pytest.raises(LowbitError, match=f"'a.b' is damaged: .*{what}"):
            packing.unpack(damaged(good, key, change), grid, "a.b")
    for key in good:
        with pytest.raises(LowbitError, match="'a.b'"):
            packing.unpack(
                {
                    k: t
                    for k, t in good.items()
                    if k != key
                    and (key != "weight_outlier_starts" or not k.startswith("weight_levels_2"))
                },
                grid,
                "a.b",
            )
    with pytest.raises(LowbitError, match="not representable in float16"):
        packing.pack(
            replace(q, params=CodebookParams(params.levels + 1e-6, params.widths)), torch.float32
        )


def test_bad_grids():
    for bad in (
        dict(bits=0),
        dict(bits=9),
        dict(bits=2, per="block"),
        dict(bits=2, per="row", group_size=4),
        dict(bits=2, group_size=0),
    ):
        with pytest.raises(ValueError):
            Codebook(**bad)
    grid = Codebook(1)
    beyond = grid.stored(grid.fit(torch.tensor([[1e5], [1.0]])), torch.float32)
    with pytest.raises(ValueError, match="float16"):
        grid.check_finite(beyond)


# --- soft rounding --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    stream = ModelStream(save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    return begin(stream, 0, Recipe(Codebook(2)), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)


FAST = TesseraQ(schedule="exponential-4-6", iters=8, lr=3e-2)


def test_gradients_match_finite_differences(block, monkeypatch):
    # Rounding has no slope.
    monkeypatch.setattr(Codebook, "stored", lambda self, params, dtype: params)
    soft = SoftBlock(block)
    for b in soft.buckets:
        b.v.add_(0.1)
    loss, found = projected(soft, block)
    for b, gradients in zip(soft.buckets[:2], found, strict=False):
        for variable, grad in zip((b.nu, b.v), gradients, strict=True):
            assert_slopes(loss, variable, grad)


def test_the_optimizer_moves_the_weights_whose_gradient_it_is(block):
    soft = SoftBlock(block)
    before = [b.nu.clone() for b in soft.buckets]
    g = torch.Generator().manual_seed(5)
    soft.weights()
    gradients = [torch.randn(block.weight(n).shape, generator=g) for n in soft.names]
    found = slopes(soft, gradients)
    soft.start()
    soft.descend(gradients, Adam(1e-2).next(), 0.0)
    for b, start, (by_nu, by_v) in zip(soft.buckets, before, found, strict=True):
        moved = (b.nu - start) * (b.nu.abs() < FROZEN)
        assert torch.equal(torch.sign(moved), -torch.sign(by_nu) * (b.nu.abs() < FROZEN))
        assert torch.equal(torch.sign(b.v), -torch.sign(by_v))


def test_soft_weights_start_as_the_float_ones_inside_a_book(block):
    soft = SoftBlock(block)
    weights = soft.weights()
    for name in block.graph.linears:
        w, params = block.weight(name), block.range_of(name)
        inside = (params.levels[:, :1] <= w.T) & (params.levels[:, -1:] >= w.T)
        torch.testing.assert_close(
            weights[f"{name}.weight"].T[inside], w.T[inside], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("start", [RTN(), CLAQ(adaptive_bits=0.3, outlier_bits=0.14)])
def test_what_is_frozen_is_what_is_stored(block, start):
    """Also where tuning has carried levels past each other: they change places, and so do the
    codes.
    """
    soft = SoftBlock(start(block) if isinstance(start, CLAQ) else block)
    g = torch.Generator().manual_seed(3)
    crossed = False
    for b in soft.buckets:
        b.v.copy_(torch.randn(b.v.shape, generator=g) * 3)
        crossed |= bool((b.now().levels.diff(dim=1) < 0).any())
        b.nu.copy_(torch.randn(b.nu.shape, generator=g))
    soft.harden_all()
    frozen, stored = soft.weights(), soft.hard_weights()
    assert crossed
    for key in soft.keys:
        torch.testing.assert_close(stored[key], frozen[key])
    for q in soft.codes().values():
        assert bool((q.params.levels.diff(dim=1) >= 0).all())


def test_outliers_pull_at_no_level(block):
    soft = SoftBlock(CLAQ(outlier_bits=0.7)(block))
    soft.weights()
    only = {
        n: torch.zeros_like(block.weight(n))
        .flatten()
        .index_fill(0, soft.outliers[n].index, 1.0)
        .view_as(block.weight(n))
        for n in soft.names
    }
    assert all(
        not bool(by_v.any()) and not bool(by_nu.any())
        for by_nu, by_v in slopes(soft, [only[n] for n in soft.names])
    )


@pytest.mark.parametrize(
    "methods",
    [
        (FAST,),
        (CLAQ(adaptive_bits=0.2, outlier_bits=0.14), FAST),
        (CLAQ(), replace(FAST, rounds=2)),
    ],
)
def test_tesseraq_improves_what_it_starts_from(block, methods):
    recipe = Recipe(Codebook(2), methods)
    start = apply_methods(block, Recipe(Codebook(2), methods[:-1] or (RTN(),)))
    done, again = apply_methods(block, recipe), apply_methods(block, recipe)
    assert done.notes["loss_after"] < 0.8 * start.notes["loss_after"]
    for name, q in done.coded.items():
        assert q.same_as(again.coded[name]) is None
        assert bool((q.params.levels.diff(dim=1) >= 0).all())
        assert bool(((1 << q.params.widths[:, None]) > q.codes.T).all())
        assert torch.equal(q.params.levels, q.params.levels.half().float())
        before = start.coded[name]
        assert torch.equal(q.params.widths, before.params.widths)
        if before.outliers is not None:
            assert not q.outliers.differing(before.outliers)
            assert torch.equal(q.decode().flatten()[before.outliers.index], before.outliers.values)


def test_tesseraq_leaves_outliers_of_a_uniform_grid_alone(block):
    uniform = block.within(grids=dict.fromkeys(block.graph.linears, Affine(2, 16)))
    start = CLAQ(outlier_bits=0.28)(uniform)
    done = FAST(start)
    for name, q in done.coded.items():
        kept = start.coded[name].outliers
        assert len(kept.index)
        assert torch.equal(q.decode().flatten()[kept.index], kept.values)


@pytest.mark.skipif(library(module._SOURCE) is None, reason="no C compiler")
@pytest.mark.parametrize("n", [1, 7, 2048, 5000])
def test_digits_sort_as_numpy_does(n):
    x = (
        torch.distributions.StudentT(1.2).sample((5, n))
        * torch.tensor([1e-38, 1e-3, 1.0, 1e3, 1e30])[:, None]
    )
    x[:, :1] = 0.0
    x[:, n // 2] = -0.0
    x[1, -1], x[2, 0] = float("inf"), float("-inf")
    sorted_ = torch.empty_like(x)
    assert (
        library(module._SOURCE).sort_rows(
            pointer(x), ctypes.c_int64(5), ctypes.c_int32(n), pointer(sorted_)
        )
        == 0
    )
    assert np.array_equal(sorted_.numpy(), np.sort(x.numpy(), axis=1))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_long_list_with_a_number_that_is_none_is_refused(sign):
    x = torch.randn(3, 4096)
    x[1, 77] = torch.copysign(torch.tensor(float("nan")), torch.tensor(float(sign)))
    with pytest.raises(module.NotFiniteError):
        kmeans(x, 4)
