"""The list of blocks of a model, and which of them are of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import LowbitError

_FEW = 4  # blocks


def list_of_blocks(model: Any, name: str) -> str:
    """The longest list of modules of one model, the outermost of several."""
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    count = getattr(model.config, "num_hidden_layers", None)
    fitting = [n for n, size in lists.items() if size == count] or [
        n for n, size in lists.items() if size == max(lists.values(), default=0)
    ]
    if not fitting:
        raise LowbitError(
            f"'{name}' is a '{model.config.model_type}' model in which no list of blocks was "
            "found: it is not a decoder that can be quantized block by block."
        )
    found: str = min(fitting, key=lambda n: n.count("."))
    return found


def check_own_weights(blocks: Sequence[nn.Module], name: str) -> None:
    """Refuse blocks of which one has weights of another: each is quantized for its own inputs.

    Args:
        name: of the model, for errors.
    """
    owners: dict[nn.Parameter, int] = {}
    for i, block in enumerate(blocks):
        for path, p in block.named_parameters():
            if owners.setdefault(p, i) != i:
                raise LowbitError(
                    f"block {i} of '{name}' has the weights of block {owners[p]} ('{path}'): "
                    "models whose blocks share weights are not supported yet. Nothing was written."
                )


def check_one_list(model: Any, layers: str, name: str) -> None:
    """Refuse a model that has blocks of the same classes outside of its list of blocks.

    Args:
        layers: attribute path of the list. name: of the model, for errors.

    Raises:
        LowbitError: naming the first of them.
    """
    kinds = {type(block) for block in model.get_submodule(layers).children()}
    for path, module in model.named_modules():
        if type(module) in kinds and not path.startswith(f"{layers}."):
            raise LowbitError(
                f"'{name}' is a '{model.config.model_type}' model with blocks in '{layers}' and "
                f"others of their class outside of it ('{path}'): models with several lists of "
                "blocks are not supported yet. Nothing was written."
            )


def check_ends(model: Any, trunk: str, name: str) -> None:
    """Refuse a model of which what holds the blocks does not embed the tokens, or that has no head.

    Args:
        trunk: attribute path of what holds the list of blocks. name: of the model, for errors.

    Raises:
        LowbitError: saying what is missing.
    """
    what = f"'{name}' is a '{model.config.model_type}' model"
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding, head = None, None
    if embedding is None or all(m is not embedding for m in model.get_submodule(trunk).modules()):
        raise LowbitError(
            f"{what} whose blocks lie in '{trunk}', and its input embedding does not: models that "
            "do not embed tokens where their blocks are, are not supported yet. Nothing was "
            "written."
        )
    if head is None:
        raise LowbitError(
            f"{what} without an output head: lowbit quantizes causal language models. Nothing was "
            "written."
        )


def signature(block: nn.Module) -> tuple[Any, ...]:
    """What tells kinds of blocks apart: classes, parameters, switches."""
    modules = tuple(
        (n, type(m).__name__, tuple(sorted((k, v) for k, v in vars(m).items() if type(v) is bool)))
        for n, m in block.named_modules()
    )
    return modules, tuple((n, tuple(p.shape)) for n, p in block.named_parameters())


def limits(blocks: Sequence[nn.Module]) -> list[tuple[tuple[str, float], ...]]:
    """Floats set at the modules of each block, such as where activations are cut; without those
    that are another number in every block, which follow from its place.
    """
    found = [
        {
            f"{n}.{k}": v
            for n, m in b.named_modules()
            for k, v in vars(m).items()
            if type(v) is float
        }
        for b in blocks
    ]
    values: dict[str, list[float]] = {}
    for held in found:
        for key, value in held.items():
            values.setdefault(key, []).append(value)
    placed = {k for k, v in values.items() if len(v) > _FEW and len(set(v)) == len(v)}
    return [tuple(sorted((k, v) for k, v in held.items() if k not in placed)) for held in found]
