"""Milliseconds a column of the loops that go column by column, with and without their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.grid import Affine, Codebook, kmeans
from lowbit.methods import GPTQ, _columns
from lowbit.methods._coder import GridColumns
from lowbit.methods._columns import code_columns

from .bench import Bench, put, tried

Coder = Callable[[Tensor], GridColumns]


def columns(b: Bench, out: dict[str, Any]) -> None:
    """By loop, as it runs here and in plain torch; and GPTQ on a whole block."""
    for name, count, coder in loops(b):
        w = torch.randn(b.pick(64, 4096), count, device=b.device)
        factor = torch.eye(count, device=b.device)

        def work(w: Tensor = w, factor: Tensor = factor, coder: Coder = coder) -> Tensor:
            return code_columns(w, factor, coder(w), 128)

        own = b.times(work, 3, 1)["single"] / count
        with put(_columns, "_compiled", lambda *_: None), put(kmeans, "kernels", lambda *_: None):
            plain = b.times(work, 2, 1)["single"] / count
        out[name] = {"ms": own, "plain torch, ms": plain}
    block = b.block(b.pick(4, 16))
    out["gptq, ms a block"] = tried(lambda: b.times(lambda: GPTQ()(block), 1, 1))


def loops(b: Bench) -> list[tuple[str, int, Coder]]:
    """Name, how many columns, and what codes them."""
    affine, stored = Affine(3, b.pick(16, 128)), torch.bfloat16
    wide, narrow = b.pick(32, 512), b.pick(4, 48)

    def given(w: Tensor) -> GridColumns:
        order = torch.arange(w.shape[1], device=w.device)
        return GridColumns(affine, order, stored, affine.stored(affine.fit(w), stored))

    def fitted(w: Tensor) -> GridColumns:
        order = torch.arange(w.shape[1], device=w.device)
        return GridColumns(
            affine, order, stored, fit=lambda v, _: affine.stored(affine.fit(v), stored)
        )

    def sequential(bits: int) -> Coder:
        grid = Codebook(bits)

        def made(w: Tensor) -> GridColumns:
            order = torch.arange(w.shape[1], device=w.device)
            return GridColumns(
                grid, order, stored, fit=lambda v, _: grid.stored(grid.fit(v), stored)
            )

        return made

    def refined(w: Tensor) -> GridColumns:
        grid = Codebook(2)
        order = torch.arange(w.shape[1], device=w.device)
        table = grid.fit_columns(w, torch.full((w.shape[1],), 2, device=w.device))

        def fit(v: Tensor, column: int) -> Any:
            return grid.stored(grid.refined(table, column, v, 3), stored)

        return GridColumns(grid, order, stored, fit=fit)

    return [
        ("gptq, ranges given", wide, given),
        ("gptq, ranges fitted on the way", wide, fitted),
        ("claq, sequential, 2 bits", narrow, sequential(2)),
        ("claq, sequential, 4 bits", narrow, sequential(4)),
        ("claq, refined, 2 bits", narrow, refined),
    ]
