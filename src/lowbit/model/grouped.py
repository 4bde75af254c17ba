"""Rows of all experts of a mixture through one product, forward and backward.

A loop over experts makes tens of small operations an expert in a step of tuning. Here a step makes
as many as a dense block does, whatever the number of experts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import unknown

Version = Literal["loop", "grouped"]
_VARIABLE = "LOWBIT_EXPERTS"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of torch's grouped products
# On the CPU: experts from which, and weights of a linear up to which, a step is shorter than by the
# loop. Measured by benchmarks/experts_step.py, 2048 rows through linears of 24576 weights, forward
# and backward: 64 experts 54 instead of 64 ms, 32 47 instead of 53, 16 and 8 as long; 32 experts of
# 393216 weights 409 instead of 369. Elsewhere launches decide, of which the loop has tens an
# expert; not measured there.
_MANY, _SMALL = 32, 1 << 16
_ALIGNED = 16  # bytes, of a row that torch's grouped products take


def chosen(experts: Sequence[nn.Module]) -> Version:
    """How the experts of a mixture are computed: "grouped" in steps of tuning where that is faster
    and nothing watches or changes what an expert's linears get, else "loop". LOWBIT_EXPERTS names
    one of them to take in all steps that can be made either way.

    Args:
        experts: the children of each are its linears.

    Raises:
        LowbitError: LOWBIT_EXPERTS names neither.
    """
    if not torch.is_grad_enabled():
        return "loop"
    linears = [linear for expert in experts for linear in expert.children()]
    version = in_steps(experts, cast(nn.Linear, linears[0]).weight.device)
    return version if all(_plain(linear) for linear in linears) else "loop"


def in_steps(experts: Sequence[nn.Module], device: torch.device) -> Version:
    """How experts are computed in those steps of tuning that can be made either way.

    Args:
        experts: the children of each are its linears; meta will do. device: which computes.

    Raises:
        LowbitError: see `chosen`.
    """
    asked = os.environ.get(_VARIABLE)
    if asked is not None and asked not in get_args(Version):
        raise unknown(f"way to compute experts in {_VARIABLE}", asked, get_args(Version))
    if asked is not None:
        return cast(Version, asked)
    numel = cast(nn.Linear, next(experts[0].children())).weight.numel()
    faster = device.type != "cpu" or (len(experts) >= _MANY and numel <= _SMALL)
    return "grouped" if faster else "loop"


def _plain(linear: nn.Module) -> bool:
    """Whether a module is a linear that learns and that no hook looks at."""
    return (
        type(linear) is nn.Linear
        and linear.weight.requires_grad
        and linear.weight.dtype in _DTYPES
        and all(n * linear.weight.element_size() % _ALIGNED == 0 for n in linear.weight.shape)
        and not (linear._forward_pre_hooks or linear._forward_hooks)
    )


def grouped_linear(x: Tensor, linears: Sequence[nn.Linear], ends: Tensor) -> Tensor:
    """Rows through the linear of their expert.

    Args:
        x: (rows, in), those of the first expert first.
        linears: of one shape, an expert each.
        ends: (experts,) int32, where the rows of each end; the last one is the number of rows.

    Returns:
        (rows, out).
    """
    weight = stacked([linear.weight for linear in linears])  # (experts, out, in)
    y: Tensor = _Products.apply(x.contiguous(), weight, ends)  # type: ignore[no-untyped-call]
    if linears[0].bias is None:
        return y
    owner = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    return y + torch.stack([linear.bias for linear in linears])[owner]


def sent(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows repeated k times and put in order: x[order // k], (tokens * k, hidden).

    Args:
        x: (tokens, hidden). order: a permutation of (tokens * k), inverse: its inverse. With both,
            gradients are put back without additions into memory, whose order a device may change.
    """
    out: Tensor = _Sent.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


def put_back(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in the order from before `sent`: x[inverse]."""
    out: Tensor = _PutBack.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape above each other, (tensors, ...): without a copy where they lie in one
    storage at even distances, as soft weights do. The gradients are views of one tensor.
    """
    out: Tensor = _Stacked.apply(*tensors)  # type: ignore[no-untyped-call]
    return out


class _Products(torch.autograd.Function):
    """Products of all experts. torch's own gradients take no outputs whose gradient has gaps, as
    halves of one tensor have.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return torch.nn.functional.grouped_mm(x, weight.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight, ends = ctx.saved_tensors
        by_y, by_x = gradients[0].contiguous(), None
        if ctx.needs_input_grad[0]:
            by_x = torch.nn.functional.grouped_mm(by_y, weight, offs=ends)
        return by_x, torch.nn.functional.grouped_mm(by_y.mT, x, offs=ends), None


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = len(x)
        return x[order // (len(order) // len(x))]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (inverse,) = ctx.saved_tensors
        back, tokens = gradients[0][inverse], ctx.tokens
        return back.view(tokens, -1, back.shape[-1]).sum(1), None, None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[inverse]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradients[0][order], None, None


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        step = _step(tensors)
        if step is None:
            return torch.stack(tensors)
        first = tensors[0]
        return first.as_strided(
            (len(tensors), *first.shape), (step, *first.stride()), first.storage_offset()
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0].unbind()


def _step(tensors: Sequence[Tensor]) -> int | None:
    """The distance of each tensor to the next in their common storage; None if there is none."""
    first = tensors[0]
    place, start = first.untyped_storage().data_ptr(), first.storage_offset()
    step = tensors[-1].storage_offset() - start
    if len(tensors) < 2 or step % (len(tensors) - 1):
        return None
    step //= len(tensors) - 1
    even = all(
        t.untyped_storage().data_ptr() == place
        and t.storage_offset() == start + i * step
        and t.is_contiguous()
        for i, t in enumerate(tensors)
    )
    aligned = all(n * first.element_size() % _ALIGNED == 0 for n in (step, start))
    return step if even and aligned and step >= first.numel() else None
