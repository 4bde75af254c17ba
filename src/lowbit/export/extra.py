"""What a format's own rounding adds to the error that quantization made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import VerificationError
from ..formats.dense import Weight
from ..grid import AffineParams, Coded, KQuant, KQuantParams

# Scale and offset of each group, (out, groups) float64: weight = scale * code - offset.
Steps = tuple[Tensor, Tensor]


def steps_of(q: Coded | Weight) -> Steps:
    """Of a weight on a uniform grid or a K-quant."""
    grid, params = q.grid, q.params
    if isinstance(grid, KQuant) and isinstance(params, KQuantParams):
        scale, offset = grid.steps(params.double())
        return scale, offset + scale * grid.middle
    assert isinstance(params, AffineParams)
    scale = params.scale.double()
    return scale, scale * params.zero_point.double()


def other_codes(name: str) -> VerificationError:
    """The error where an export does not hold the codes of a linear."""
    return VerificationError(
        f"'{name}': codes read back from the export differ from what was tuned."
    )


def extra_error(tuned: Steps, held: Steps, columns: int, codes: Callable[[], Tensor]) -> float:
    """Mean square difference of the weights, as a share of scale^2 / 12, which rounding to the
    tuned grid costs on the average.

    Codes are the same, so that sums over them are all that is needed, and not even those where no
    scale differs.

    Args:
        tuned: as quantized. held: what the export makes of the same codes; its groups divide the
            tuned ones, or the other way round. columns: inputs. codes: gives them, (out, in) uint8.
    """
    groups = max(tuned[0].shape[1], held[0].shape[1])
    (scale, offset), (scale_held, offset_held) = (
        [t if t.shape[1] == groups else t.repeat_interleave(groups // t.shape[1], 1) for t in pair]
        for pair in (tuned, held)
    )
    if torch.equal(scale, scale_held) and torch.equal(offset, offset_held):
        return 0.0
    ds, do = scale_held - scale, offset_held - offset
    total = do.square().sum() * (columns // groups)
    if bool(ds.any()):
        c = (
            codes().view(len(scale), groups, -1).float()
        )  # sums of at most 2^16 times a group's length: exact
        total = total + (ds.square() * c.square().sum(-1) - 2 * ds * do * c.sum(-1)).sum()
    numbers = len(scale) * columns
    return max(0.0, float(total / numbers / (scale.square().mean() / 12).clamp(min=1e-300)))
