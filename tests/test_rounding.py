"""The fused soft rounding: gradients against autograd and finite differences in float64, Adam
against torch's, every version against the plain one.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.grid import sums
from lowbit.grid.openmp import Team, team
from lowbit.grid.sums import _masked, sums_by
from lowbit.methods import _rounding as rounding
from lowbit.methods._rounding import FROZEN, Adam, SoftRows, cpu

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C compiler")


def sample(rows, length, seed=0, dtype=torch.float32, device="cpu"):
    """Variables, codes and what rows have; a fifth of the weights frozen each way, none close to
    where h is clamped.
    """
    g = torch.Generator().manual_seed(seed)
    nu = torch.randn(rows, length, generator=g, dtype=dtype) * 2
    h = 1.2 * torch.sigmoid(nu) - 0.1
    nu[(h.abs() < 1e-4) | ((h - 1).abs() < 1e-4)] = 0.3
    drawn = torch.rand(rows, length, generator=g)
    nu[drawn < 0.2], nu[drawn > 0.8] = -FROZEN, FROZEN
    code = torch.randint(0, 255, (rows, length), generator=g, dtype=torch.uint8)
    way = torch.randint(-1, 2, (rows, length), generator=g, dtype=torch.int8)
    zero = torch.randint(0, 255, (rows, 1), generator=g).to(dtype)
    scale, offset = (
        torch.rand(rows, 1, generator=g, dtype=dtype) + 0.1,
        torch.randn(rows, 1, generator=g, dtype=dtype),
    )
    gradient = torch.randn(rows, length, generator=g, dtype=dtype)
    soft = SoftRows(*(t.to(device) for t in (nu, code, way, zero, scale, offset)))
    return soft, gradient.to(device)


def straight(nu, code, way, zero, scale, offset):
    """The formula, for autograd."""
    h = (1.2 / (1 + (-nu).exp()) - 0.1).clamp(0, 1)
    return (code - zero + way * h) * scale - offset


def test_gradients_match_autograd_and_finite_differences_in_float64():
    soft, gradient = sample(6, 20, dtype=torch.float64)
    nu, code, way, zero, scale, offset = soft
    by_nu, sums = rounding.gradients(gradient, soft)
    leaves = [t.clone().requires_grad_() for t in (nu, scale, offset)]
    (straight(leaves[0], code, way, zero, *leaves[1:]) * gradient).sum().backward()
    torch.testing.assert_close(by_nu, leaves[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums[:, :1], leaves[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(-sums[:, 1:], leaves[2].grad, rtol=1e-12, atol=1e-12)

    def loss(nu, scale, offset):
        at = soft._replace(nu=nu, scale=scale, offset=offset)
        return (rounding.weights(at, torch.empty_like(nu), "reference") * gradient).sum()

    eps = 1e-6
    for variable, found in ((0, by_nu), (1, sums[:, :1]), (2, -sums[:, 1:])):
        for at in [(r, c) for r in range(6) for c in range(found.shape[1])]:
            ends = []
            for sign in (1, -1):
                moved = [nu.clone(), scale.clone(), offset.clone()]
                moved[variable][at] += sign * eps
                ends.append(loss(*moved))
            assert abs(float(ends[0] - ends[1]) / (2 * eps) - float(found[at])) < 1e-6 * (
                1 + abs(float(found[at]))
            )


def test_frozen_weights_are_exact_and_stay():
    soft, gradient = sample(8, 33)
    nu, code, way, zero, scale, _ = soft = soft._replace(offset=None)
    frozen = nu.abs() == FROZEN
    first, second, before = torch.zeros_like(nu), torch.zeros_like(nu), nu.clone()
    out = rounding.weights(soft, torch.empty_like(nu))
    assert torch.equal(out[frozen], ((code - zero + way * (nu > 0)) * scale)[frozen])
    for step in range(1, 4):
        rounding.descend(gradient, soft, first, second, Adam(0.1, step))
    assert torch.equal(nu[frozen], before[frozen])
    assert not bool((nu[~frozen & (way != 0)] == before[~frozen & (way != 0)]).all())


def test_adam_is_torchs():
    g = torch.Generator().manual_seed(1)
    ours = torch.randn(50, generator=g, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.Adam([theirs], lr=3e-2)
    first, second, adam = torch.zeros_like(ours), torch.zeros_like(ours), Adam(3e-2)
    for _ in range(20):
        theirs.grad = torch.randn(50, generator=g, dtype=torch.float64)
        optimizer.step()
        adam = adam.next()
        rounding.moved(ours, theirs.grad, first, second, adam)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


def assert_like_the_plain_one(backend, rows, length, dtype, seed=0, device="cpu"):
    """Weights and three steps of Adam."""
    soft, gradient = sample(rows, length, seed, device=device)
    soft = soft._replace(scale=soft.scale / 255)
    out = [torch.empty(rows, length, dtype=dtype, device=device) for _ in range(2)]
    for shift in (None, soft.offset):
        for to, b in zip(out, ("reference", backend), strict=True):
            rounding.weights(soft._replace(offset=shift), to, b)
        torch.testing.assert_close(
            out[1], out[0], rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6
        )
    gradient = gradient.to(dtype)
    found = []
    for b in ("reference", backend):
        own = soft._replace(nu=soft.nu.clone())
        first, second = torch.zeros_like(own.nu), torch.zeros_like(own.nu)
        for step in range(1, 4):
            sums = rounding.descend(gradient, own, first, second, Adam(1e-3, step), b)
        found.append((own.nu, first, second, sums))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))


def assert_hardens_like_the_plain_one(backend, rows, length, device="cpu"):
    """Phase by phase, until most weights are frozen."""
    nu = sample(rows, length, rows, device=device)[0].nu
    nu[0, : length // 2] = 5.0  # clamped: as far from the middle as a frozen weight
    nu[-1, : length // 3] = 0.25  # ties stay soft
    found = [nu.clone(), nu.clone()]
    # None of them a rank: there the plain version may lose the weight at the rank to rounding.
    for share in (0.95, 0.6, 0.3, 0.1):
        for variables, b in zip(found, ("reference", backend), strict=True):
            rounding.harden(variables, share, b)
        assert torch.equal(*found), (rows, length, share)


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_hardening_keeps_the_share_nearest_to_the_middle(backend):
    nu = torch.tensor([[-3.0, 0.5, -0.1, FROZEN, 1.0], [0.2, 0.2, -0.1, 0.2, 9.0]])
    rounding.harden(nu, 0.5, backend)
    expected = [[-FROZEN, 0.5, -0.1, FROZEN, 1.0], [0.2, 0.2, -0.1, 0.2, FROZEN]]
    assert torch.equal(nu, torch.tensor(expected))


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 2100),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_compiled_c(rows, length, dtype, seed):
    assert_like_the_plain_one("c", rows, length, dtype, seed)


@needs_compiler
@pytest.mark.parametrize("shared", [True, False])
def test_compiled_c_does_not_depend_on_threads(shared, monkeypatch):
    if not shared:
        monkeypatch.setattr(cpu, "team", Team)
    elif not team().parallel:
        pytest.skip("torch runs on no OpenMP here")
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            soft, gradient = sample(701, 128)
            first, second = torch.zeros_like(soft.nu), torch.zeros_like(soft.nu)
            plain = soft._replace(offset=None)
            out = rounding.weights(plain, torch.empty_like(soft.nu), "c")
            sums = rounding.descend(gradient, plain, first, second, Adam(0.1, 1), "c")
            found.append((out, sums, soft.nu, first, second))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_compiler
def test_compiled_c_rounds_to_bfloat16_as_torch_does():
    soft = sample(64, 128)[0]._replace(offset=None)
    wide = rounding.weights(soft, torch.empty_like(soft.nu), "c")
    half = rounding.weights(soft, torch.empty_like(soft.nu, dtype=torch.bfloat16), "c")
    assert torch.equal(half, wide.bfloat16())
    soft.nu[0, 0] = float("nan")
    assert rounding.weights(soft, half, "c")[0, 0].isnan() or soft.way[0, 0] == 0


def test_the_version_can_be_named(monkeypatch):
    nu = torch.zeros(2, 4)
    monkeypatch.setenv("LOWBIT_ROUNDING", "inductor")
    assert rounding._fastest(nu, nu) == "inductor"
    monkeypatch.setenv("LOWBIT_ROUNDING", "tritn")
    with pytest.raises(
        LowbitError,
        match="unknown version of soft rounding in LOWBIT_ROUNDING 'tritn': did you mean 'triton'",
    ):
        rounding._fastest(nu, nu)
    monkeypatch.setenv("LOWBIT_ROUNDING", "triton")
    with pytest.raises(LowbitError, match="LOWBIT_ROUNDING=triton does not work here, on cpu"):
        rounding._fastest(nu, nu)


@pytest.mark.parametrize("at_once", [0, 1 << 22])
@pytest.mark.parametrize("rows, length, count", [(1, 1, 1), (7, 300, 4), (3, 1000, 16)])
def test_sums_by_index_in_either_way(rows, length, count, at_once, monkeypatch):
    monkeypatch.setattr(sums, "_AT_ONCE", at_once)
    index, values = (
        torch.randint(0, count, (rows, length)),
        torch.randn(rows, length, dtype=torch.float64),
    )
    scattered = sums_by(index, values, count)
    torch.testing.assert_close(_masked(index, values, count), scattered)
    assert scattered.shape == (rows, count)


@needs_compiler
def test_torch_compile():
    assert_like_the_plain_one("inductor", 24, 64, torch.float32)
    # Another shape, not compiled again.
    assert_like_the_plain_one("inductor", 9, 32, torch.float32, 1)


HARDENED = [(1, 2), (1, 9000), (3, 2048), (2, 5001), (20, 7)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_in_its_interpreter():
    # Read when triton is imported.
    env = dict(
        os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(p for p in sys.path if p)
    )
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="no CUDA with triton",
)
def test_triton_on_the_gpu():
    for dtype in (torch.float32, torch.bfloat16):
        for rows, length in ((1, 1), (37, 64), (1000, 128), (5, 4100)):
            assert_like_the_plain_one("triton", rows, length, dtype, device="cuda")
    for rows, length in (*HARDENED, (300, 7)):  # which takes the interpreter half a minute
        assert_hardens_like_the_plain_one("triton", rows, length, "cuda")


if __name__ == "__main__":
    for shape in ((1, 1), (5, 64), (70, 32), (3, 2100), (9, 35)):
        assert_like_the_plain_one("triton", *shape, torch.float32)
    for shape in HARDENED:
        assert_hardens_like_the_plain_one("triton", *shape)
