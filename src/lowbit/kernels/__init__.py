"""Products with a weight on codebooks of its columns, which stays packed.

One operation with a torch body (`reference`) and faster versions of it: compiled C on the CPU,
Triton on CUDA. Nothing is compiled, and no accelerator is touched, before the first product.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError, unknown
from ..grid.packed import DTYPES, PackedColumns
from ..grid.packed import check as check
from . import cpu, reference
from .reference import decode as decode


def linear(x: Tensor, packed: PackedColumns, backend: str | None = None) -> Tensor:
    """x W^T. A gradient flows to x; the weight has none.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        packed: on x's device, and accepted by `check` when it was loaded: the indices in it are
            followed without another look.
        backend: "reference", "cpu" or "triton"; None takes the fastest one there is.

    Returns:
        (..., out) in x's dtype; sums are taken in float32.

    Raises:
        LowbitError: x does not fit the weight, or the backend is not available for it here.
    """
    if x.dtype not in DTYPES:
        raise LowbitError(
            f"a packed weight is multiplied by float32, bfloat16 or float16, not {x.dtype}."
        )
    if x.dim() == 0 or x.shape[-1] != packed.shape[1]:
        raise LowbitError(
            f"a packed weight of {packed.shape[0]} x {packed.shape[1]} cannot be multiplied by "
            f"{tuple(x.shape)}."
        )
    where = packed.segments[0].codes.device
    if x.device != where:
        raise LowbitError(
            f"a packed weight lies on {where}, its input on {x.device}. Move one of them."
        )
    product = _BACKENDS.get(backend or _fastest(x))
    if product is None:
        raise unknown("backend", str(backend), _BACKENDS)
    flat = x.reshape(-1, packed.shape[1])
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _WithGradient.apply(flat, packed, product)  # type: ignore[no-untyped-call]
    else:
        y = product(flat, packed)
    return y.view(*x.shape[:-1], packed.shape[0])


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: PackedColumns,
        product: Callable[[Tensor, PackedColumns], Tensor],
    ) -> Tensor:
        ctx.packed = packed
        return product(x, packed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reference.transposed_product(grads[0], ctx.packed), None, None


def _fastest(x: Tensor) -> str:
    if x.device.type == "cuda" and _has_triton():
        return "triton"
    return "cpu" if x.device.type == "cpu" and cpu.library() is not None else "reference"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _on_cpu(x: Tensor, packed: PackedColumns) -> Tensor:
    code = cpu.library()
    if code is None:
        raise LowbitError(
            "backend 'cpu' found no C compiler (or LOWBIT_NO_COMPILER is set). Install gcc or "
            "clang, or use 'reference'."
        )
    if x.device.type != "cpu":
        raise LowbitError(
            f"backend 'cpu' was asked for a weight on {x.device}. Move both to the CPU, or use "
            "'triton' or 'reference'."
        )
    return cpu.product(x, packed, code)


def _on_gpu(x: Tensor, packed: PackedColumns) -> Tensor:
    if not _has_triton():
        raise LowbitError(
            "backend 'triton' needs the package triton (pip install triton). Without it use "
            "'reference'."
        )
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise LowbitError(
            f"backend 'triton' was asked for a weight on {x.device}; it needs CUDA. Use "
            "'reference' or 'cpu'."
        )
    from . import gpu

    return gpu.product(x, packed)


_BACKENDS: dict[str, Callable[[Tensor, PackedColumns], Tensor]] = {
    "reference": reference.product,
    "cpu": _on_cpu,
    "triton": _on_gpu,
}
