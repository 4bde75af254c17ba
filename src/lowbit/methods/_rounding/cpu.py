"""Soft rounding in compiled C, for tensors on the CPU in float32, weights and gradients in float32
or bfloat16.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ...grid import compiled
from ...grid.compiled import pointer, threads
from ...grid.openmp import team
from ._adam import BETAS, EPSILON, Adam

_ALONE = 1 << 15  # weights that are not worth a second thread

_P, _F = ctypes.c_void_p, ctypes.c_float


class _Job(ctypes.Structure):
    _fields_ = [
        *(
            (n, _P)
            for n in (
                "nu",
                "first",
                "second",
                "code",
                "way",
                "zero",
                "scale",
                "offset",
                "gradient",
                "out",
                "sums",
            )
        ),
        ("length", ctypes.c_int64),
        ("half", ctypes.c_int32),
        *((n, _F) for n in ("size", "root", "beta1", "beta2", "epsilon")),
    ]


def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is no compiler."""
    return compiled.library(Path(__file__).with_name("rounding.c"), fused=True)


def fits(nu: Tensor, other: Tensor) -> bool:
    """Whether compiled code takes these variables with weights, or gradients, like ``other``."""
    return (
        nu.device.type == "cpu"
        and nu.dtype == torch.float32
        and other.dtype in (torch.float32, torch.bfloat16)
    )


def weights(
    nu: Tensor,
    code: Tensor,
    way: Tensor,
    zero: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    job = _job(nu, code, way, zero, scale, half=out.dtype == torch.bfloat16)
    job.out = pointer(out)
    job.offset = None if offset is None else pointer(offset)
    _call("rounding_weights", job, nu)


def descend(
    gradient: Tensor,
    nu: Tensor,
    code: Tensor,
    way: Tensor,
    zero: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
    adam: Adam,
    sums: Tensor,
) -> None:
    gradient = gradient.contiguous()
    job = _job(nu, code, way, zero, scale, half=gradient.dtype == torch.bfloat16)
    job.gradient, job.first, job.second, job.sums = (
        pointer(t) for t in (gradient, first, second, sums)
    )
    job.size, job.root, job.beta1, job.beta2, job.epsilon = adam.size, adam.root, *BETAS, EPSILON
    _call("rounding_descend", job, nu)


def _job(nu: Tensor, code: Tensor, way: Tensor, zero: Tensor, scale: Tensor, *, half: bool) -> _Job:
    job = _Job(length=nu.shape[1], half=half)
    job.nu, job.code, job.way, job.zero, job.scale = (
        pointer(t) for t in (nu, code, way, zero, scale)
    )
    return job


def _call(name: str, job: _Job, nu: Tensor) -> None:
    code = library()
    assert code is not None
    workers = threads() if nu.numel() > _ALONE else 1
    getattr(code, name)(
        ctypes.byref(job), ctypes.c_int64(len(nu)), ctypes.c_int64(workers), ctypes.byref(team())
    )
