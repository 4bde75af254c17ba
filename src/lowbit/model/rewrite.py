"""Function-preserving rewrites of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from .beside import picked
from .block import Block
from .graph import Site, Source

_ROUNDING = 1e-2  # of the largest output: a fold moves float32 by a ten-thousandth at most


def _into_norm(
    block: Block, source: Source, factor: Tensor, shift: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Divide a norm's gain by ``factor`` as far as the stored dtype allows; also the factor that
    this really was.
    """
    key, offset = f"{source.module}.weight", source.offset
    gain = block.weights[key].double() + offset
    stored = (gain / factor - offset).to(block.stored)
    effective = gain / (stored.double() + offset)
    # A gain of zero, or one that rounding made zero.
    dead = ~torch.isfinite(effective) | (effective <= 0)
    effective = torch.where(dead, torch.ones_like(effective), effective)
    changes = {key: torch.where(dead, block.weights[key], stored.to(block.weights[key].dtype))}
    bias = f"{source.module}.bias"
    if bias in block.weights:
        moved = block.weights[bias].double() - (0.0 if shift is None else shift)
        changes[bias] = (moved / effective).to(block.stored).to(block.weights[bias].dtype)
    return changes, effective


def _into_rows(
    block: Block, source: Source, factor: Tensor, shift: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Divide a linear's output rows (and bias) by ``factor``."""
    key = f"{source.module}.weight"
    rows = slice(*source.rows) if source.rows else slice(None)
    weight = block.weights[key].clone()
    weight[rows] = (weight[rows].double() / factor[:, None]).to(weight.dtype)
    changes = {key: weight}
    bias = f"{source.module}.bias"
    if bias in block.weights:
        shifted = block.weights[bias].clone()
        shifted[rows] = (
            ((shifted[rows].double() - (0.0 if shift is None else shift)) / factor)
            .to(block.stored)
            .to(shifted.dtype)
        )
        changes[bias] = shifted
    return changes, factor


def fold(block: Block, site: Site, factor: Tensor, shift: Tensor | None = None) -> Block:
    """Divide a site's activation by a positive per-channel factor and multiply its readers' columns
    by it, those of parameters that stay in floating point included.

    With ``shift`` the activation x becomes (x - shift) / factor, and the readers' biases take what
    was taken off.

    The factor that reaches the readers is the one the norm's gain could really take in the stored
    dtype, so the function is preserved to float32 rounding even when the norm is kept in 16 bits.

    Args:
        factor: (channels,) > 0.
        shift: (channels,), only where the source and all readers have biases, and only linears that
            are quantized read the activation.
    """
    if site.source is None:
        raise ValueError("this site has no source to fold a factor into")
    into = _into_norm if site.source.kind == "norm" else _into_rows
    changes, effective = into(
        block, site.source, factor.double(), None if shift is None else shift.double()
    )
    for name in site.reads:
        key, bias = f"{name}.weight", f"{name}.bias"
        weight = changes.get(key, block.weights[key])
        if shift is not None:
            held = changes.get(bias, block.weights[bias])
            changes[bias] = (
                (held.double() + weight.double() @ shift.double()).to(block.stored).to(held.dtype)
            )
        changes[key] = (weight.double() * effective).to(weight.dtype)
    for name in site.beside:
        weight = block.weights[name]
        scaled = (weight.double() * effective).to(block.context.keeps(name))
        changes[name] = scaled.to(weight.dtype)
    return block.with_weights(changes)


@torch.no_grad()
def checked(before: Block, after: Block) -> Block:
    """A rewritten block with the proof of it in its notes: ``fold_error``, the largest difference
    that the rewriting made to the block's output on one calibration row, over the largest output,
    in float32 at least and without quantization; likewise of what the block leaves beside it. What
    is more than rounding is remarked.
    """
    dtype = torch.promote_types(before.compute, torch.float32)
    was, now = (b.exact().computing(dtype) for b in (before, after))
    x = before.x[:1].to(before.device, dtype)
    given = picked(before.context.given, slice(0, 1))
    expected, left = was.passed(x, given=given)
    found, now_left = now.passed(x, given=given)
    pairs = [(found, expected), *((now_left[path], t) for path, t in left.items())]
    errors = [
        float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
        for one, other in pairs
        if other.is_floating_point()
    ]
    error = max(*errors, after.notes.get("fold_error", 0.0))
    noted = after.with_notes(fold_error=error)
    if error <= _ROUNDING:
        return noted
    return noted.remarked(
        f"'{before.name}' computes something else since it was rewritten, by {error:.2g} of its "
        "largest output on one row: a limit cuts its activations, or a token goes to other "
        "experts. Recipes that rewrite nothing (rtn, gptq) are free of that"
    )


def fold_values(block: Block, factor: Tensor) -> Block:
    """Divide attention's values by a positive factor per channel and multiply the output linear's
    columns by it.

    Unlike `fold`, also where several query heads share a head of keys and values.

    Args:
        factor: (key and value heads * width,) > 0.
    """
    heads = block.graph.heads
    if heads is None or heads.norm is not None:
        raise ValueError("the values of this family cannot take a factor")
    wide = factor.double()
    changes, _ = _into_rows(block, heads.values, wide, None)
    key = f"{heads.output}.weight"
    shared = heads.count * heads.width // len(factor)
    changes[key] = (block.weights[key].double() * repeated(wide, heads.width, shared)).to(
        block.weights[key].dtype
    )
    return block.with_weights(changes)


def repeated(values: Tensor, width: int, times: int) -> Tensor:
    """(heads * width,) -> (heads * times * width,): what each head's channels become where
    ``times`` query heads share it.
    """
    return values.reshape(-1, 1, width).expand(-1, times, -1).reshape(-1)
