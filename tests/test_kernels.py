"""Every backend against float64 sums over weights written down apart from any of them, and
everything that `check` must refuse.
"""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import LowbitError, kernels
from lowbit.grid import compiled
from lowbit.grid.bits import pack
from lowbit.grid.packed import PackedColumns, Segment, Sparse
from lowbit.kernels import cpu, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = cpu.library() is not None
HERE = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not COMPILED, reason="no C compiler")),
]


def made(out, columns, rate=0.0, dtype=torch.float16, seed=0):
    """A packed weight of random codes, levels and outliers, and the (out, in) float64 weight that
    it is by definition.

    columns: {bits: how many}.
    """
    gen = torch.Generator().manual_seed(seed)
    inputs = sum(columns.values())
    dense = torch.empty(out, inputs, dtype=torch.float64)
    segments, shuffled = [], torch.randperm(inputs, generator=gen)
    for bits, n in sorted(columns.items()):
        mine, shuffled = shuffled[:n], shuffled[n:]
        codes = torch.randint(0, 2**bits, (out, n), dtype=torch.uint8, generator=gen)
        levels = torch.randn(n, 2**bits, generator=gen).sort(1).values.half()
        for k, channel in enumerate(mine):
            dense[:, channel] = levels[k].to(dtype).double()[codes[:, k].long()]
        segments.append(Segment(bits, mine.int(), pack(codes, bits).T.contiguous(), levels))
    chosen = torch.rand(out, inputs, generator=gen) < rate
    values = torch.randn(int(chosen.sum()), generator=gen).half() * 4
    dense[chosen] = values.to(dtype).double()
    starts = torch.cat([torch.zeros(1), chosen.sum(1).cumsum(0)]).int()
    sparse = Sparse(starts, chosen.nonzero()[:, 1].int(), values) if rate else None
    return PackedColumns((out, inputs), tuple(segments), sparse, dtype), dense


def assert_product(y, x, dense):
    """Within what float32 sums of this many products, and one rounding to x's dtype, can be off.

    An outlier is added as its difference to a level, so it is as exact as that level, however small
    it is: 4 bounds those.
    """
    expected, size = x.double() @ dense.T, x.double().abs() @ dense.abs().clamp(min=4).T
    allowed = 2**-23 * (8 + dense.shape[1]) * size + torch.finfo(x.dtype).eps * expected.abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= allowed).all()), float(
        ((y.double() - expected).abs() - allowed).max()
    )


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=120, deadline=None)
@given(
    out=st.sampled_from([1, 7, 33, 160, 300]),
    columns=st.dictionaries(
        st.integers(1, 8), st.sampled_from([1, 5, 31, 100]), min_size=1, max_size=3
    ),
    rate=st.sampled_from([0.0, 0.05]),
    tokens=st.sampled_from([0, 1, 2, 5, 7, 40]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_product_is_that_of_the_weight(
    backend, out, columns, rate, tokens, dtype, stored, seed
):
    packed, dense = made(out, columns, rate, stored, seed)
    kernels.check(packed)
    x = torch.randn(tokens, dense.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_product(kernels.linear(x, packed, backend), x, dense)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_with_and_without_whole_words(backend, bits):
    for n in (1, 32, 33, 63):
        packed, dense = made(50, {bits: n}, 0.05, seed=bits)
        x = torch.randn(3, n)
        assert_product(kernels.linear(x, packed, backend), x, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_weights_are_exact(dtype):
    packed, dense = made(33, {1: 5, 2: 31, 3: 40, 7: 9}, 0.1, dtype)
    assert torch.equal(kernels.decode(packed).double(), dense)
    assert torch.equal(kernels.decode(packed, slice(5, 9)).double(), dense[5:9])
    assert kernels.decode(packed, slice(9, 9)).shape == (0, 85)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_rounded_once(dtype):
    packed, _ = made(33, {1: 5, 3: 40}, 0.1, dtype)
    assert [t.dtype for t in (*packed.rounded, packed.kept)] == [dtype] * 3
    assert packed.rounded is packed.rounded and packed.kept is packed.kept
    for segment, levels in zip(packed.segments, packed.rounded, strict=True):
        assert torch.equal(levels, segment.levels.to(dtype))
    assert torch.equal(packed.kept, packed.sparse.values.to(dtype))
    assert made(33, {1: 5}, 0.0, dtype)[0].kept is None


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
@pytest.mark.parametrize("tokens", [1, 6, 50])
def test_threads_do_not_change_the_result(tokens):
    packed, _ = made(700, {2: 90, 4: 38}, 0.02)
    x, before = torch.randn(tokens, 128), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 8, 1):
            torch.set_num_threads(threads)
            results.append(kernels.linear(x, packed, "cpu"))
    finally:
        torch.set_num_threads(before)
    # a matrix product of decoded tiles is torch's own, which may split its sums by threads
    assert all(
        torch.equal(r, results[0]) if tokens < 50 else torch.allclose(r, results[0], atol=1e-4)
        for r in results
    )
    assert torch.equal(results[0], results[-1])


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
def test_many_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "_TILE", 1000)
    packed, dense = made(300, {2: 31, 3: 40}, 0.05)
    x = torch.randn(64, 71)
    assert_product(kernels.linear(x, packed, "cpu"), x, dense)
    monkeypatch.setattr(
        reference, "tiles", lambda p, w=0: (slice(i, min(i + 7, 300)) for i in range(0, 300, 7))
    )
    assert_product(kernels.linear(x, packed, "reference"), x, dense)


@pytest.mark.skipif(not COMPILED or platform.machine() != "x86_64", reason="no C compiler for x86")
@pytest.mark.parametrize(
    "flags",
    [("-march=x86-64",), ("-mavx2", "-mfma"), ("-mavx512f",)],
    ids=["scalar", "avx2", "avx512"],
)
def test_the_code_for_other_processors(tmp_path, flags):
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if any(
        flag.startswith("-ma") and flag[2:] in ("avx2", "avx512f") and flag[2:] not in known
        for flag in flags
    ):
        pytest.skip("this processor cannot run it")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    subprocess.run(
        [
            compiler,
            "-O2",
            *flags,
            "-shared",
            "-fPIC",
            "-std=c11",
            str(cpu._SOURCE),
            "-o",
            str(tmp_path / "c.so"),
        ],
        check=True,
    )
    code = ctypes.CDLL(str(tmp_path / "c.so"))
    for columns in ({1: 70, 2: 33, 3: 40}, {4: 31, 5: 33, 6: 20}, {7: 34, 8: 5}):
        packed, dense = made(300, columns, 0.05)
        for tokens in (1, 2, 5, 40):
            x = torch.randn(tokens, dense.shape[1])
            assert_product(cpu.product(x, packed, code), x, dense)


def test_leading_dimensions_and_strides():
    packed, dense = made(33, {2: 20, 4: 11}, 0.05)
    x = torch.randn(2, 62, 3).transpose(1, 2)[..., ::2]
    assert kernels.linear(x, packed).shape == (2, 3, 33)
    assert_product(kernels.linear(x, packed).view(6, 33), x.reshape(6, 31), dense)
    assert kernels.linear(x[0, 0], packed).shape == (33,)


@pytest.mark.parametrize("backend", HERE)
def test_a_gradient_flows_to_the_input(backend):
    packed, dense = made(33, {2: 20, 4: 11}, 0.05)
    x = torch.randn(2, 3, 31, requires_grad=True)
    towards = torch.randn(2, 3, 33)
    (grad,) = torch.autograd.grad(kernels.linear(x, packed, backend), x, towards)
    torch.testing.assert_close(grad, (towards.double() @ dense).float())
    with torch.no_grad():
        assert not kernels.linear(x, packed, backend).requires_grad


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setenv("LOWBIT_NO_COMPILER", "1")
    compiled.library.cache_clear()
    try:
        packed, _ = made(33, {2: 31}, 0.05)
        x = torch.randn(2, 31)
        assert torch.equal(kernels.linear(x, packed), kernels.linear(x, packed, "reference"))
        with pytest.raises(LowbitError, match="no C compiler.*Install gcc"):
            kernels.linear(x, packed, "cpu")
    finally:
        compiled.library.cache_clear()


def test_what_does_not_fit_is_refused():
    packed, _ = made(7, {2: 5})
    for x, message in (
        (torch.randn(2, 6), r"7 x 5 cannot be multiplied by \(2, 6\)"),
        (torch.randn(2, 5).double(), "not torch.float64"),
        (torch.randn(2, 5, device="meta"), "lies on cpu, its input on meta"),
    ):
        with pytest.raises(LowbitError, match=message):
            kernels.linear(x, packed)
    with pytest.raises(LowbitError, match="unknown backend 'cpus': did you mean 'cpu'"):
        kernels.linear(torch.randn(2, 5), packed, "cpus")
    with pytest.raises(LowbitError, match="'triton' needs the package|it needs CUDA"):
        kernels.linear(torch.randn(2, 5), packed, "triton")


def changed(packed, part, field, edit):
    """The same weight with one field edited, in place on a copy or to another value."""

    def edited(owner):
        value = getattr(owner, field)
        value = value.clone() if isinstance(value, torch.Tensor) else value
        result = edit(value)
        return replace(owner, **{field: value if result is None else result})

    if part == "weight":
        return edited(packed)
    if part == "sparse":
        return replace(packed, sparse=edited(packed.sparse))
    return replace(packed, segments=(packed.segments[0], edited(packed.segments[1])))


def put(at, value):
    return lambda t: t.__setitem__(at, value)


DAMAGE = [
    ("weight", "shape", lambda _: (0, 31), "shape is 0 x 31"),
    ("weight", "shape", lambda _: (33, 30), "not a permutation of the 30 inputs"),
    ("weight", "shape", lambda _: (32, 31), "2-bit codes are"),
    ("weight", "dtype", lambda _: torch.float64, "dtype is torch.float64"),
    ("weight", "segments", lambda s: s[::-1], r"widths \[4, 2\]"),
    ("weight", "segments", lambda s: (), r"widths \[\]"),
    ("weight", "segments", lambda s: s[:1], "not a permutation"),
    ("segment", "bits", lambda _: 9, "columns of 9 bits"),
    ("segment", "bits", lambda _: 3, "3-bit levels are"),
    ("segment", "columns", lambda t: t.long(), "4-bit columns are .* torch.int64"),
    ("segment", "columns", lambda t: t[:0], "0 columns of 4 bits"),
    ("segment", "columns", put(0, 31), "not a permutation"),
    ("segment", "columns", put(0, -1), "not a permutation"),
    ("segment", "columns", lambda t: t.__setitem__(0, int(t[1])), "not a permutation"),
    ("segment", "codes", lambda t: t[:-1], "4-bit codes are"),
    ("segment", "codes", lambda t: t.float(), "4-bit codes are .* torch.float32"),
    ("segment", "codes", lambda t: t.T.contiguous().T, "not contiguous"),
    ("segment", "levels", lambda t: t.float(), "4-bit levels are .* torch.float32"),
    ("segment", "levels", lambda t: t[:, :8].contiguous(), "4-bit levels are"),
    ("segment", "levels", lambda t: t.flip(1), "not finite and ascending"),
    ("segment", "levels", put((0, 0), float("nan")), "not finite and ascending"),
    ("sparse", "starts", put(0, 1), "do not rise from 0"),
    ("sparse", "starts", lambda t: t.__setitem__(-1, int(t[-1]) + 1), "do not rise from 0"),
    ("sparse", "starts", put(3, -5), "do not rise from 0"),
    ("sparse", "starts", lambda t: t[:-1], "row starts of its outliers are"),
    ("sparse", "columns", put(0, 31), "not one of the 31 inputs"),
    ("sparse", "columns", put(0, -1), "not one of the 31 inputs"),
    ("sparse", "columns", lambda t: t.__setitem__(1, int(t[0])), "do not ascend within a row"),
    ("sparse", "columns", lambda t: t.long(), "columns of its outliers are"),
    ("sparse", "values", lambda t: t[:-1], "values of its outliers are"),
    ("sparse", "values", put(0, float("inf")), "outliers are not finite"),
]


@pytest.mark.parametrize("part, field, edit, message", DAMAGE)
def test_check_names_the_damage(part, field, edit, message):
    packed, _ = made(33, {2: 20, 4: 11}, 0.2)
    kernels.check(packed)
    with pytest.raises(LowbitError, match=message):
        kernels.check(changed(packed, part, field, edit))


def test_check_accepts_a_weight_whose_outliers_are_none():
    packed, dense = made(33, {2: 20, 4: 11})
    none = Sparse(
        torch.zeros(34, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, dtype=torch.float16),
    )
    kernels.check(replace(packed, sparse=none))
    x = torch.randn(2, 31)
    assert_product(kernels.linear(x, replace(packed, sparse=none)), x, dense)


TRITON_CASES = [  # out, columns, rate, tokens, x's dtype, the weight's
    (33, {2: 20, 4: 11}, 0.1, 1, torch.float32, torch.float16),
    (130, {2: 80, 3: 15, 8: 5}, 0.1, 5, torch.bfloat16, torch.bfloat16),
    (7, {1: 40, 5: 12, 6: 4, 7: 8}, 0.1, 17, torch.float16, torch.float16),
    (300, {3: 100}, 0.0, 2, torch.float16, torch.bfloat16),
    (140, {2: 300}, 0.02, 1, torch.float16, torch.float16),
    (1, {2: 1}, 0.0, 1, torch.float32, torch.bfloat16),
    (20, {4: 9}, 0.2, 70, torch.float32, torch.float32),
]


def check_triton(device):
    for out, columns, rate, tokens, dtype, stored in TRITON_CASES:
        packed, dense = made(out, columns, rate, stored)
        x = torch.randn(tokens, dense.shape[1], generator=torch.Generator().manual_seed(0)).to(
            dtype
        )
        there = on(packed, device)
        y = kernels.linear(x.to(device), there, "triton")
        assert_product(y.cpu(), x, dense)
        assert torch.equal(y, kernels.linear(x.to(device), there, "triton"))


def on(packed, device):
    def moved(owner):
        return replace(
            owner,
            **{k: v.to(device) for k, v in vars(owner).items() if isinstance(v, torch.Tensor)},
        )

    return replace(
        packed,
        segments=tuple(map(moved, packed.segments)),
        sparse=packed.sparse and moved(packed.sparse),
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_its_interpreter():
    # Read when triton is imported.
    env = dict(
        os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(p for p in sys.path if p)
    )
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="no CUDA with triton",
)
def test_triton_kernels_on_the_gpu():
    check_triton("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_on_the_gpu(dtype):
    packed, dense = made(33, {2: 20, 4: 11}, 0.05, torch.float16)
    x = torch.randn(5, 31).to(dtype)
    assert_product(kernels.linear(x.cuda(), on(packed, "cuda"), "reference").cpu(), x, dense)


if __name__ == "__main__":
    check_triton("cpu")
