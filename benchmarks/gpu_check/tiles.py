"""The two kernels of soft rounding by what a program holds: whether `_rounding.gpu` holds what is
best.
"""

from __future__ import annotations

from typing import Any

import torch

from lowbit.methods._rounding import FROZEN
from lowbit.methods._rounding._adam import BETAS, EPSILON

from .agreement import soft
from .bench import Bench

TRIED = {
    128: ((512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 16), (4096, 8)),
    4096: ((512, 4), (1024, 8), (2048, 4), (2048, 16)),
}


def tiles(b: Bench, out: dict[str, Any]) -> None:
    """Rates by length of a row, weights that a program holds, and its warps."""
    if not b.cuda:
        out["left out"] = "no CUDA"
        return
    for length, shapes in TRIED.items():
        for tile, warps in shapes:
            found = tiled(b, length, tile, warps)
            out[f"{length}: {tile} weights, {warps} warps"] = found


def tiled(b: Bench, length: int, tile: int, warps: int) -> dict[str, float]:
    from lowbit.methods._rounding import gpu

    (nu, code, way, zero, scale, _), g = soft(
        b.pick(1 << 13, 1 << 27) // length, length, b.device, 0.0
    )
    frozen = torch.where(torch.rand_like(nu) < 0.95, FROZEN, nu)  # most weights of most phases
    g = g.bfloat16()
    made, first, second = torch.empty_like(g), torch.zeros_like(nu), torch.zeros_like(nu)
    sums = torch.empty(len(nu), 2, device=b.device)
    held = min(length, tile)
    shape = {"ROWS": max(1, tile // held), "COLUMNS": held, "num_warps": warps}
    adam = {"BETA1": BETAS[0], "BETA2": BETAS[1], "EPS": EPSILON, "FAR": FROZEN}
    grid = (-(-len(nu) // shape["ROWS"]),)
    rest = (code, way, zero, scale)

    def weights() -> None:
        gpu._weights[grid](nu, *rest, zero, made, *nu.shape, SHIFTED=False, **shape)

    def descend(nu: torch.Tensor) -> None:
        of_step = (first, second, sums, *nu.shape, 1e-3, 1.0)
        gpu._descend[grid](g, nu, *rest, *of_step, **adam, **shape)

    return {
        "weights_GBps": 8 * nu.numel() / b.times(weights)["mean"] / 1e6,
        "descend_GBps": 28 * nu.numel() / b.times(lambda: descend(nu))["mean"] / 1e6,
        "descend, ms": b.times(lambda: descend(nu))["mean"],
        "descend with 95 % frozen, ms": b.times(lambda: descend(frozen))["mean"],
    }
