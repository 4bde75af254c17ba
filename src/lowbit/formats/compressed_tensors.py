"""`quantization_config` of compressed-tensors: weights that transformers and vLLM load without this
library, in the tensors of every layout that has a scheme there.

A group of linears on one grid is a config group with the name of its format. The format of the
whole is that of its groups, or "mixed-precision" where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import LowbitError
from ..grid import ActivationGrid, AnyGrid, PerToken
from . import LAYOUTS, affine
from .layout import Scheme

NAME = "compressed-tensors"
_MIXED = "mixed-precision"


def scheme_of(grid: AnyGrid) -> Scheme | None:
    """What the format says of weights on a grid; None if it cannot."""
    return LAYOUTS[type(grid)].scheme(grid) if type(grid) in LAYOUTS else None


def beyond(grids: Iterable[AnyGrid]) -> str | None:
    """Weights that the format cannot say, in words; None if it can say them all."""
    for grid in grids:
        if scheme_of(grid) is None:
            return LAYOUTS[type(grid)].kind if type(grid) in LAYOUTS else str(grid)
    return None


def check_mixed(grids: Iterable[AnyGrid], dtype: torch.dtype | None = None) -> None:
    """Refuse several grids that plain transformers loads only one at a time: it decodes while it
    loads, as some grids need, only where all linears have one scheme.

    Args:
        grids: each with a scheme. dtype: of the model; None if it is not known.

    Raises:
        LowbitError: there are several, and one of them needs that.
    """
    kinds = sorted(set(grids), key=str)
    said = {g: s for g in kinds if (s := scheme_of(g)) is not None}
    if len(kinds) < 2:
        return
    if any(s.unpacked for s in said.values()):
        raise LowbitError(
            "plain transformers loads mixed grids only if all are symmetric: add 'sym' to every "
            "scheme of the recipe, or use one for all linears."
        )
    for grid, scheme in said.items():
        if _while_loading(scheme, dtype):
            given = "another dtype" if dtype is None else _name(dtype)
            raise LowbitError(
                f"plain transformers decodes {grid} to {_name(scheme.decoded)}, and in a model in "
                f"{given} only if all linears are on it: use one scheme for all linears, or a "
                f"model in {_name(scheme.decoded)}."
            )


def _while_loading(scheme: Scheme, dtype: torch.dtype | None) -> bool:
    """Whether transformers must be told to decode while it loads a model in ``dtype``."""
    return scheme.unpacked or scheme.decoded not in (None, dtype)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def carries(grids: Iterable[AnyGrid], activations: ActivationGrid | None) -> bool:
    """Whether the format can say how activations are quantized, and its loaders do it.

    4 and 8 bits, symmetric integers on both sides: transformers ignores the activations of
    asymmetric weights, and vLLM has no kernels for others. Full range, since that is the scale that
    transformers computes; vLLM's is larger by 0.4 % at 8 bits.
    """
    if activations is None:
        return True
    a = activations
    return (
        isinstance(a, PerToken)
        and a.full_range
        and a.clip == 1
        and a.bits in (4, 8)
        and all(_symmetric(scheme_of(g)) for g in grids)
    )


def _symmetric(scheme: Scheme | None) -> bool:
    """Whether weights are symmetric integers."""
    w = {} if scheme is None else scheme.weights
    return w.get("type") == "int" and bool(w["symmetric"])


def describe(
    grids: Mapping[str, AnyGrid],
    skipped: list[str],
    activations: ActivationGrid | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        grids: full linear name -> grid with a scheme, for every quantized linear.
        skipped: full names of the linears kept in floating point.
        activations: grid of the linears' inputs, one that `carries` allows.
        dtype: of the model; None if it is not known, which `check_mixed` then takes into account.

    Raises:
        LowbitError: a grid has no scheme.
    """
    kinds = sorted(
        set(grids.values()), key=lambda g: (-sum(x == g for x in grids.values()), str(g))
    )
    groups: dict[str, Any] = {}
    schemes: list[Scheme] = []
    for i, grid in enumerate(kinds):
        scheme = scheme_of(grid)
        if scheme is None:
            raise LowbitError(f"{NAME} has no layout for a {grid}.")
        schemes.append(scheme)
        names = sorted(n for n, g in grids.items() if g == grid)
        # As AutoModel calls them.
        names += [headless for n in names if (headless := n.partition(".")[2]) not in grids]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "input_activations": None if activations is None else _dynamic(activations),
            "output_activations": None,
            "format": scheme.format,
            "weights": dict(scheme.weights),
        }
    formats = sorted({s.format for s in schemes}) or [affine.FORMAT]
    while_loading = any(_while_loading(s, dtype) for s in schemes)
    return {
        "quant_method": NAME,
        "format": formats[0] if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted({*skipped, *_headless(skipped, grids), *_outside(grids)}),
        "config_groups": groups,
        "version": "0.17.1",
        **({"dequantize": True} if while_loading else {}),
    }


def _dynamic(activations: ActivationGrid) -> dict[str, Any]:
    """The "input_activations" of a config group."""
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _headless(skipped: Iterable[str], names: Iterable[str]) -> set[str]:
    """The linears that are kept inside the blocks, as AutoModel calls them, which takes the first
    part away.
    """
    trunks = tuple(_trunks(names))
    return {n.partition(".")[2] for n in skipped if trunks and n.startswith(trunks)}


def _outside(names: Iterable[str]) -> set[str]:
    """A pattern of all linears that lie outside of the blocks, whatever a model's class calls its
    head.

    A runtime that puts the model into a larger one adds to the front of the names, AutoModel takes
    the first part away.
    """
    trunks = _trunks(names)
    headless = {t.partition(".")[2] for t in trunks} - {""}
    inside = sorted([rf"(.*\.)?{re.escape(t)}" for t in trunks] + [re.escape(t) for t in headless])
    return {f"re:(?!{'|'.join(inside)})"} if inside else set()


def _trunks(names: Iterable[str]) -> set[str]:
    """What comes before the numbers of blocks in the names of their linears."""
    return {found[1] for n in names if (found := re.match(r"(.+?\.)\d+\.", n))}


def grid_of(config: Mapping[str, Any], name: str) -> AnyGrid | None:
    """The grid of a linear in an artifact with this `quantization_config`; None if it is not
    quantized.

    Raises:
        LowbitError: it is quantized in a way that no layout reads.
    """
    group = _group_of(config, name)
    if group is None:
        return None
    said = Scheme(group.get("format") or config["format"], group["weights"])
    found = (layout.read_scheme(said) for layout in LAYOUTS.values())
    grid = next((g for g in found if g is not None), None)
    if grid is None:
        raise LowbitError(f"'{name}' is in the format '{said.format}', which lowbit does not read.")
    return grid


def _group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    if any(_matches(entry, name) for entry in config["ignore"]):
        return None
    for group in config["config_groups"].values():
        if any(target == "Linear" or _matches(target, name) for target in group["targets"]):
            found: Mapping[str, Any] = group
            return found
    return None


def _matches(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def activations_of(config: Mapping[str, Any], name: str) -> PerToken | None:
    """The grid of a linear's input in an artifact with this `quantization_config`; None for
    floating point.
    """
    group = _group_of(config, name)
    a = None if group is None else group["input_activations"]
    return None if a is None else PerToken(a["num_bits"], symmetric=a["symmetric"], full_range=True)
