"""Copies between the device and page-locked memory: how fast, and how much of them the work hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._soft import SoftBlock
from lowbit.model.storage import Place, Storage

from .bench import Bench, tried
from .steps import descended, stepping


def copies(b: Bench, out: dict[str, Any]) -> None:
    """Rates of copies; and passes and steps with streams in host memory beside those with streams
    on the device.
    """
    if b.cuda:
        out["GBps"] = tried(lambda: rates(b))
    losses: dict[Place, list[float]] = {}
    out["losses"] = losses
    places: tuple[Place, ...] = ("device", "host")
    for place in places:
        block = b.block(32, place)
        to = Storage(place, b.device).empty(block.x.shape, block.x.dtype)
        job, soft = Reconstruction(block, b.batch[0]), SoftBlock(block)
        soft.start()
        out[f"streams in {place} memory, ms"] = {
            "pass of 32 rows": b.times(
                lambda block=block, to=to: block.run(block.xq, out=to), 3, 1
            ),
            "step": b.times(stepping(job, soft)),
        }
        losses[place] = descended(block, b, 4)[0]


def rates(b: Bench) -> dict[str, float]:
    """Of copies alone, and of products and copies at the same time, which are to take as long as
    the longer of the two.
    """
    size = 1 << 28
    near = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    far = torch.empty(size, dtype=torch.uint8, device=b.device)
    x = torch.randn(8192, 8192, device=b.device, dtype=torch.bfloat16)
    side = torch.Stream(device=b.device)

    def beside(copy: Callable[[], object]) -> None:
        side.wait_stream(torch.accelerator.current_stream(b.device))
        with side:
            copy()
        for _ in range(4):
            x @ x
        torch.accelerator.current_stream(b.device).wait_stream(side)

    out = {"products alone, ms": b.times(lambda: [x @ x for _ in range(4)])["mean"]}
    kinds = {
        "to the device": lambda: far.copy_(near, non_blocking=True),
        "from the device": lambda: near.copy_(far, non_blocking=True),
    }
    for name, copy in kinds.items():
        out[name] = size / b.times(copy)["mean"] / 1e6
        out[f"{name}, beside products, ms"] = b.times(lambda copy=copy: beside(copy))["mean"]
    return out
