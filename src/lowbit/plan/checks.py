"""What can be refused before any work, from a recipe and the outline of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import LowbitError
from ..formats import LAYOUTS
from ..formats import compressed_tensors as ct
from ..formats.ggml import fitting_schemes
from ..model.outline import Outline
from ..recipe import Recipe


def check_divides(shapes: Mapping[str, tuple[int, int]], recipe: Recipe) -> None:
    """Refuse a group size that some linear cannot have.

    Args:
        shapes: full linear name -> (out, in).

    Raises:
        LowbitError: naming the linear, its width and the sizes that fit all; or an override that
            matches nothing.
    """
    for name, (_, width) in shapes.items():
        grid = recipe.grid_of(name)
        if type(grid) not in LAYOUTS:
            raise LowbitError(
                f"'{name}' would be on {grid}, which no format holds: choose another scheme, or "
                "add a row to lowbit.formats.LAYOUTS."
            )
        try:
            grid.check(width)
        except ValueError as e:
            if LAYOUTS[type(grid)].is_gguf:
                schemes = ", ".join(fitting_schemes(w for _, w in shapes.values()))
                raise LowbitError(
                    f"{e} of '{name}': schemes whose types of GGUF fit every linear of this model "
                    f"are {schemes or 'none'}."
                ) from e
            sizes = (256, 128, 64, 32, 16, 8)
            fitting = [str(g) for g in sizes if all(w % g == 0 for _, w in shapes.values())]
            raise LowbitError(
                f"{e} of '{name}'. Group sizes that fit every linear of this model: "
                f"{', '.join(fitting) or 'none of the usual ones'}, or a scheme without g (one "
                "scale per output channel)."
            ) from e
    for i, (pattern, grid) in enumerate(recipe.overrides):
        alone = Recipe(recipe.grid, (), ((pattern, grid),))
        if not any(alone.grid_of(n) is grid for n in shapes):
            raise LowbitError(
                f"override {i + 1}, '{pattern}', matches no linear of this model; names look like "
                f"'{next(iter(shapes))}'."
            )


def beyond_compressed_tensors(recipe: Recipe, outline: Outline) -> str | None:
    """What plain loaders of compressed-tensors could not run of the result; None if they can run it
    all.
    """
    grids = {recipe.grid_of(n) for n in outline.shapes}
    unsaid = ct.beyond(sorted(grids, key=str))
    if unsaid is not None:
        return unsaid
    if recipe.outliers:
        return f"weights kept in floating point ({recipe.outliers})"
    if recipe.kv is not None:
        return "quantized keys and values"
    if outline.online:
        return "online rotations (--set quarot.online=false leaves them out)"
    if outline.mixtures:
        return "experts, which transformers keeps fused"
    if not ct.carries(grids, recipe.activations):
        return (
            "these activations: compressed-tensors takes 4- or 8-bit ones with "
            "activations.symmetric and activations.full_range, no clip, under symmetric weights "
            "('sym' at the end of the scheme)"
        )
    if recipe.activations is not None and outline.described.flat:
        # compressed-tensors (0.20) in transformers keeps the first two dimensions when it takes
        # maxima: in a matrix, none are left to reduce.
        flat = " and ".join(outline.described.flat)
        return (
            f"quantized activations of {flat}, whose tokens would all get one scale in transformers"
        )
    return None


def check_cache(recipe: Recipe, outline: Outline) -> None:
    """Refuse quantized keys and values of a model that stores none.

    Raises:
        LowbitError: saying what to leave out.
    """
    if recipe.kv is not None and all(k.graph.attention is None for k in outline.kinds):
        raise LowbitError(
            "no block of this model is known to store keys and values: leave "
            f"KV{recipe.kv.bits} out of the scheme."
        )


def check_loadable(
    recipe: Recipe, outline: Outline, beyond: str | None, dtype: torch.dtype
) -> None:
    """Refuse what plain transformers could not load, before any work.

    Args:
        beyond: what compressed-tensors cannot carry; the library's own format has no such limit.
        dtype: of the checkpoint.

    Raises:
        LowbitError: several grids that its loader takes only one at a time.
    """
    if not beyond:
        ct.check_mixed({recipe.grid_of(n) for n in outline.shapes}, dtype)


def check_shared(recipe: Recipe, outline: Outline, samples: int, ranks: int) -> None:
    """Refuse what several processes cannot share.

    Raises:
        LowbitError: fewer rows than processes, or an activation grid by which a row's numbers
            depend on the rows it comes with.
    """
    if ranks == 1:
        return
    if samples < ranks:
        raise LowbitError(
            f"{ranks} processes cannot share {samples} calibration rows: use fewer, or more "
            "--samples."
        )
    grid = recipe.activations
    if grid is not None and grid.mixes_rows(bool(outline.described.flat)):
        remedy = grid.apart(bool(outline.described.flat))
        raise LowbitError(
            f"{grid} quantizes a row by what the rows of its batch hold, which depends on how they "
            f"are shared: use one process.{f' {remedy} keeps rows apart.' if remedy else ''}"
        )
