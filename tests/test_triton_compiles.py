"""Every Triton kernel compiled for a GPU that need not be here, as its launcher calls it: none
spills registers or takes too many.
"""

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
from lowbit import kernels
from lowbit.methods import _rounding
from lowbit.methods._rounding._adam import Adam

triton = pytest.importorskip("triton")
ROOT = Path(lowbit.__file__).parent
SM90 = triton.backends.compiler.GPUTarget("cuda", 90, 32)
REGISTERS = 65536  # of a multiprocessor, shared by the programs that it runs at once


class Driver:
    """Stands in for the GPU's driver, of which Triton asks only what to compile for."""

    def get_current_device(self):
        return -1  # Triton remembers kernels by device, and a real one may be here too

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return SM90


class OnCuda(torch.Tensor):
    """A tensor that says where it would lie; of the others Triton reads type and address alone."""

    is_cuda = True


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What comes of every launch, by the kernel's name; none takes place."""
    kernels, run = {}, triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels[full_name(self)] = run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return kernels


def full_name(function):
    return f"{function.fn.__module__.removeprefix('lowbit.')}.{function.fn.__name__}"


def soft_rounding(length, dtype, shifted):
    from lowbit.methods._rounding import gpu

    nu, row = torch.zeros(32, length), torch.ones(32, 1)
    code, way = nu.to(torch.uint8), nu.to(torch.int8)
    soft = _rounding.SoftRows(nu, code, way, row, row, row if shifted else None)
    gpu.weights(soft, torch.empty_like(nu, dtype=dtype))
    step = Adam(1e-3, 1)
    gpu.descend(nu.to(dtype), soft, nu.clone(), nu.clone(), step, torch.empty(32, 2))


def hardening(rows, length):
    from lowbit.methods._rounding import hardening_gpu

    hardening_gpu.harden(torch.zeros(rows, length), 0.5)


def columns(count, stored):
    from lowbit.methods import _columns_gpu

    rest, row = torch.zeros(256, 96), torch.ones(2, 96)
    steps = _columns_gpu.Steps(row, row, torch.zeros(count, dtype=torch.int32), 15)
    codes = torch.empty(256, 96, dtype=torch.uint8)
    stretch = (128, 128 + count, 256)
    _columns_gpu.code_uniform(rest, torch.eye(256), steps, codes, rest[:128], stretch, stored)


def clusters(length, levels):
    from lowbit.grid import kmeans, kmeans_gpu

    x, shift = torch.zeros(2, length), torch.zeros(2, 1, dtype=torch.float64)
    sums = torch.zeros(2, length + 1, dtype=torch.float64)
    ranks = kmeans._ranks(length, False, x.device)
    kmeans_gpu.clusters(x, shift, sums, sums, sums, ranks, levels, 20)


def sums(count, dtype):
    from lowbit.grid import sums_gpu

    index = torch.zeros(4, 4096, dtype=dtype)
    sums_gpu.sums_by(index, torch.ones(4, 4096), count)


def codebook_product(bits, tokens, dtype):
    from lowbit.kernels import gpu

    packed, _ = made(64, {bits: 80}, 0.05, dtype)
    gpu.product(torch.zeros(tokens, packed.shape[1], dtype=dtype).as_subclass(OnCuda), packed)


def resources(kernel, folder):
    """Registers of a thread (REG), and the memory that it spills them to: bytes of its stack
    (STACK) and beside it (LOCAL).
    """
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


# A launch, and of each of its kernels how many programs a multiprocessor holds at once, at least.
ROUNDING = {"methods._rounding.gpu._weights": 16, "methods._rounding.gpu._descend": 10}
HARDENING = {
    "methods._rounding.hardening_gpu._count": 8,
    "methods._rounding.hardening_gpu._freeze": 8,
}
COLUMNS = {"methods._columns_gpu._code": 8}
CLUSTERS = {"grid.kmeans_gpu._cluster": 6}
SUMS = {"grid.sums_gpu._sums": 4}
PRODUCT = {"kernels.gpu._multiply": 2, "kernels.gpu._correct": 3}
CASES = [
    (soft_rounding, (16, torch.bfloat16, False), ROUNDING),
    (soft_rounding, (128, torch.float32, True), ROUNDING),
    (soft_rounding, (14336, torch.bfloat16, False), ROUNDING),  # rows longer than a tile
    (hardening, (3, 14336), HARDENING),
    (columns, (128, torch.bfloat16), COLUMNS),
    (columns, (32, torch.float32), COLUMNS),
    (clusters, (4096, 4), CLUSTERS),
    (clusters, (14336, 256), CLUSTERS),
    (sums, (4, torch.int64), SUMS),
    (sums, (256, torch.uint8), SUMS),
    (codebook_product, (2, 1, torch.float16), PRODUCT),
    (codebook_product, (6, 64, torch.float16), PRODUCT),  # codes across words, the most tokens
    (codebook_product, (4, 64, torch.bfloat16), PRODUCT),
]


@pytest.mark.parametrize(
    "launch, args, programs", CASES, ids=lambda v: getattr(v, "__name__", None)
)
def test_a_kernel_compiles_for_sm_90(compiled, tmp_path, launch, args, programs):
    launch(*args)
    assert compiled.keys() == programs.keys()
    for name, kernel in compiled.items():
        used = resources(kernel, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills registers: {used}"
        held = REGISTERS // (32 * kernel.metadata.num_warps * -(-used["REG"] // 8) * 8)
        assert held >= programs[name], (
            f"{name} takes {used['REG']} registers a thread: a multiprocessor holds {held} programs"
        )


# Of a kernel's instructions, at most: what its threads wait for each other for. Those of `_descend`
# belong to the sums of a whole row, after its last weight.
BARRIERS = {"methods._rounding.gpu._weights": 0, "methods._rounding.gpu._descend": 5}


@pytest.mark.parametrize("length", [16, 128, 4096, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_weight_of_soft_rounding_waits_for_another(compiled, tmp_path, length, dtype):
    soft_rounding(length, dtype, True)
    for name, kernel in compiled.items():
        (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", tmp_path / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert len(re.findall(r"\bBAR\.", said)) <= BARRIERS[name]
        if name.endswith("_descend"):  # four numbers at once of nu and both moments
            assert len(re.findall(r"\bSTG\.\S*128\b", said)) == 3


@pytest.mark.parametrize("dtype, held", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_products_go_to_the_tensor_cores_in_their_own_type(compiled, dtype, held):
    codebook_product(8, 1, dtype)
    products = set(
        re.findall(r"\bw?g?mma\S*?\.(?=f32)(\S+)", compiled["kernels.gpu._multiply"].asm["ptx"])
    )
    assert products == {f"f32.{held}.{held}.f32"}


def test_no_kernel_is_left_out():
    found = {full_name(f): f for path in files_with_kernels() for f in jitted(path)}
    called = {
        name
        for name, f in found.items()
        if any(re.search(rf"\b{f.fn.__name__}\(", g.src) for g in found.values() if g is not f)
    }
    assert set(found) - called == {name for _, _, programs in CASES for name in programs}


def test_the_cpu_does_not_take_triton_because_it_is_installed(monkeypatch):
    monkeypatch.delenv("LOWBIT_ROUNDING", raising=False)
    x = torch.zeros(2, 4)
    assert kernels._has_triton()
    assert kernels._fastest(x) in ("cpu", "reference")
    assert _rounding._fastest(x, x) in ("c", "reference")


def files_with_kernels():
    """The library's files that import triton, at whatever depth."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(n.split(".")[0] == "triton" for n in names):
                yield path
                break


def jitted(path):
    """The functions of a file that Triton compiles, also below autotuners and heuristics."""
    module = importlib.import_module(
        ".".join(("lowbit", *path.relative_to(ROOT).with_suffix("").parts))
    )
    for value in vars(module).values():
        while isinstance(value, triton.KernelInterface) and not isinstance(
            value, triton.JITFunction
        ):
            value = value.fn
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__:
            yield value
