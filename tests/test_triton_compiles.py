"""Every Triton kernel compiled for a GPU that is not here, as its launcher calls it: it compiles, keeps to its registers, spills none."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_kernels import made

import lowbit
from lowbit.methods._rounding._adam import Adam

triton = pytest.importorskip("triton")
ROOT = Path(lowbit.__file__).parent
SM90 = triton.backends.compiler.GPUTarget("cuda", 90, 32)


class Driver:
    """Stands in for the GPU's driver, of which Triton asks only what to compile for."""

    def get_current_device(self):
        return -1  # Triton remembers kernels by device, and a real one may be here too

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return SM90


class OnCuda(torch.Tensor):
    """A tensor that says where it would lie; Triton reads its type and address alone."""

    is_cuda = True


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """(kernel, what came of it) of every launch, none of which takes place."""
    launches, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        launches.append((self, run(self, *args, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return launches


def soft_rounding(length, dtype, shifted):
    from lowbit.methods._rounding import gpu

    nu, row = torch.zeros(32, length), torch.ones(32, 1)
    code, way = nu.to(torch.uint8), nu.to(torch.int8)
    gpu.weights(nu, code, way, row, row, row if shifted else None, torch.empty_like(nu, dtype=dtype))
    gpu.descend(nu.to(dtype), nu, code, way, row, row, nu.clone(), nu.clone(), Adam(1e-3, 1), torch.empty(32, 2))


def codebook_product(bits, tokens, dtype):
    from lowbit.kernels import gpu

    packed, _ = made(64, {bits: 80}, 0.05, dtype)
    gpu.product(torch.zeros(tokens, packed.shape[1], dtype=dtype).as_subclass(OnCuda), packed)


def resources(kernel, folder):
    """Registers of a thread, and bytes of a thread's stack and local memory, which is where registers are spilled to."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


@pytest.mark.parametrize("launch, args", [
    *((soft_rounding, (length, dtype, length == 128)) for length in (16, 100, 128, 14336) for dtype in (torch.float32, torch.bfloat16)),
    *((codebook_product, (bits, tokens, dtype)) for bits in range(1, 9) for tokens in (1,16,64) for dtype in (torch.float16, torch.bfloat16)),
])
def test_x(compiled, tmp_path, launch, args):
    import time
    t=time.time()
    launch(*args)
    for f, k in compiled:
        print(launch.__name__, args, f.__name__, resources(k, tmp_path), k.metadata.num_warps, k.metadata.shared, round(time.time()-t, 2))
