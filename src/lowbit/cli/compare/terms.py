"""What a comparison holds equal, and the combinations of schemes and recipes that it measures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LowbitError
from ...evaluate import together
from ...grid.names import parse_scheme
from ...model.calibration import Calibration
from ...recipe import Recipe
from ...recipe.presets import load_recipe


@dataclass(frozen=True)
class Terms:
    """What is the same for every cell.

    Attributes:
        model: folder or hub id.
        calibration: text, samples and length that every recipe learns from, whatever it asks for
            itself.
        text: for perplexity, KL and top-1.
        length, windows: tokens in a window of the text, and the first so many windows (None: all).
        tasks: lm-eval task names.
        task_data: folder of their data (None: the hub).
        limit: the first so many examples of each task (None: all).
        seed, device: of every quantization.
        settings: "method.option=value", for the recipes that have the method.
    """

    model: str
    calibration: Calibration
    text: str
    length: int
    windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    seed: int = 0
    device: str = "auto"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One combination of a scheme and a recipe.

    "float" and "bfloat16" as a scheme stand for the original model in that arithmetic.
    """

    scheme: str
    recipe: str

    @property
    def name(self) -> str:
        """Return a file name, also where the recipe is a path."""
        if not self.recipe.endswith(".toml"):
            return f"{self.scheme}-{self.recipe}"
        digest = hashlib.sha256(self.recipe.encode()).hexdigest()[:8]
        return f"{self.scheme}-{Path(self.recipe).stem}-{digest}"


def cells(
    schemes: Sequence[str], recipes: Sequence[str], settings: Sequence[str] = ()
) -> list[Cell]:
    """Check every name and return all combinations, the original model first.

    Raises:
        LowbitError: an unknown scheme or recipe, one given twice, or a setting that no recipe
            takes.
    """
    for given, what in ((schemes, "scheme"), (recipes, "recipe")):
        if not given:
            raise LowbitError(f"no {what} to compare.")
        for name in given:
            if given.count(name) > 1:
                raise LowbitError(f"{what} '{name}' is given twice.")
    combinations = [Cell(s, r) for s in schemes for r in recipes]
    for setting in settings:
        if not any(_applicable(c.recipe, c.scheme, (setting,)) for c in combinations):
            raise LowbitError(
                f"--set {setting} is about something that none of the recipes {', '.join(recipes)} "
                "has."
            )
    for cell in combinations:
        resolved(cell.recipe, cell.scheme, settings)
    return [Cell("float", "original"), Cell("bfloat16", "original"), *combinations]


def _applicable(recipe: str, scheme: str, settings: Sequence[str]) -> list[str]:
    """Return the settings that have an effect: those about a method of the recipe, or about
    activations, keys and values that the scheme quantizes.
    """
    tables = set(load_recipe(recipe, scheme=parse_scheme(scheme)).as_dict()) | {"overrides"}
    tables.discard("calibration")  # the same for every cell
    return [s for s in settings if s.partition(".")[0].strip() in tables]


def resolved(recipe: str, scheme: str, settings: Sequence[str]) -> Recipe:
    """Return the recipe of a cell, with the settings that have an effect on it.

    Raises:
        LowbitError: an unknown recipe or scheme, or a bad value of a setting.
    """
    return load_recipe(
        recipe, scheme=parse_scheme(scheme), settings=_applicable(recipe, scheme, settings)
    )


def title_of(terms: Terms, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the title of a table of the rows measured so far."""
    batches = sorted({r["batch"] for r in rows if "batch" in r})
    passes = "".join(f", {together(n)}" for n in batches)
    begun = next((r["begin"] for r in rows if "begin" in r), "")
    calibration = terms.calibration
    return (
        f"{terms.model}; calibration {calibration.source}, {calibration.samples} x "
        f"{calibration.length} tokens, seed {terms.seed}; evaluation {terms.text}, windows of "
        f"{terms.length} tokens{begun}{passes}"
    )
