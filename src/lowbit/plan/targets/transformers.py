"""transformers, which every artifact is proved with: as it is, or after `import lowbit`."""

from __future__ import annotations

from ...formats import compressed_tensors as ct
from ...formats import native
from ...formats.packing import said, stays_packed
from .base import Planned, Verdict, tally

# Bits whose codes cross words, packed otherwise before compressed-tensors 0.17.
_STRADDLING = (
    3,
    5,
    6,
    7,
)


def judge(p: Planned) -> Verdict:
    """It takes everything that `quantize` writes."""
    name = "transformers"
    if p.beyond is not None:
        packed = all(map(stays_packed, p.grids.values()))
        weights = "stay packed" if packed else "are decoded at the first use"
        return Verdict(
            name,
            True,
            native.NAME,
            tally(map(said, p.grids.values())),
            requires="this library",
            notes=(
                f"after 'import lowbit'; the format of lowbit, for {p.beyond}",
                f"weights {weights}"
                + (", quantized activations are active" if p.recipe.activations else ""),
            ),
        )
    new = any(g.bits in _STRADDLING for g in p.uniform.values())
    return Verdict(
        name,
        True,
        ct.NAME,
        tally(map(said, p.grids.values())),
        requires=f"compressed-tensors {'0.17' if new else '0.15'} or newer",
        notes=("weights become 16-bit at load or in the first forward pass: no memory is saved",)
        + (("activations are quantized in every forward pass",) if p.recipe.activations else ()),
    )
