"""Bits of single linears, as a user writes them: patterns, or a file that names linears."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LowbitError
from ..grid import AnyGrid
from ..grid.names import weights_only
from .recipe import Recipe

CHOICE = "choice.json"
_FORM = (
    "--bits takes PATTERN=BITS,... such as 'mlp.down_proj=4,layers.0.*=8', or a .json file that "
    f"gives linears their bits, such as the {CHOICE} of an artifact"
)


def with_bits(recipe: Recipe, text: str) -> Recipe:
    """A recipe with other bits for some linears.

    Args:
        text: "PATTERN=WIDTH,...", or a .json file of an object {pattern: width}. Patterns are
            those of `Recipe.overrides`, the last one that matches counts. A width is a number of
            bits, of the recipe's own kind of grid, or a scheme.

    Raises:
        LowbitError: no such file, or not of this form; bits that the grid cannot have.
    """
    given = _of_file(Path(text)) if text.endswith(".json") else _of_text(text)
    found = {pattern: _grid(recipe.grid, pattern, width) for pattern, width in given.items()}
    kept = tuple((p, g) for p, g in recipe.overrides if p not in found)
    return replace(recipe, overrides=(*kept, *found.items()))


def choice(recipe: Recipe, linears: list[str]) -> dict[str, str] | None:
    """The scheme of every linear, as `with_bits` reads it; None if they have all the same."""
    found = {n: str(recipe.grid_of(n).name) for n in linears}
    return found if len(set(found.values())) > 1 else None


def _of_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise LowbitError(f"cannot read '{path}': {e.strerror or e}. {_FORM}.") from e
    except ValueError as e:
        raise LowbitError(f"'{path}' is not JSON: {e}. {_FORM}.") from e
    if not isinstance(found, dict) or not found:
        raise LowbitError(f"'{path}' holds no object of linears and their bits. {_FORM}.")
    return found


def _of_text(text: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for part in text.split(","):
        pattern, equals, width = (t.strip() for t in part.partition("="))
        if not pattern or not equals or not width:
            raise LowbitError(f"'{part}' in --bits: {_FORM}.")
        if pattern in out:
            raise LowbitError(f"'{pattern}' is in --bits twice: leave one out.")
        out[pattern] = width
    return out


def _grid(grid: AnyGrid, pattern: str, width: Any) -> AnyGrid:
    if isinstance(width, str) and not width.isdigit():
        return weights_only(width)
    if isinstance(width, bool) or not isinstance(width, (int, str)):
        raise LowbitError(f"'{pattern}' gets {width!r}: {_FORM}.")
    try:
        return grid.with_bits(int(width))
    except ValueError as e:
        raise LowbitError(f"'{pattern}' gets {width} bits: {e}.") from e
