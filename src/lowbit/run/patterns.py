"""Patterns on names by which an artifact's config.json says which parts of blocks are meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..grid import InputQuantizer, Rotation
from ..model.graph import Described
from ..model.model import Model
from ..model.wrapper import is_wrapper

Part = tuple[int, str]  # number of a block, name inside it


def patterns(described: Described, parts: Sequence[Part], others: Collection[str]) -> list[str]:
    """Patterns that match some parts of blocks: one for a name that is the same in all of them, one
    for each block where that would match something else.

    Args:
        others: full names that must not match.
    """
    layers = described.frame.layers.rpartition(".")[2]  # as the model without its head has it, too
    found: list[str] = []
    for name in dict.fromkeys(name for _, name in parts):
        if any(other.endswith(f".{name}") for other in others):
            found += [f"*{layers}.{i}.{n}" for i, n in parts if n == name]
        else:
            found.append(f"*.{name}")
    return found


def attention_patterns(model: Model) -> list[str]:
    """Patterns of the modules whose keys and values the finished model quantizes."""
    source, parts, others = model.source, list[Part](), list[str]()
    for i in range(len(source)):
        name = source.graph(i).attention
        if name is not None:
            parts.append((i, name))
        inside = (n for n, _ in source.block_module(i).named_modules() if n and n != name)
        others += [f"{source.block_name(i)}.{n}" for n in inside]
    found = patterns(source.described, parts, others)
    if not is_wrapper(source.whole_config):
        return found
    # Towers have attention of the same name: only that of the text model is meant, inside of the
    # larger class and in a class of its own.
    linear = next(iter(source.linear_shapes()))
    module = source.written.spellings(linear)[0].removeprefix("model.")
    root = module.removesuffix(linear.removeprefix(source.frame.layers))
    layers = source.frame.layers.rpartition(".")[2]
    tails = [p.removeprefix(f"*{layers}.") if p.startswith(f"*{layers}.") else p for p in found]
    roots = f"*{root}", source.frame.layers, layers
    return [f"{r}.{tail}" for r in roots for tail in tails]


def input_patterns(model: Model) -> dict[str, InputQuantizer]:
    """Pattern on full linear names -> how the finished model reads the inputs of these linears."""
    source = model.source
    alike: list[tuple[Rotation, list[Part]]] = []
    for i in range(len(source)):
        for name in source.graph(i).linears:
            rotation = model.online.get(f"{source.block_name(i)}.{name}")
            if rotation is not None:
                _parts_of(alike, rotation).append((i, name))
    found: dict[str, InputQuantizer] = {}
    linears = source.described.linears
    for rotation, parts in alike:
        own = {f"{source.block_name(i)}.{name}" for i, name in parts}
        others = [name for name in linears if name not in own]
        for pattern in patterns(source.described, parts, others):
            found[pattern] = InputQuantizer(rotation, model.activations)
    if model.activations is not None:
        found["*"] = InputQuantizer(grid=model.activations)
    return found


def _parts_of(alike: list[tuple[Rotation, list[Part]]], rotation: Rotation) -> list[Part]:
    """The parts that are rotated likewise so far."""
    for other, parts in alike:
        if _equal(other, rotation):
            return parts
    parts = list[Part]()
    alike.append((rotation, parts))
    return parts


def _equal(one: Rotation, other: Rotation) -> bool:
    if one is other:
        return True
    if len(one.factors) != len(other.factors):
        return False
    return all(
        a == b if isinstance(a, int) or isinstance(b, int) else torch.equal(a, b)
        for a, b in zip(one.factors, other.factors, strict=True)
    )
