"""Ceilings: what copying moves, and matrix products."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from lowbit.methods._gram import gram

from .bench import Bench

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "compressed-tensors")


def machine(b: Bench, found: dict[str, Any]) -> None:
    """What is here, and what it sustains."""
    found |= {"python": platform.python_version(), "device": str(b.device)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if b.cuda:
        properties = torch.cuda.get_device_properties(b.device)
        found |= {"name": properties.name, "bytes": properties.total_memory}
    size = b.pick(1 << 22, 1 << 31)
    a = torch.ones(size, dtype=torch.uint8, device=b.device)
    to = torch.empty_like(a)
    found["copy_GBps"] = 2 * size / b.times(lambda: to.copy_(a))["mean"] / 1e6
    n = b.pick(256, 8192)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(n, n, device=b.device).to(dtype)
        took = b.times(lambda x=x: x @ x, 5, 2)["mean"]
        found[f"{str(dtype)[6:]}_TFLOPs"] = 2 * n**3 / took / 1e9
        took = b.times(lambda x=x: gram(x, torch.float32), 5, 2)["mean"]
        found[f"gram of {str(dtype)[6:]}_TFLOPs"] = 2 * n**3 / took / 1e9
