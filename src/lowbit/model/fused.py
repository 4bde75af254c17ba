"""Fused experts of transformers: how the 3-D parameters of a module lie and what it computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
BIAS = "_bias"  # what the name of a fused bias ends with
_FUSED = "gate_up_proj"
_SMALL = 2**16  # weights of a projection up to which a module is tested in its own sizes


@dataclass(frozen=True)
class Part:
    """Where a linear of an expert lies in a fused module.

    Attributes:
        parameter: of the fused module, (experts, ...); its bias is named the same with "_bias".
        rows: start, stop, step of its output channels; None for all.
        transposed: the parameter is (experts, in, out).
    """

    parameter: str
    rows: tuple[int, int, int] | None
    transposed: bool

    def divided(self, grain: int) -> Part:
        """The same part of a parameter whose channels are fewer by a factor."""
        if self.rows is None:
            return self
        start, stop, step = self.rows
        return replace(self, rows=(start // grain if step == 1 else start, stop // grain, step))

    def weight(self, fused: Tensor) -> Tensor:
        """The (..., out, in) view of a fused weight."""
        turned = fused.mT if self.transposed else fused
        return turned if self.rows is None else turned[..., slice(*self.rows), :]

    def bias(self, fused: Tensor) -> Tensor:
        """The (..., out) view of a fused bias."""
        return fused if self.rows is None else fused[..., slice(*self.rows)]


@dataclass(frozen=True)
class Form:
    """What a fused module computes, and how its parameters lie.

    Attributes:
        count: experts. hidden: their input size. inner: the input size of the down projection.
        gated: there is a gate beside the up projection. biased: the linears have biases.
        transposed: parameters are (experts, in, out). interleaved: rows of gate and up alternate.
        sorted: called with the rows of all experts one after the other, and no router's choice.
        identities: numbers that a router may choose beyond the experts; such a row is passed on.
        gates: the class says how gate and up become one (``_apply_gate``). normed: a norm follows
            each expert (``post_expert_norm``).
    """

    count: int
    hidden: int
    inner: int
    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    sorted: bool
    identities: int
    gates: bool
    normed: bool

    @property
    def parts(self) -> dict[str, Part]:
        """Linear of an expert -> where it lies."""
        down = Part(DOWN, None, self.transposed)
        if not self.gated:
            return {UP: Part(UP, None, self.transposed), DOWN: down}
        n = self.inner
        gate, up = (
            ((0, 2 * n, 2), (1, 2 * n, 2)) if self.interleaved else ((0, n, 1), (n, 2 * n, 1))
        )
        return {
            GATE: Part(_FUSED, gate, self.transposed),
            UP: Part(_FUSED, up, self.transposed),
            DOWN: down,
        }

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Of a fused parameter, or of its bias."""
        out, into = (self.hidden, self.inner) if parameter.startswith(DOWN) else (
            self.inner * (2 if self.gated else 1), self.hidden)  # fmt: skip
        count = self.count + (0 if parameter.startswith(DOWN) else self.identities)
        if parameter.endswith(BIAS):
            return count, out
        return (count, into, out) if self.transposed else (count, out, into)

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """Outputs of gate and up, each (tokens, inner), as the fused product has them."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds the up and down projections of all its experts in 3-D parameters."""
    sizes = {n: p.ndim for n, p in module.named_parameters(recurse=False)}
    return sizes.get(DOWN) == 3 and GATE not in sizes and 3 in (sizes.get(_FUSED), sizes.get(UP))


def candidates(module: nn.Module) -> Iterator[Form]:
    """Forms that fit what a module declares, and its shapes where it declares nothing."""
    own, said = dict(module.named_parameters(recurse=False)), vars(module)
    gated = _FUSED in own
    first, down = own[_FUSED if gated else UP], own[DOWN]
    wide = 2 if gated else 1
    base = Form(
        count=down.shape[0],
        hidden=0,
        inner=0,
        gated=gated,
        biased=DOWN + BIAS in own,
        transposed=False,
        interleaved=False,
        sorted=len(inspect.signature(inspect.unwrap(type(module).forward)).parameters) == 2,
        identities=first.shape[0] - down.shape[0],
        gates=gated and "_apply_gate" in dir(module),
        normed=bool(said.get("has_post_expert_norm")),
    )
    turned = [said["is_transposed"]] if "is_transposed" in said else [False, True]
    mixed = [not said["is_concatenated"]] if "is_concatenated" in said else [False, True]
    for transposed, interleaved in product(turned, mixed if gated else [False]):
        hidden, inner = down.shape[1:] if not transposed else down.shape[:0:-1]
        shape = (hidden, wide * inner) if transposed else (wide * inner, hidden)
        if tuple(first.shape[1:]) == shape and base.identities >= 0:
            yield replace(
                base,
                hidden=hidden,
                inner=inner,
                transposed=transposed,
                interleaved=interleaved,
            )


def small_copy(module: nn.Module, form: Form) -> tuple[nn.Module, Form]:
    """A copy of a module in float64 on the CPU, with random numbers and fewer channels, and its
    form.
    """
    hidden, inner = form.hidden, form.inner
    if form.count * hidden * inner > _SMALL:
        inner = 6
        # Sizes that are equal stay equal.
        hidden = {form.inner: 6, 2 * form.inner: 12}.get(form.hidden, 10)
    sizes = {form.inner: inner, 2 * form.inner: 2 * inner, form.hidden: hidden}
    rng = torch.Generator().manual_seed(1)
    return _resized(module, sizes, form.count, rng), replace(form, hidden=hidden, inner=inner)


def _resized(
    module: nn.Module, sizes: Mapping[int, int], count: int, rng: torch.Generator
) -> nn.Module:
    """A copy of a module with other channel counts and random numbers, its children as well."""
    small = copy.copy(module)

    def drawn(tensor: Tensor) -> Tensor:
        # The first dimension of what belongs to all experts is their number.
        fixed = tensor.ndim == 3 or tensor.shape[:1] == (count,)
        shape = [n if i == 0 and fixed else sizes.get(n, n) for i, n in enumerate(tensor.shape)]
        return torch.randn(shape, generator=rng, dtype=torch.float64, device="cpu")

    fields = small.__dict__
    for name, value in list(fields.items()):
        if type(value) is int and value != count:
            fields[name] = sizes.get(value, value)
    fields["_parameters"] = {
        n: None if p is None else nn.Parameter(drawn(p), requires_grad=False)
        for n, p in module._parameters.items()
    }
    fields["_buffers"] = {n: None if b is None else drawn(b) for n, b in module._buffers.items()}
    fields["_modules"] = {
        n: None if m is None else _resized(m, sizes, count, rng) for n, m in module._modules.items()
    }
    return small
