"""What a format's own rounding adds to the error that quantization made."""

from __future__ import annotations

from ..errors import VerificationError
from ..grid import AffineParams, QTensor


def extra_error(tuned: QTensor, held: QTensor, name: str) -> float:
    """Mean square difference of the weights, as a share of scale^2 / 12, which rounding to the tuned grid costs on the average.

    Args:
        tuned: as quantized. held: as read back from the export. name: for errors.

    Raises:
        VerificationError: a code differs.
    """
    if not (tuned.codes == held.codes).all():
        raise VerificationError(f"'{name}': codes read back from the export differ from what was tuned.")
    before, after = (_double(q) for q in (tuned, held))
    delta = after.decode(before.params.scale.dtype) - before.decode(before.params.scale.dtype)
    return float(delta.square().mean() / (before.params.scale.square().mean() / 12))


def _double(q: QTensor) -> QTensor:
    return QTensor(q.grid, q.codes, AffineParams(q.params.scale.double(), q.params.zero_point.double()))
