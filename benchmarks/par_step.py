"""One step of progressive adaptive rounding beside a plain training step of the same block, part by
part.

    python benchmarks/par_step.py [OUT.json [DEVICE]]

For every size: a plain forward and backward pass, Adam (torch's fused one) over the same weights,
and a step of rounding with each version of the fused operation that works on the device. Steps of
all kinds take turns; medians of their times and of their ratios. "floor" is what the block's
products alone would take at the rate of a large matrix product on this machine. On a GPU a block of
7B's sizes is added, 4 x 2048 tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import random_llama
from tuning import first_block

from lowbit.grid import Affine
from lowbit.methods import _rounding
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._rounding import Adam
from lowbit.methods._soft import SoftBlock
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

SIZES = [
    (256, 704, 4, 256),
    (256, 704, 4, 64),
    (1024, 2816, 4, 512),
    (1024, 2816, 4, 128),
    (1024, 2816, 1, 128),
]
TURNS = 15


def backends(device: torch.device) -> list[str]:
    return (
        ["reference", "inductor", "triton"]
        if device.type == "cuda"
        else ["reference", "inductor", "c"]
    )


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds times two per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = now(device)
        a @ b
        times.append(now(device) - start)
    return 2.0 * n**3 / statistics.median(times[2:])


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, into: list[float], work: Callable[[], Any]) -> Any:
    start = now(device)
    out = work()
    into.append(now(device) - start)
    return out


def measure(size: tuple[int, int, int, int], device: torch.device, speed: float) -> dict[str, Any]:
    hidden, ffn, batch, length = size
    with tempfile.TemporaryDirectory() as folder:
        stream = ModelStream(random_llama(Path(folder), hidden, ffn, 1), device)
        x = stream.embed(torch.randint(0, 4000, (4 * batch, length)))
        block = first_block(stream, Recipe(Affine(2, 64)), Streams(x, x, len(x)), length)
    job, softs = Reconstruction(block, batch), {b: SoftBlock(block) for b in backends(device)}
    keys = next(iter(softs.values())).keys
    plain_weights = {k: v.to(block.compute) for k, v in block.weights.items()}
    trained = [plain_weights[k].clone().requires_grad_() for k in keys]
    torch_adam = torch.optim.Adam(trained, lr=1e-9, fused=True)
    times: dict[str, list[float]] = {}
    chosen = _rounding._fastest
    adam = Adam(1e-3)
    for soft in softs.values():
        soft.start()
    try:
        for turn in range(TURNS + 3):
            adam = adam.next()
            found: dict[str, list[float]] = {n: [] for n in ("plain", "adam", *softs)}
            _, gradients = timed(
                device, found["plain"], lambda: job.gradients(plain_weights, keys, job.draw())
            )
            for p, g in zip(trained, gradients, strict=True):
                p.grad = g
            timed(device, found["adam"], torch_adam.step)
            for name, soft in softs.items():
                _rounding._fastest = lambda *_, name=name: name
                with torch.no_grad():
                    weights = timed(device, found[name], soft.weights)
                _, gradients = timed(
                    device, found[name], lambda w=weights: job.gradients(w, keys, job.draw())
                )
                timed(
                    device, found[name], lambda s=soft, g=gradients, a=adam: s.descend(g, a, 1e-4)
                )
            if turn >= 3:
                for name, parts in found.items():
                    times.setdefault(name, []).append(sum(parts))
                    if name in softs:
                        times.setdefault(f"{name}: weights", []).append(parts[0])
                        times.setdefault(f"{name}: descend", []).append(parts[2])
    finally:
        _rounding._fastest = chosen
    weights = sum(w.numel() for w in trained)
    tokens = batch * length
    # x enters no earlier layer: the gradient by the inputs of q, k and v is not needed.
    floor = (2 * 3 * weights - 2 * 3 * hidden * hidden) * tokens / speed
    training = [p + a for p, a in zip(times["plain"], times["adam"], strict=True)]
    out: dict[str, Any] = {
        "hidden": hidden,
        "ffn": ffn,
        "batch": batch,
        "length": length,
        "weights": weights,
        "floor": floor,
    }
    out |= {name: statistics.median(t) for name, t in times.items()}
    for name in softs:
        out[f"{name} / training step"] = statistics.median(
            a / b for a, b in zip(times[name], training, strict=True)
        )
    return out


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "bench-out/par_step.json")
    device = torch.device(
        sys.argv[2] if len(sys.argv) > 2 else "cuda" if torch.cuda.is_available() else "cpu"
    )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    speed = rate(device, dtype)
    sizes = SIZES + ([(4096, 11008, 4, 2048)] if device.type == "cuda" else [])
    names = backends(device)
    print(f"{device}, {torch.get_num_threads()} threads, {dtype}: {speed / 1e9:.0f} GFLOP/s\n")
    print(
        "| hidden, FFN | rows x tokens | floor | plain | Adam | "
        + " | ".join(f"{n}: weights + descend" for n in names)
        + " | "
        + " | ".join(f"{n} / training step" for n in names)
        + " |"
    )
    print("|---" * (5 + 2 * len(names)) + "|")
    rows = []
    for size in sizes:
        r = measure(size, device, speed)
        rows.append(r)
        cells = [
            f"{size[0]}, {size[1]}",
            f"{size[2]} x {size[3]}",
            *(f"{1e3 * r[k]:.1f} ms" for k in ("floor", "plain", "adam")),
        ]
        cells += [
            f"{1e3 * r[f'{n}: weights']:.1f} + {1e3 * r[f'{n}: descend']:.1f} ms" for n in names
        ]
        print(
            "| " + " | ".join(cells + [f"{r[f'{n} / training step']:.3f}" for n in names]) + " |",
            flush=True,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(
            {
                "device": str(device),
                "threads": torch.get_num_threads(),
                "flops": speed,
                "steps": rows,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
