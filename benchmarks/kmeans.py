"""K-means of all columns of a matrix against scikit-learn column by column and against sorting the
matrix once; growth with size; and the column loop on codebooks against GPTQ's. Usage: python
benchmarks/kmeans.py OUT.json [SIZE]
"""

import json
import sys
import time
import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch.distributions import StudentT

from lowbit.grid import Affine, Codebook
from lowbit.grid.kmeans import kmeans
from lowbit.methods import CLAQ
from lowbit.methods._coder import GridColumns
from lowbit.methods._columns import code_columns, inverse_factor
from lowbit.methods._hessian import Inputs
from lowbit.methods.gptq import solve

_SAMPLED = 64  # columns that scikit-learn is timed on


def best(action, runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def clustering(size: int) -> list[dict]:
    rows = []
    x = StudentT(5.0).sample((size, size))  # one list per column
    order = best(lambda: np.sort(x.numpy(), axis=1))
    for k in (4, 8, 16):
        _, fast_sse = kmeans(x[:_SAMPLED], k)
        _, exact_sse = kmeans(x[:_SAMPLED], k, exact=True)
        theirs = [KMeans(k, n_init="auto", random_state=10) for _ in range(_SAMPLED)]
        theirs[0].fit(x[0].numpy()[:, None])
        sklearn = (
            best(
                lambda t=theirs: [m.fit(c[:, None]) for m, c in zip(t, x.numpy(), strict=False)], 1
            )
            * size
            / _SAMPLED
        )
        inertia = np.array([m.inertia_ for m in theirs]) / exact_sse.numpy()
        fast, exact = best(lambda k=k: kmeans(x, k)), best(lambda k=k: kmeans(x, k, exact=True), 1)
        rows.append(
            {
                "size": size,
                "levels": k,
                "sort": order,
                "fast": fast,
                "exact": exact,
                "sklearn": sklearn,
                "sklearn_over_fast": sklearn / fast,
                "sklearn_over_exact": sklearn / exact,
                "fast_over_sort": fast / order,
                "fast_sse_worst": float((fast_sse / exact_sse).max()),
                "sklearn_sse_mean": float(inertia.mean()),
                "sklearn_sse_worst": float(inertia.max()),
            }
        )
    return rows


def growth() -> list[dict]:
    rows = []
    for size in (1024, 2048, 4096, 8192):
        x = StudentT(5.0).sample((size, size))
        seconds = best(lambda x=x: kmeans(x, 4))
        rows.append(
            {
                "size": size,
                "levels": 4,
                "fast": seconds,
                "nanoseconds_per_weight": 1e9 * seconds / size**2,
            }
        )
    return rows


def loop(size: int) -> list[dict]:
    x = torch.randn(2 * size, size, dtype=torch.float64)
    factor = inverse_factor(x.T @ x / len(x) + 0.01 * torch.eye(size, dtype=torch.float64)).float()
    w = StudentT(5.0).sample((size, size))
    order = torch.arange(size)
    inputs = Inputs(factor, order, torch.zeros(size, dtype=torch.bool))
    affine = best(lambda: solve(w, inputs, Affine(2), None, torch.bfloat16), 1)
    rows = [{"size": size, "loop": "gptq, one scale per row", "seconds": affine, "over_gptq": 1.0}]
    for levels in ("sequential", "refined", "precomputed"):
        widths = torch.full((size,), 2)

        def code(how: str = levels, b: torch.Tensor = widths) -> torch.Tensor:
            grid = Codebook(2)
            fit = CLAQ(levels=how)._levels(grid, w, b, None, torch.bfloat16)
            return code_columns(w, factor, GridColumns(grid, order, torch.bfloat16, fit=fit), 128)

        seconds = best(code, 1)
        rows.append(
            {
                "size": size,
                "loop": f"claq, {levels}",
                "seconds": seconds,
                "over_gptq": seconds / affine,
            }
        )
    return rows


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    kmeans(torch.randn(2, 8), 2)  # compiled before anything is timed
    out = {
        "threads": torch.get_num_threads(),
        "clustering": clustering(size),
        "growth": growth(),
        "loop": loop(size),
    }
    for part in ("clustering", "growth", "loop"):
        for row in out[part]:
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
            )
    with open(sys.argv[1], "w") as f:
        json.dump(out, f, indent=1)


if __name__ == "__main__":
    main()
