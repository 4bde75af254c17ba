"""Triton kernels of the column loops, of K-means and of sums by index, in Triton's interpreter, against plain torch."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from lowbit.grid import Affine, kmeans, sums
from lowbit.methods import _columns
from lowbit.methods._coder import GridColumns
from lowbit.methods._columns import code_columns, inverse_factor

TRITON = importlib.util.find_spec("triton") is not None
GPU = torch.cuda.is_available() and TRITON


def problem(rows, columns, seed=0):
    """A weight and the factor of correlated inputs, float32."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x = torch.randn(2 * columns, columns, generator=g, dtype=torch.float64) @ mixed
    hessian = x.T @ x
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    return torch.randn(rows, columns, generator=g), inverse_factor(hessian).float()


# rows, columns, grid, dtype of the model, params given, columns at a time
COLUMNS = [
    (40, 150, Affine(3), torch.bfloat16, True, 128),
    (1, 16, Affine(2, 8), torch.float32, True, 16),
    (33, 96, Affine(4, 32), torch.float16, False, 128),
    (17, 64, Affine(8, 32, symmetric=True), torch.bfloat16, False, 8),
    (20, 300, Affine(2, 100), torch.bfloat16, True, 4096),
    (5, 3, Affine(2), torch.float32, False, 1),
]


def assert_columns_are_coded_as_in_torch(
    rows, columns, grid, stored, given, block_size, device="cpu"
):
    w, factor = (t.to(device) for t in problem(rows, columns))
    order = torch.arange(columns, device=device)
    found = []
    for compiled in (None, with_triton()):
        _columns._compiled = lambda *_, found=compiled: found
        kept = dict(params=grid.stored(grid.fit(w), stored)) if given else {}
        fit = {} if given else dict(fit=lambda ahead, _: grid.stored(grid.fit(ahead), stored))
        coder = GridColumns(grid, order, stored, **kept, **fit)
        codes = code_columns(w, factor, coder, block_size)
        found.append((codes, coder.params()))
    (plain, params), (ours, own) = found
    assert torch.equal(plain, ours)
    torch.testing.assert_close(own.scale, params.scale)


# lists, numbers of each, levels, weighted
LISTS = [
    (3, 1, 2, False),
    (2, 40, 4, False),
    (2, 700, 4, True),
    (1, 2100, 16, False),
    (2, 9, 1, True),
]


def assert_clusters_are_those_of_torch(lists, n, levels, weighted, device="cpu"):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(lists, n, generator=g)
    x[-1] = (2 * x[-1]).round()  # no more different numbers than levels, in most cases
    w = torch.rand(lists, n, generator=g) + 0.1 if weighted else None
    found = []
    for module in (None, kmeans_kernels()):
        kmeans.kernels = lambda *_, module=module: module
        there = None if w is None else w.to(device)
        found.append(kmeans._batched(x.to(device), levels, there, False))
    (plain, error), (ours, own) = found
    torch.testing.assert_close(own, error, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


# rows, numbers of each, sums, dtype of the numbers and of the index
SUMS = [
    (1, 1, 1, torch.float32, torch.int64),
    (3, 1000, 4, torch.float32, torch.uint8),
    (2, 5000, 16, torch.float64, torch.int64),
    (2, 300, 200, torch.float32, torch.uint8),
]


def assert_sums_are_those_of_torch(rows, n, count, dtype, index_dtype, device="cpu"):
    from lowbit.grid import sums_gpu

    g = torch.Generator().manual_seed(n)
    index = torch.randint(0, count, (rows, n), generator=g)
    values = torch.randn(rows, n, generator=g, dtype=dtype)
    expected = sums.sums_by(index, values, count)
    found = sums_gpu.sums_by(index.to(device, index_dtype), values.to(device), count)
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def kmeans_kernels():
    from lowbit.grid import kmeans_gpu

    return kmeans_gpu


def with_triton():
    from lowbit.methods import _columns_gpu

    return _columns_gpu.code_uniform, _columns_gpu.MOST


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_in_the_interpreter():
    # Read when triton is imported.
    path = os.pathsep.join(p for p in sys.path if p)
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=path)
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not GPU, reason="no CUDA with triton")
@pytest.mark.parametrize("case", COLUMNS)
def test_columns_on_the_gpu(case, monkeypatch):
    monkeypatch.setattr(_columns, "_compiled", None)  # put back afterwards
    assert_columns_are_coded_as_in_torch(*case, "cuda")


@pytest.mark.skipif(not GPU, reason="no CUDA with triton")
@pytest.mark.parametrize("case", LISTS)
def test_clusters_on_the_gpu(case, monkeypatch):
    monkeypatch.setattr(kmeans, "kernels", None)  # put back afterwards
    assert_clusters_are_those_of_torch(*case, "cuda")


@pytest.mark.skipif(not GPU, reason="no CUDA with triton")
@pytest.mark.parametrize("case", SUMS)
def test_sums_on_the_gpu(case):
    assert_sums_are_those_of_torch(*case, "cuda")


if __name__ == "__main__":
    for case in COLUMNS:
        assert_columns_are_coded_as_in_torch(*case)
    for case in LISTS:
        assert_clusters_are_those_of_torch(*case)
    for case in SUMS:
        assert_sums_are_those_of_torch(*case)
