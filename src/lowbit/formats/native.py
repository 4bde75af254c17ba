"""The library's own `quantization_config`: what compressed-tensors cannot say about activations,
keys, values and rotations.

Weights lie in the tensors of their grid's layout, see `lowbit.formats`. The config adds

    dtype        of the scales, to which decoded weights are rounded: quantized activations turn the
                 smallest differences of weights into whole steps. Scales keep it whatever dtype the
                 model is loaded in
    activations  {bits, symmetric, clip, full_range} of every quantized linear's input, {bits,
                 row_exponent, columns} for CrossQuant (version 3), {bits, threshold} for LLM.int8()
                 (version 4), or null
    rotations    pattern on linear names -> factors of an online rotation of its input
    kv           {bits, symmetric, clip, full_range, attention: pattern on module names, or several
                 in a list (version 6), rotation: factors or null}, or null
    tables       size -> rows of +-1 of the Hadamard matrices that are not Sylvester's, one
    hexadecimal number a row
    linears      full name -> what is not in config_groups: {codebook: {bits, per, group_size},
                 columns: bits -> count} for a weight on codebooks, stored as in
                 `lowbit.formats.codebook`; {outliers: count} for one with weights kept apart
                 (version 2); {kquant: kind} for one in blocks of llama.cpp, stored as in
                 `lowbit.formats.kquant` (version 5)
    experts      of a mixture of experts whose linears are quantized, each on its own: tail of a
                 linear's name in the files after transformers' own renaming -> its tail in the
                 model, where they differ; "*" for the expert's number (version 7)

Names of linears are those of their tensors.

A factor is {"identity": n}, {"sylvester": n} or {"table": n}. Models load through the transformers
quantizer in `lowbit.runtime`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, InputQuantizer, KVGrid, PerToken, Rotation, activation_grid
from ..grid.rotation import sylvester
from . import LAYOUTS
from . import compressed_tensors as ct

NAME = "lowbit"
VERSION = 5
_SEVERAL = 6  # of a config with several patterns of attention modules
_EXPERTS = 7  # of a config with experts
_READ = (1, 2, 3, 4, 5, 6, 7)
_BESIDE = {"columns", "outliers"}  # of an entry: what does not say which grid


def describe(
    grids: Mapping[str, AnyGrid],
    skipped: Sequence[str],
    dtype: torch.dtype,
    input_quantizers: Mapping[str, InputQuantizer],
    kv: tuple[KVGrid, Sequence[str]] | None,
    counts: Mapping[str, Mapping[str, Any]],
    experts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        grids: full linear name -> grid, for every quantized linear. skipped: linears kept in
            floating point.
        dtype: of the stored scales.
        input_quantizers: pattern on full linear names -> input quantizer, see
            `lowbit.run.patterns`; one activation grid for all.
        kv: of keys and values, and patterns on the names of the attention modules.
        counts: full linear name -> what `lowbit.formats.packing.counts` says of it, of which
            "columns" and "outliers" are taken.
        experts: see the module's docstring; None for a model without any that are quantized.

    Raises:
        LowbitError: linears have different activation grids.
    """
    tables: dict[str, list[str]] = {}
    plain = {n: g for n, g in grids.items() if ct.scheme_of(g) is not None}
    weights = ct.describe(plain, list(skipped))
    return {
        "quant_method": NAME,
        "version": _version(kv, experts),
        "format": weights["format"],
        "ignore": weights["ignore"],
        "config_groups": weights["config_groups"],
        "dtype": str(dtype).removeprefix("torch."),
        "activations": _activations(input_quantizers),
        "rotations": {
            pattern: _factors(r.rotation, tables)
            for pattern, r in input_quantizers.items()
            if r.rotation is not None
        },
        "kv": None if kv is None else _kv(*kv, tables),
        "tables": tables,
        "linears": _linears(grids, counts),
        **({} if experts is None else {"experts": dict(experts)}),
    }


def _version(kv: tuple[KVGrid, Sequence[str]] | None, experts: Mapping[str, str] | None) -> int:
    if experts is not None:
        return _EXPERTS
    return VERSION if kv is None or len(kv[1]) == 1 else _SEVERAL


def _activations(input_quantizers: Mapping[str, InputQuantizer]) -> dict[str, Any] | None:
    found = {r.grid for r in input_quantizers.values() if r.grid is not None}
    if len(found) > 1:
        raise LowbitError("linears of one model with different activation grids cannot be stored.")
    return next((asdict(grid) for grid in found), None)


def _kv(kv: KVGrid, attention: Sequence[str], tables: dict[str, list[str]]) -> dict[str, Any]:
    rotation = None if kv.rotation is None else _factors(kv.rotation, tables)
    said = attention[0] if len(attention) == 1 else list(attention)
    return {**asdict(kv.grid), "attention": said, "rotation": rotation}


def _linears(
    grids: Mapping[str, AnyGrid], counts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for kind, layout in LAYOUTS.items():
        for name in (n for n, grid in grids.items() if type(grid) is kind):
            entry = layout.entry(grids[name], counts.get(name, {}).get("columns", {}))
            if entry:
                out[name] = entry
    for name, found in counts.items():
        if "outliers" in found:
            out.setdefault(name, {})["outliers"] = found["outliers"]
    return out


def _factors(rotation: Rotation, tables: dict[str, list[str]]) -> list[dict[str, int]]:
    out = []
    for factor in rotation.factors:
        if isinstance(factor, int):
            out.append({"identity": factor})
        elif torch.equal(factor, sylvester(len(factor))):
            out.append({"sylvester": len(factor)})
        else:
            tables[str(len(factor))] = [
                hex(int("".join("1" if v > 0 else "0" for v in row), 2)) for row in factor.tolist()
            ]
            out.append({"table": len(factor)})
    return out


def _rotation(
    factors: Sequence[Mapping[str, int]], tables: Mapping[str, Sequence[str]]
) -> Rotation:
    out: list[Tensor | int] = []
    for factor in factors:
        ((kind, size),) = factor.items()
        if kind == "table":
            rows = [
                [1 if c == "1" else -1 for c in format(int(row, 16), f"0{size}b")]
                for row in tables[str(size)]
            ]
            out.append(torch.tensor(rows, dtype=torch.int8, device="cpu"))
        else:
            out.append(size if kind == "identity" else sylvester(size))
    return Rotation(tuple(out))


def check(config: Mapping[str, Any]) -> None:
    """Raise LowbitError if this version cannot read the config."""
    if config.get("quant_method") != NAME or config.get("version") not in _READ:
        raise LowbitError(
            f"quantization_config is of '{config.get('quant_method')}' version "
            f"{config.get('version')}; this version of lowbit reads "
            f"'{NAME}' versions up to {_READ[-1]}. Install the version of lowbit that made the "
            "artifact."
        )


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the stored scales."""
    found: torch.dtype = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[config["dtype"]]
    return found


def grid_of(config: Mapping[str, Any], name: str) -> AnyGrid | None:
    """The grid of a linear, also of a compressed-tensors config; None if it is not quantized.

    Raises:
        LowbitError: no layout reads what the config says of it.
    """
    entry = config.get("linears", {}).get(name, {})
    found = (layout.read_entry(entry) for layout in LAYOUTS.values())
    grid = next((g for g in found if g is not None), None)
    unread = sorted(set(entry) - _BESIDE)
    if grid is None and unread:
        raise LowbitError(
            f"'{name}' is on a grid that this version of lowbit does not know "
            f"('{unread[0]}'): install the version that made the artifact."
        )
    return grid or ct.grid_of(config, name)


def experts_of(config: Mapping[str, Any]) -> dict[str, str] | None:
    """How experts are named, see the module's docstring; None if none is quantized."""
    found: dict[str, str] | None = config.get("experts")
    return found


def columns_of(config: Mapping[str, Any], name: str) -> dict[int, int]:
    """Bits -> number of columns, by rising bits, of a weight whose columns may differ; empty for
    another.
    """
    said = config.get("linears", {}).get(name, {}).get("columns", {})
    return dict(sorted((int(b), n) for b, n in said.items()))


def outliers_of(config: Mapping[str, Any], name: str) -> int | None:
    """How many weights of a linear are kept apart; None without any."""
    found: int | None = config.get("linears", {}).get(name, {}).get("outliers")
    return found


def input_quantizer_of(config: Mapping[str, Any], name: str) -> InputQuantizer:
    """What happens to the input of the linear with this full name."""
    given = config["activations"]
    grid = None if given is None else activation_grid(given)(**given)
    factors = next(
        (f for pattern, f in config["rotations"].items() if fnmatchcase(name, pattern)), None
    )
    return InputQuantizer(None if factors is None else _rotation(factors, config["tables"]), grid)


def kv_of(config: Mapping[str, Any]) -> tuple[KVGrid, tuple[str, ...]] | None:
    """The grid of keys and values and patterns on the attention modules' names; None for floating
    point.
    """
    kv = config["kv"]
    if kv is None:
        return None
    rotation = None if kv["rotation"] is None else _rotation(kv["rotation"], config["tables"])
    said = kv["attention"]
    grid = PerToken(kv["bits"], kv["symmetric"], kv["clip"], kv["full_range"])
    return KVGrid(grid, rotation), (said,) if isinstance(said, str) else tuple(said)
