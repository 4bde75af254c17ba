"""Recipe: what to do, as a value. `lowbit.recipe.toml` reads and writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from ..errors import LowbitError
from ..grid import ActivationGrid, AnyGrid, PerToken
from ..grid.names import Scheme, of_kind, shared_codebook, without_kind
from ..methods import METHODS, ONCE, ROLES, RTN, Entry
from ..model.calibration import Calibration
from ..model.model import BlockMethod
from . import toml

_REASONS = {  # of the order of roles, by the one that comes too late
    "rotation": "rotations mix the channels others scale",
    "transform": "what changes weights or ranges comes before what codes them",
    "clip": "what changes weights or ranges comes before what codes them",
}


@dataclass(frozen=True)
class Recipe:
    """A grid, exceptions by name, and methods in order. Runs nothing by itself.

    Attributes:
        grid: for every linear that no override names.
        methods: applied to each block in this order, which is that of their roles; what they leave
            uncoded is rounded to nearest.
        overrides: (pattern, grid), shell patterns on full linear names, or on their ends behind a
            dot, such as "mlp.down_proj" and "layers.0.*"; the last match counts.
        calibration: the text that methods learn from, where a run is not given another.
        activations: grid of every quantized linear's input, None for floating point.
        kv: grid of keys and values, None for floating point.
        name: a label for reports.

    Raises:
        LowbitError: methods in another order than that of their roles, or on a grid they cannot
            have, or one method twice with different options.
    """

    grid: AnyGrid
    methods: tuple[BlockMethod, ...] = (RTN(),)
    overrides: tuple[tuple[str, AnyGrid], ...] = field(default=())
    calibration: Calibration = field(default_factory=Calibration)
    name: str = "custom"
    activations: ActivationGrid | None = None
    kv: PerToken | None = None

    def __post_init__(self) -> None:
        named = [(name, entry.role) for name, entry, _ in self.entries]
        for at, (name, role) in enumerate(named):
            for before, (earlier, other) in enumerate(named[:at]):
                _check_order(earlier, other, name, role)
                if name == earlier and self.methods[at] != self.methods[before]:
                    raise LowbitError(
                        f"'{name}' is in this recipe twice with other options, and a recipe has "
                        "one table of options for a method: leave one of the two out."
                    )
        clips = [(n, e.fixes_ranges(m)) for n, e, m in self.entries if e.role == "clip"]
        for (name, fixed), (later, _) in pairwise(clips):
            if fixed:
                raise LowbitError(
                    f"'{later}' after '{name}' in a recipe: both fix the ranges of weights, which "
                    "can be done once. Leave one of the two out."
                )
        patterns = [pattern for pattern, _ in self.overrides]
        for pattern in patterns:
            if patterns.count(pattern) > 1:
                raise LowbitError(f"override '{pattern}' is in this recipe twice: leave one out.")
        for _, entry, method in self.entries:
            for grid in (self.grid, *(g for _, g in self.overrides)):
                entry.check(method, grid)

    @property
    def entries(self) -> list[tuple[str, Entry, BlockMethod]]:
        """Each method with its name and its row of `METHODS`."""
        rows = {entry.kind: (name, entry) for name, entry in METHODS.items()}
        for method in self.methods:
            if type(method) not in rows:
                raise LowbitError(
                    f"{type(method).__name__} is no method of lowbit.methods.METHODS: add a row."
                )
        return [(*rows[type(method)], method) for method in self.methods]

    @property
    def scheme(self) -> Scheme:
        """The bits of weights, activations, keys and values."""
        activations = self.activations.bits if self.activations else None
        return Scheme(self.grid, activations, self.kv.bits if self.kv else None)

    def with_scheme(self, scheme: Scheme) -> Recipe:
        """The recipe for other bits; how activations, keys and values are quantized stays as the
        recipe has it.
        """
        activations: ActivationGrid | None = None
        kv: PerToken | None = None
        if (bits := scheme.activation_bits) is not None:
            activations = replace(self.activations or PerToken(bits), bits=bits)
        if (bits := scheme.kv_bits) is not None:
            kv = replace(self.kv or PerToken(bits), bits=bits)
        grid = of_kind(scheme.weights, self.grid)
        return replace(self, grid=grid, activations=activations, kv=kv)

    def grid_of(self, linear: str) -> AnyGrid:
        """The grid of a linear by its full name."""
        chosen = (g for pattern, g in reversed(self.overrides) if _matches(linear, pattern))
        return next(chosen, self.grid)

    @property
    def outliers(self) -> str | None:
        """The option by which weights are kept in floating point; None if none are."""
        found = (entry.outliers(method) for _, entry, method in self.entries)
        return next((option for option in found if option is not None), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written to TOML and to report.json."""
        grids = [self.grid, *(g for _, g in self.overrides)]
        per = shared_codebook(grids)
        # What all grids have in common is said once; else each name says it.
        plain = grids if per is None else [without_kind(g) for g in grids]
        scheme = replace(self.scheme, weights=plain[0])
        out: dict[str, Any] = {"name": self.name, "scheme": str(scheme)}
        out["methods"] = [name for name, _, _ in self.entries]
        if per is not None:
            out["codebook"] = per
        if self.overrides:
            named = zip(self.overrides, plain[1:], strict=True)
            out["overrides"] = {pattern: str(Scheme(g)) for (pattern, _), g in named}
        out["calibration"] = dataclasses.asdict(self.calibration)
        for key, grid in (("activations", self.activations), ("kv", self.kv)):
            if grid is not None:
                out[key] = {k: v for k, v in dataclasses.asdict(grid).items() if k != "bits"}
        for name, _, method in self.entries:
            options = dataclasses.asdict(method)  # type: ignore[call-overload]
            if options:
                out[name] = options
        return out

    def to_toml(self) -> str:
        """The recipe as a TOML document that `Recipe.from_toml` reads back to an equal value."""
        return toml.written(self.as_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Raises:
            LowbitError: an unknown key, method, option or value, named with ``origin``.
        """
        return cls(**toml.read(data, origin))

    @classmethod
    def from_toml(cls, text: str, origin: str = "recipe") -> Recipe:
        """A recipe from a TOML document; see `from_dict`."""
        return cls.from_dict(toml.parsed(text, origin), origin)


def _matches(linear: str, pattern: str) -> bool:
    return fnmatchcase(linear, pattern) or fnmatchcase(linear, f"*.{pattern}")


def _check_order(earlier: str, other: str, name: str, role: str) -> None:
    """Refuse a method of this role behind an earlier one of another.

    Raises:
        LowbitError: naming both, and why.
    """
    if role == "rotation":
        raise LowbitError(
            f"'{name}' must come first in a recipe, before '{earlier}': {_REASONS[role]}."
        )
    before, after = ROLES.index(other), ROLES.index(role)
    if (role == other and role in ONCE) or (after < before and role == "solver"):
        raise LowbitError(
            f"'{name}' after '{earlier}' in a recipe would do nothing: everything is coded by then."
        )
    if after < before:
        why = _REASONS.get(role, f"a {role} comes before a {other}")
        if other == "clip":
            why = "what scales weights comes before what fixes their ranges"
        raise LowbitError(f"'{name}' after '{earlier}' in a recipe: {why}.")
