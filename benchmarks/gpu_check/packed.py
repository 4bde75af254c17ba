"""Products with packed codebook weights: as they are called, and replayed as a graph."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import codebook_kernels as peers
import torch

from lowbit import kernels

from .bench import Bench, put, tried


def packed(b: Bench, out: dict[str, Any]) -> None:
    """4096 x 11008 weights beside the 16-bit product."""
    rows, width = b.pick((64, 400), (4096, 11008))
    mixed = "2.1 bits, 0.5 % outliers"
    bits = {"2 bits": {2: width}, "4 bits": {4: width}, mixed: {2: width - width // 20}}
    bits[mixed][4] = width // 20
    sizes = {
        "OUT": rows,
        "IN": width,
        "BITS": bits,
        "OUTLIERS": {mixed: width // 200},
        "BEYOND_CACHE": b.pick(1 << 16, 1 << 28),
    }
    with ExitStack() as held:
        for name, value in sizes.items():
            held.enter_context(put(peers, name, value))
        out["as called"] = tried(lambda: peers.measured(b.device.type, b.pick(1, 8)))
        if b.cuda:
            out["as a graph"] = tried(lambda: replayed(b))


def replayed(b: Bench) -> dict[str, Any]:
    """Without what the host takes to launch."""
    from triton.testing import do_bench_cudagraph

    dense = torch.randn(peers.OUT, peers.IN, device=b.device).half()
    out = {}
    for bits in (2, 4):
        weight = peers.weight({bits: peers.IN}, 0, "cuda")
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, peers.IN, device=b.device).half()
            own = do_bench_cudagraph(lambda w=weight, x=x: kernels.linear(x, w, "triton"), rep=100)
            plain = do_bench_cudagraph(lambda x=x: x @ dense.T, rep=100)
            out[f"{bits} bits, {tokens} tokens"] = {
                "ms": own,
                "16-bit ms": plain,
                "GBps": peers.size(weight) / own / 1e6,
            }
    return out
