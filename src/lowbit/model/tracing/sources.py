"""What makes a site's activation: a norm's gain, or rows of an earlier linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph import Source
from .channels import rows_of
from .kind import Kind
from .replay import key_of

_SAME = 1e-5  # some norms compute in float32 whatever they are given


def norm_offset(kind: Kind, norm: str, reader: str) -> float | None:
    """What a norm adds to its stored gain: 0 or 1; None if its gain does not scale, channel by
    channel, what ``reader`` reads.
    """
    module = kind.modules[norm]
    gain, bias = module._parameters.get("weight"), module._parameters.get("bias")
    base = kind.base.inputs[reader]
    if gain is None or gain.shape != base.shape[-1:] or isinstance(module, nn.Linear):
        return None
    factors = torch.linspace(0.5, 1.5, len(gain), dtype=gain.dtype)
    held = [(p, p.detach().clone()) for p in (gain, bias) if p is not None]
    try:
        for offset in (0.0, 1.0):
            gain.copy_((held[0][1] + offset) * factors - offset)
            if bias is not None:
                bias.copy_(held[1][1] * factors)
            now = kind.replay({}).inputs[reader]
            if torch.allclose(now, base * factors, rtol=_SAME, atol=_SAME):
                return offset
    finally:
        for p, value in held:
            p.copy_(value)
    return None


def made_by(kind: Kind, reader: str, exclude: tuple[str, ...] = ()) -> tuple[str, Tensor] | None:
    """The earlier linear that makes what a module reads, and its row for each channel."""
    base = kind.base.inputs[reader]
    maker = kind.modules.get(kind.base.made.get(key_of(base), ""))
    if maker is not None and maker._parameters and not isinstance(maker, nn.Linear):
        return None  # a norm: every channel depends on all of them
    order = list(kind.base.inputs)
    before = [n for n in order[: order.index(reader)] if n in kind.linears and n not in exclude]
    for linear in reversed(before):
        count = kind.modules[linear].out_features
        found = rows_of(kind.scaled(reader), linear, count, base)
        if found is not None:
            return linear, found
    return None


def linear_source(made: tuple[str, Tensor] | None, outputs: int) -> Source | None:
    """A source for a map from channels to distinct neighbouring rows; None for any other map.

    Args:
        outputs: rows of the linear.
    """
    if made is None:
        return None
    linear, rows = made
    start, count = int(rows[0]), len(rows)
    if not torch.equal(rows, torch.arange(start, start + count)):
        return None
    return Source(linear, "linear", None if count == outputs else (start, start + count))
