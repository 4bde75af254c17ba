"""GPTQ, AWQ and MLX: folders of safetensors with the same codes laid out anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import LowbitError
from ..formats import awq, gptq, mlx
from ..formats.layouts import LAYOUTS
from ..grid import Affine
from ..output import Output
from ..proof import Verification
from .extra import extra_error, steps_of
from .place import place
from .source import Source

TARGETS = (gptq.V1, gptq.V2, awq.NAME, mlx.NAME)


def export(source: Source, target: str, output: Output, python: str) -> Verification:
    """Write the folder.

    Raises:
        LowbitError: the artifact holds something that the format cannot say. VerificationError: a
            check failed.
    """
    layout = LAYOUTS[target]
    source.only_weights(target)
    grids = {n: g for n, g in source.grids.items() if isinstance(g, Affine)}
    if len(grids) < len(source.grids):
        raise LowbitError(
            f"'{source.folder}' has weights on codebooks, which {target} cannot say: only the "
            "format of lowbit carries them."
        )
    described = _described(source, target, grids)
    known: dict[str, dict[str, Any]] = {}
    # Mlx-lm refuses names that its class does not know.
    left = source.copied if target == mlx.NAME else {}
    with place(source, output) as made:
        made.leave_out(left, "mlx-lm loads no tensor that its class does not know")
        for name, coded, others in source.shards():
            tensors: dict[str, Tensor] = {n: t for n, t in others.items() if n not in left}
            for linear, q in coded.items():
                for key, t in layout.pack(q, source.dtype, linear).items():
                    tensors[f"{linear}.{key}"] = t
            held = made.add(name, tensors)
            for linear, q in coded.items():
                stored = layout.local(held, linear)
                known[linear] = {
                    "bytes": (size := sum(t.nbytes for t in stored.values())),
                    "bits_per_weight": 8 * size / q.codes.numel(),
                    "extra_error": extra_error(
                        q,
                        (back := layout.read(held, linear, described)).codes,
                        steps_of(back),
                        linear,
                    ),
                }
        made.write_index()
        made.write(
            "config.json",
            {**{k: v for k, v in source.config.items() if k != "quantization_config"}, **described},
        )
        if target in (gptq.V1, gptq.V2):
            made.write("quantize_config.json", described["quantization_config"])
        return made.close(target, known, python)


def _described(source: Source, target: str, grids: dict[str, Affine]) -> dict[str, Any]:
    """What config.json says of the weights, with its key; refuses what the format cannot say before
    anything is written.
    """
    for name, (rows, columns) in source.shapes.items():
        if target in (gptq.V1, gptq.V2):
            gptq.check(grids[name], rows, columns, target, name)
        elif target == awq.NAME:
            awq.check(grids[name], rows, name)
        elif target == mlx.NAME:
            mlx.group_of(grids[name], columns, name)
    if target == mlx.NAME:
        return {"quantization": mlx.describe(grids, source.shapes)}
    if target == awq.NAME:
        return {"quantization_config": awq.describe(grids, source.skipped)}
    return {
        "quantization_config": gptq.describe(
            grids, source.skipped, target, f"lowbit:{source.report['lowbit']}"
        )
    }
