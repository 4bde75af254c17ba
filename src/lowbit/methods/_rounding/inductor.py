"""Soft rounding as torch.compile makes it from the plain version: for any device that it has a
backend for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._adam import BETAS, EPSILON, Adam
from .reference import SoftRows


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _step(
    gradient: Tensor, soft: SoftRows, first: Tensor, second: Tensor, sums: Tensor, far: Tensor
) -> None:
    """`reference.descend` with what changes from step to step in a tensor, (2,) size and root, or
    every step would be compiled.
    """
    by_nu, found = reference.gradients(gradient, soft)
    sums.copy_(found)
    first.lerp_(by_nu, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(by_nu, by_nu, value=1 - BETAS[1])
    soft.nu.sub_(far[0] * first / (second.sqrt() * far[1] + EPSILON))


def weights(soft: SoftRows, out: Tensor) -> None:
    _compiled(reference.weights)(soft, out)


def descend(
    gradient: Tensor, soft: SoftRows, first: Tensor, second: Tensor, adam: Adam, sums: Tensor
) -> None:
    nu = soft.nu
    far = torch.tensor([adam.size, adam.root], dtype=nu.dtype).to(nu.device, non_blocking=True)
    _compiled(_step)(gradient, soft, first, second, sums, far)
