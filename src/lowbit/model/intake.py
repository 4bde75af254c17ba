"""What a checkpoint must be to be quantized: floats of a causal language model, all of them, and
nothing quantized before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

import torch

from ..errors import LowbitError
from .checkpoint import FLOATS, Checkpoint, Stored
from .declared import check_declared

# Last parts of names under which quantizers store codes, scales and tables, beside or in place of a
# weight.
_OF_QUANTIZERS = {
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "biases",
    "absmax",
    "quant_map",
    "nested_absmax",
    "quant_state",
    "SCB",
    "codebooks",
    "codes",
    "trellis",
    "suh",
    "svh",
    "mcg",
    "mul1",
    "_scale",
    "_blocks",
    "_scales",
}


def check_source(checkpoint: Checkpoint) -> None:
    """Refuse what is no source at all: an artifact, an export, or what `check_declared` refuses.

    Raises:
        LowbitError: naming what it is.
    """
    report = checkpoint.file("report.json") if checkpoint.folder is not None else None
    if (
        report is not None
        and '"lowbit"' in report.read_text(encoding="utf-8", errors="replace")[:4096]
    ):
        raise LowbitError(
            f"'{checkpoint.name}' is an artifact of lowbit ({report.name}) and quantized already: "
            "start from the model it was made of."
        )
    check_declared(checkpoint.config_json, checkpoint.name)


def check_floats(
    checkpoint: Checkpoint,
    stored: Mapping[str, Stored],
    wanted: Iterable[str],
    prefixes: Iterable[str],
) -> tuple[str, ...]:
    """Refuse a source of which anything that will be read is quantized and not dequantized on
    reading.

    Args:
        stored: of the checkpoint. wanted: full names of the weights that will be read.
        prefixes: "model.layers.0." and so on, of the blocks that will be read.

    Returns:
        remarks: what was dequantized; or config.json speaks of a quantization which the weights do
            not have.

    Raises:
        LowbitError: naming the tensor, and its dtype if that is what is wrong.
    """
    said = checkpoint.quantized_by
    by = f" ({said})" if said else ""
    inside, own = tuple(prefixes), frozenset(wanted)
    for name in sorted(own):
        kind = stored[name].kind if name in stored else "F32"  # what is missing is named elsewhere
        if kind not in FLOATS:
            raise LowbitError(
                f"tensor '{name}' of '{checkpoint.name}' is stored as {kind}{by}: {_remedy(kind)}"
            )
    for name in stored:
        if name not in own and name.startswith(inside) and is_of_quantizer(name):
            raise LowbitError(
                f"'{checkpoint.name}' is quantized already{by}: it holds '{name}'. Start from the "
                "model in 16 or 32 bits."
            )
    if said is None or checkpoint.remarks:
        return checkpoint.remarks
    what = said.replace(" says ", " of ")
    return (f"config.json has a {what}, but all weights are floats: it is left out",)


def is_leftover(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> bool:
    """Whether config.json has a quantization_config which nothing in the checkpoint bears out: all
    tensors are plain floats.
    """
    said = checkpoint.config_json.get("quantization_config")
    if not said or said.get("quant_method") == "bitnet":
        return False
    return all(t.kind in FLOATS and not is_of_quantizer(n) for n, t in stored.items())


def check_read_as_floats(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], unused: Container[str]
) -> None:
    """Refuse raw codes that a loader took for weights.

    Args:
        unused: names of tensors that the loader did not need.

    Raises:
        LowbitError: naming the tensor and its dtype.
    """
    for name, t in stored.items():
        if (
            name.endswith((".weight", ".bias"))
            and t.kind not in (*FLOATS, "F64")
            and name not in unused
        ):
            raise LowbitError(
                f"tensor '{name}' of '{checkpoint.name}' is stored as {t.kind}: {_remedy(t.kind)}"
            )


def is_of_quantizer(name: str) -> bool:
    """Whether a tensor's name is one under which quantizers store codes, scales or tables."""
    last = name.rpartition(".")[2]
    return (
        last in _OF_QUANTIZERS
        or any(last.endswith(e) for e in _OF_QUANTIZERS if e.startswith("_"))
        or ".quant_state." in name
    )


def _remedy(kind: str) -> str:
    if kind == "F64":
        return (
            "lowbit reads F32, F16 and BF16. Save the model in one of these "
            "(model.float().save_pretrained)."
        )
    return (
        "every weight must be F32, F16 or BF16, for scales of other types are not applied. Start "
        "from the model in 16 or 32 bits."
    )


def dtype_of_most(stored: Mapping[str, Stored], linears: Iterable[str]) -> torch.dtype:
    """The dtype in which most weights of these linears are stored; of equal shares the first one's.

    Args:
        linears: full names of their weights, all in `FLOATS`.
    """
    count: Counter[str] = Counter()
    for name in linears:
        count[stored[name].kind] += stored[name].numel
    return FLOATS[count.most_common(1)[0][0]]
