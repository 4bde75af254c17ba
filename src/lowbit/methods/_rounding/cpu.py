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
from .reference import SoftRows

_ALONE = 1 << 15  # weights that are not worth a second thread

_P, _F = ctypes.c_void_p, ctypes.c_float


_KEPT = ("nu", "first", "second", "code", "way", "zero", "scale", "offset")
_OF_A_STEP = ("gradient", "out", "sums")


class _Job(ctypes.Structure):
    _fields_ = [
        *((n, _P) for n in (*_KEPT, *_OF_A_STEP)),
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


def weights(soft: SoftRows, out: Tensor) -> None:
    job = _job(soft, half=out.dtype == torch.bfloat16)
    job.out = pointer(out)
    job.offset = None if soft.offset is None else pointer(soft.offset)
    _call("rounding_weights", job, soft.nu)


def descend(
    gradient: Tensor, soft: SoftRows, first: Tensor, second: Tensor, adam: Adam, sums: Tensor
) -> None:
    gradient = gradient.contiguous()
    job = _job(soft, half=gradient.dtype == torch.bfloat16)
    job.gradient, job.first, job.second, job.sums = (
        pointer(t) for t in (gradient, first, second, sums)
    )
    job.size, job.root, job.beta1, job.beta2, job.epsilon = adam.size, adam.root, *BETAS, EPSILON
    _call("rounding_descend", job, soft.nu)


def _job(soft: SoftRows, *, half: bool) -> _Job:
    job = _Job(length=soft.nu.shape[1], half=half)
    job.nu, job.code, job.way, job.zero, job.scale = map(pointer, soft[:5])
    return job


def _call(name: str, job: _Job, nu: Tensor) -> None:
    code = library()
    assert code is not None
    workers = threads() if nu.numel() > _ALONE else 1
    getattr(code, name)(
        ctypes.byref(job), ctypes.c_int64(len(nu)), ctypes.c_int64(workers), ctypes.byref(team())
    )
