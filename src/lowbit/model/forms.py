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
        remarks: a sentence that names those that stay, where they are few numbers.

    Raises:
        LowbitError: naming a parameter.
    """
    kept: list[str] = []
    for block_name, (block, linears) in blocks.items():
        found = {
            f"{path}.{name}": parameter
            for path, module in block.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() > 2 and not isinstance(module, CONVOLUTIONS)
        }
        quantized = sum(block.get_parameter(f"{n}.weight").numel() for n in linears)
        if sum(p.numel() for p in found.values()) > _SMALL * quantized:
            name, parameter = next(iter(found.items()))
            raise LowbitError(
                f"'{block_name}.{name}' is a {parameter.dim()}-D parameter of a form that is not "
                "known; nothing was written."
            )
        kept += [f"{block_name}.{name}" for name in found]
    if not kept:
        return ()
    more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
    return (f"'{kept[0]}'{more} of more than two dimensions stay in the model's own dtype",)
