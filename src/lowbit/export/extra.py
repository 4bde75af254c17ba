"""What a format's own rounding adds to the error that quantization made."""

from __future__ import annotations

from torch import Tensor

from ..errors import VerificationError
from ..grid import Affine, AffineParams, KQuant, QTensor


def extra_error(tuned: QTensor, codes: Tensor, value: Tensor, name: str) -> float:
    """Mean square difference of the weights, as a share of scale^2 / 12, which rounding to the tuned grid costs on the average.

    Args:
        tuned: as quantized. codes: read back from the export, (out, in), in the terms of the tuned grid. value: (out, in) float64, what
            the export says. name: for errors.

    Raises:
        VerificationError: a code differs.
    """
    if not (tuned.codes == codes).all():
        raise VerificationError(f"'{name}': codes read back from the export differ from what was tuned.")
    if isinstance(tuned.grid, KQuant):
        scale, _ = tuned.grid.steps(tuned.params.double())
        before = tuned.grid.decode(tuned.codes, tuned.params.double())
    else:
        assert isinstance(tuned.grid, Affine)
        scale = tuned.params.scale.double()
        before = tuned.grid.decode(tuned.codes, AffineParams(scale, tuned.params.zero_point.double()))
    return float((value - before).square().mean() / (scale.square().mean() / 12).clamp(min=1e-300))
