"""Parameters of blocks that are neither matrices nor vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import LowbitError
from .skeleton import CONVOLUTIONS

_SMALL = 0.1  # of what is quantized of the block


def check_forms(blocks: Mapping[str, tuple[nn.Module, Sequence[str]]]) -> tuple[str, ...]:
    """Refuse blocks that would stay in floating point for the most part because the form of their
    parameters is not known (experts that are fused in another way than those that are).

    Args:
        blocks: name -> block, and the linears of it that are quantized.

    Returns:
        remarks: see `remark_on`.

    Raises:
        LowbitError: naming a parameter.
    """
    return remark_on(
        [
            f"{name}.{parameter}"
            for name, (block, linears) in blocks.items()
            for parameter in unknown_in(block, linears, name)
        ]
    )


def unknown_in(block: nn.Module, linears: Sequence[str], name: str) -> tuple[str, ...]:
    """Names inside a block of its parameters of a form that is not known.

    Args:
        linears: of the block, that are quantized. name: of the block, for errors.

    Raises:
        LowbitError: they are more than a small part of what is quantized.
    """
    found = {
        f"{path}.{own}": parameter
        for path, module in block.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2 and not isinstance(module, CONVOLUTIONS)
    }
    quantized = sum(block.get_parameter(f"{n}.weight").numel() for n in linears)
    if sum(p.numel() for p in found.values()) > _SMALL * quantized:
        first, parameter = next(iter(found.items()))
        raise LowbitError(
            f"'{name}.{first}' is a {parameter.dim()}-D parameter of a form that is not known; "
            "nothing was written."
        )
    return tuple(found)


def remark_on(kept: Sequence[str]) -> tuple[str, ...]:
    """A sentence that names parameters of unknown forms, by their full names; none without one."""
    if not kept:
        return ()
    more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
    return (f"'{kept[0]}'{more} of more than two dimensions stay in the model's own dtype",)
