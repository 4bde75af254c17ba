"""Entry: what the rest of the library may know of a method. One row of the table `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..grid import AnyGrid
from ..model.model import BlockMethod, Stage
from .cost import Cost, Shapes, passes

Role = Literal["rotation", "transform", "clip", "solver", "learner", "refiner", "polish"]
"""What a method does to a weight, in the only order that makes sense.

    rotation    mixes channels, before others look at them
    transform   scales or moves channels; weights stay free
    clip        fixes ranges; weights are ranged
    solver      codes weights
    learner     codes what is left, or moves codes by what it learns
    refiner     changes what codes leave free, such as biases and norms
    polish      trains what codes leave free end to end, after all blocks
"""
ROLES: tuple[Role, ...] = get_args(Role)
ONCE: tuple[Role, ...] = ("rotation", "solver", "polish")  # a second one would find nothing to do


@dataclass(frozen=True)
class Decisive:
    """What decides a run's bytes besides the recipe's text.

    Attributes:
        files: paths that the method reads. bfloat16_steps: it makes steps in bfloat16 here.
        gradients: it makes steps by gradients, for which experts may be computed in several ways.
        rounding: the version of soft rounding that it takes here; None if it takes none.
    """

    files: tuple[str, ...] = ()
    bfloat16_steps: bool = False
    gradients: bool = False
    rounding: str | None = None


def anything(method: Any, grid: AnyGrid) -> None:
    """Every grid will do."""


def unchanged(method: Any, grid: AnyGrid) -> None:
    """Nothing is wanted of the whole model."""


def nothing_more(method: Any, grid: AnyGrid, rows: int, width: int) -> float:
    """No byte beyond the grid's."""
    return 0.0


def as_its_role(method: Any) -> bool:
    """A clip fixes ranges; of other roles nobody asks."""
    return True


def none_kept(method: Any) -> None:
    """No weight stays in floating point."""


def no_others(method: Any, length: int) -> int:
    """The calibration's rows are enough."""
    return 0


def the_recipe_alone(method: Any, device: torch.device) -> Decisive:
    """Nothing but the recipe's text decides."""
    return Decisive()


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        kind: the dataclass of its knobs, `Block -> Block`.
        role: its place in a recipe.
        cost: (method, shapes) -> what it takes on one block.
        check: (method, grid) -> None, or LowbitError before any work.
        before: (method, grid of most linears) -> what it wants of the whole model before the
            blocks, or None.
        extra_bytes: (method, grid, out, in) -> bytes of a weight beyond the grid's.
        outliers: (method) -> the option by which it keeps weights in floating point, or None.
        fixes_ranges: (method) -> whether this clip does, so that no other can come after it.
        decides: (method, device) -> what decides its result besides its knobs.
        further: (method, tokens of a row) -> rows that it wants to be drawn besides the
            calibration's.
    """

    kind: Callable[..., BlockMethod]
    role: Role
    cost: Callable[[Any, Shapes], Cost] = passes
    check: Callable[[Any, AnyGrid], None] = anything
    before: Callable[[Any, AnyGrid], Stage | None] = unchanged
    extra_bytes: Callable[[Any, AnyGrid, int, int], float] = nothing_more
    outliers: Callable[[Any], str | None] = none_kept
    fixes_ranges: Callable[[Any], bool] = as_its_role
    decides: Callable[[Any, torch.device], Decisive] = the_recipe_alone
    further: Callable[[Any, int], int] = no_others
