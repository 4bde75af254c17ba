"""GPTQ, AWQ and MLX: folders of safetensors with the same codes laid out anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from ..artifact.output import Output
from ..artifact.proof import Verification
from ..errors import LowbitError
from ..formats import LAYOUTS, awq, gptq, mlx
from ..formats import compressed_tensors as ct
from ..formats.by_name import FORMATS
from ..formats.dense import Dense
from ..formats.uniform import Uniform, as_uniform
from ..model.config import config_at
from .ahead import ahead
from .extra import extra_error, other_codes, steps_of
from .for_mlx import misread, settings
from .place import place
from .source import Source

TARGETS = (gptq.V1, gptq.V2, awq.NAME, mlx.NAME)


def export(source: Source, target: str, output: Output, python: str) -> Verification:
    """Write the folder.

    Raises:
        LowbitError: the artifact holds something that the format cannot say. VerificationError: a
            check failed.
    """
    format_ = FORMATS[target]
    source.only_weights(target)
    grids: dict[str, Uniform] = {}
    for name, grid in source.grids.items():
        found = as_uniform(grid)
        if found is None:
            only = "" if ct.scheme_of(grid) else ": only the format of lowbit carries them"
            raise LowbitError(
                f"'{source.folder}' has weights on {LAYOUTS[type(grid)].kind}, which {target} "
                f"cannot say{only}."
            )
        grids[name] = found
    described = _described(source, target, grids)
    known: dict[str, dict[str, Any]] = {}
    # Mlx-lm refuses names that its class does not know.
    left = source.copied if target == mlx.NAME else {}
    with place(source, output) as made:
        made.leave_out(left, "mlx-lm loads no tensor that its class does not know")
        made.write(
            "config.json",
            {**{k: v for k, v in source.config.items() if k != "quantization_config"}, **described},
        )
        said = json.loads((made.partial / "config.json").read_text())

        def packed() -> Iterator[tuple[str, dict[str, Dense], dict[str, Tensor]]]:
            """Files, their weights as they were, and all tensors as they will be."""
            for name, linears, others in source.shards(made.hashing):
                weights = {n: linear.packed() for n, linear in linears.items()}
                tensors = {n: t for n, t in others.items() if n not in left}
                for linear, q in weights.items():
                    for key, t in format_.pack(q, source.dtype, linear).items():
                        tensors[f"{linear}.{key}"] = t
                yield name, weights, tensors

        for name, weights, tensors in ahead(packed()):
            held = made.add(name, tensors)
            for linear, q in weights.items():
                back = format_.look(held, linear, said)
                if not (isinstance(back, Dense) and back.same_codes(q)):
                    raise other_codes(linear)
                size = sum(t.nbytes for t in format_.local(held, linear).values())
                known[linear] = {
                    "bytes": size,
                    "bits_per_weight": 8 * size / (len(q.words) * q.columns),
                    "extra_error": extra_error(
                        steps_of(q), steps_of(back), q.columns, partial(_codes, q)
                    ),
                }
        made.write_index()
        if target in (gptq.V1, gptq.V2):
            made.write("quantize_config.json", described["quantization_config"])
        return made.close(target, known, python)


def _codes(q: Dense) -> Tensor:
    return q.codes


def _described(source: Source, target: str, grids: dict[str, Uniform]) -> dict[str, Any]:
    """What config.json says of the weights, with its key; refuses what the format cannot say before
    anything is written.
    """
    if target == mlx.NAME:
        fault = misread(config_at(source.folder / "config.json"))
        if fault is not None:
            raise LowbitError(f"'{source.folder}' cannot go to MLX: {fault}")
    for name, (rows, columns) in source.shapes.items():
        if target in (gptq.V1, gptq.V2):
            gptq.check(grids[name], rows, columns, target, name)
        elif target == awq.NAME:
            awq.check(grids[name], rows, name)
        elif target == mlx.NAME:
            mlx.group_of(grids[name], columns, name)
    if target == mlx.NAME:
        return {**settings(source.config), "quantization": mlx.describe(grids, source.shapes)}
    if target == awq.NAME:
        return {"quantization_config": awq.describe(grids, source.skipped)}
    return {
        "quantization_config": gptq.describe(
            grids, source.skipped, target, f"lowbit:{source.report['lowbit']}"
        )
    }
