"""Soft rounding: one operation from rounding variables to weights, one from the weights' gradient
to the variables' next values, and one that freezes variables.

    weight = (code - zero + way * h(nu)) * scale - offset        h(nu) = clamp(1.2 sigmoid(nu) -
    0.1, 0, 1)

``way`` is the step to the other code: +1, -1, or 0 where there is none. A frozen weight has nu =
+-FROZEN: h is then exactly 0 or 1 and its slope exactly 0, so that neither a mask nor an infinity
is needed. Between the two operations nothing is kept but their inputs: per weight nu and Adam's two
moments in float32, code and way in a byte each.

One plain version ("reference") and faster ones: compiled C on the CPU ("c"), Triton on CUDA
("triton"), and what torch.compile makes of the plain one ("inductor"), which is taken only when
asked for: compiling takes longer than it saves beside the others. LOWBIT_ROUNDING names the version
to take instead of the fastest.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ...errors import LowbitError, unknown
from ...grid.triton_kernels import kernels
from . import cpu, hardening
from ._adam import Adam as Adam
from ._adam import moved as moved
from .reference import FROZEN as FROZEN
from .reference import SoftRows as SoftRows
from .reference import gradients as gradients
from .reference import inverse_rectified as inverse_rectified
from .reference import rectified as rectified
from .reference import slope as slope
from .reference import soft_rectified as soft_rectified

Backend = Literal["reference", "c", "inductor", "triton"]
_MODULES: dict[Backend, str] = {
    "reference": "reference",
    "c": "cpu",
    "inductor": "inductor",
    "triton": "gpu",
}


def weights(soft: SoftRows, out: Tensor, backend: Backend | None = None) -> Tensor:
    """Soft weights.

    Args:
        out: (rows, length) in any float dtype, contiguous; written.
        backend: None for the fastest one there is.

    Returns:
        out.
    """
    _module(backend or _fastest(soft.nu, out)).weights(soft, out)
    return out


def descend(
    gradient: Tensor,
    soft: SoftRows,
    first: Tensor,
    second: Tensor,
    adam: Adam,
    backend: Backend | None = None,
) -> Tensor:
    """One step of Adam on the rounding variables: nu and its moments are changed in place.

    Args:
        gradient: (rows, length) by the weights, in any float dtype.
        first, second: (rows, length) Adam's moments in nu's dtype, contiguous; zero where a weight
            is frozen.
        adam: step size and number of this step.
        backend: None for the fastest one there is.

    Returns:
        (rows, 2) in nu's dtype: the loss's gradient by the scale, and by minus the offset, of every
            row.
    """
    sums = soft.nu.new_empty(len(soft.nu), 2)
    module = _module(backend or _fastest(soft.nu, gradient))
    module.descend(gradient, soft, first, second, adam, sums)
    return sums


def harden(nu: Tensor, soft_share: float, backend: Backend | None = None) -> None:
    """Freeze, in each row, all but a share of the weights: those nearest to the middle stay soft.

    Args:
        nu: (linears, weights) float32, contiguous; changed in place.
        soft_share: as a quantile of |h(nu) - 1/2|; ties stay soft.
        backend: None for the fastest one there is. "c" and "inductor" have none of their own.
    """
    module: ModuleType | None = None
    if backend == "triton":
        module = importlib.import_module(f"{__name__}.hardening_gpu")
    elif backend is None and _fastest(nu, nu) == "triton":
        module = kernels(f"{__name__}.hardening_gpu", nu.device)
    (module or hardening).harden(nu, soft_share)


def version_on(device: torch.device) -> Backend:
    """The version that is taken on a device: each adds in an order of its own.

    Raises:
        LowbitError: LOWBIT_ROUNDING names none, or one that does not work there.
    """
    nu = torch.empty(0, device=device)
    return _fastest(nu, nu)


def _fastest(nu: Tensor, other: Tensor) -> Backend:
    asked = os.environ.get("LOWBIT_ROUNDING")
    if asked:
        if asked not in _MODULES:
            raise unknown("version of soft rounding in LOWBIT_ROUNDING", asked, tuple(_MODULES))
        if (asked == "triton" and not _on_triton(nu)) or (asked == "c" and not _in_c(nu, other)):
            raise LowbitError(
                f"LOWBIT_ROUNDING={asked} does not work here, on {nu.device}. Unset it, or take "
                "'reference' or 'inductor'."
            )
        return asked
    return "triton" if _on_triton(nu) else "c" if _in_c(nu, other) else "reference"


def _on_triton(nu: Tensor) -> bool:
    return nu.dtype == torch.float32 and kernels(f"{__name__}.gpu", nu.device) is not None


def _in_c(nu: Tensor, other: Tensor) -> bool:
    return cpu.fits(nu, other) and cpu.library() is not None


def _module(backend: Backend) -> ModuleType:
    return importlib.import_module(f"{__name__}.{_MODULES[backend]}")
