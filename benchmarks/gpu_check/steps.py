"""A step of progressive adaptive rounding: its parts, its ratio to a plain training step, hardening,
and whether two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.methods import _rounding
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._rounding import Adam
from lowbit.methods._soft import SoftBlock
from lowbit.model.block import Block

from .bench import GIB, Bench, tried

DECAY = 1e-4
SLOWEST = 24  # kernels


def step(b: Bench, out: dict[str, Any]) -> None:
    """Part by part, beside a training step of the same block with torch's fused Adam."""
    block = b.block()
    job, soft = Reconstruction(block, b.batch[0]), SoftBlock(block)
    weights = sum(block.weights[k].numel() for k in soft.keys)
    plain = {k: v.to(block.compute) for k, v in block.weights.items()}
    trained = [plain[k].clone().requires_grad_() for k in soft.keys]
    optimizer = torch.optim.Adam(trained, lr=1e-9, fused=True)

    def passes() -> None:
        _, found = job.gradients(plain, soft.keys, job.draw())
        for p, g in zip(trained, found, strict=True):
            p.grad = g

    def training() -> None:
        passes()
        optimizer.step()

    rounding = stepping(job, soft)
    soft.start()
    ms: dict[str, Any] = {}
    out |= {
        "weights": weights,
        "tokens": b.batch[0] * b.batch[1],
        "version": _rounding.version_on(b.device),
        "ms": ms,
    }
    for name, work in (
        ("passes", passes),
        ("training step", training),
        ("rounding step", rounding),
    ):
        ms[name] = b.times(work)
    out["rounding / training"] = ms["rounding step"]["mean"] / ms["training step"]["mean"]
    with torch.no_grad():
        ms["soft weights"], now = b.times(soft.weights), soft.weights()
    _, found = job.gradients(now, soft.keys, job.draw())
    ms["descend"] = b.times(lambda: soft.descend(found, Adam(1e-3, 1), DECAY))
    out["descend_GBps"] = 28 * weights / ms["descend"]["mean"] / 1e6
    out["soft weights_GBps"] = 8 * weights / ms["soft weights"]["mean"] / 1e6
    ms["snapshot"] = b.times(soft.snapshot)
    ms["hard weights"] = b.times(soft.hard_weights, 3, 1)
    ms["judging"] = b.times(lambda: job.loss(plain), 3, 1)
    if b.cuda:
        out["peak_GiB"] = torch.cuda.max_memory_allocated() / GIB
        out["slowest kernels, ms a step"] = tried(lambda: slowest(rounding))


def stepping(job: Reconstruction, soft: SoftBlock) -> Callable[[], Tensor]:
    """Makes one step after the other."""
    adam = Adam(2e-2)

    def rounding() -> Tensor:
        nonlocal adam
        adam = adam.next()
        with torch.no_grad():
            w = soft.weights()
        loss, found = job.gradients(w, soft.keys, job.draw())
        soft.descend(found, adam, DECAY)
        return loss

    return rounding


def slowest(work: Callable[[], object], steps: int = 3) -> list[tuple[str, float]]:
    """Names and milliseconds a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
    found = sorted(run.key_averages(), key=lambda e: -e.self_device_time_total)[:SLOWEST]
    return [(e.key[:90], e.self_device_time_total / 1e3 / steps) for e in found]


def hardening(b: Bench, out: dict[str, Any]) -> None:
    """Milliseconds of a phase's hardening while ever more weights are frozen, and of plain torch on
    the block's largest linear alone.
    """
    soft = SoftBlock(b.block(4))
    largest = max(soft.places.values(), key=lambda p: p.shape.numel())
    for share in (0.95, 0.5, 0.1, 0.01):
        soft.harden(share)
        nu = soft.buckets[largest.bucket].nu[largest.rows].view(1, -1)
        versions = {
            version: b.times(lambda v=version, n=nu, s=share: _rounding.harden(n, s, v), 3, 1)
            for version in {"reference", _rounding.version_on(b.device)}
        }
        whole = b.times(lambda s=share: soft.harden(s), 3, 1)
        out[str(share)] = {"all linears, ms": whole, "largest linear, ms": versions}


def repeats(b: Bench, out: dict[str, Any]) -> None:
    """Whether the same steps give the same bits, as torch runs them and with its deterministic
    algorithms where it has some.
    """
    block = b.block()
    for name, asked in (("as they run", False), ("deterministic algorithms", True)):
        torch.use_deterministic_algorithms(asked, warn_only=True)
        try:
            (one, nu), (two, again) = (descended(block, b, 12) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        out[name] = {
            "same bits": torch.equal(nu, again),
            "signs that differ": float((nu.sign() != again.sign()).double().mean()),
            "losses": (one[-1], two[-1]),
        }


def descended(block: Block, b: Bench, count: int) -> tuple[list[float], Tensor]:
    """Losses of some steps from the start, and a bucket's variables after them."""
    job, soft = Reconstruction(block, b.batch[0]), SoftBlock(block)
    soft.start()
    rounding = stepping(job, soft)
    losses = [rounding() for _ in range(count)]
    return torch.stack(losses).tolist(), soft.buckets[0].nu
