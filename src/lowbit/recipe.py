"""Recipe: what to do, as a value that reads and writes TOML. `lowbit.loop` runs it."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from .errors import LowbitError, unknown
from .grid import ActivationGrid, Affine, Codebook, Grid, KQuant, PerToken, activation_grid
from .grid.codebook import Per
from .methods import CLAQ, METHODS, RTN, SOLVERS, Method, OmniQuant, QuaRot, TesseraQ
from .model.calibration import Calibration
from .scheme import Scheme, as_codebook, parse_scheme, scheme_name, weights_only

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# Of an option's number: no sensible one is near it, and what tensors count and multiply holds it.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Recipe:
    """A grid, exceptions by name, and methods in order. Runs nothing by itself.

    Attributes:
        grid: for every linear that no override names; codebooks are not mixed with others.
        methods: applied to each block in this order; what they leave uncoded is rounded to nearest.
        overrides: (pattern, grid), shell patterns on full linear names such as "*.down_proj"; the
            last match counts.
        calibration: the text that methods learn from, where a run is not given another.
        activations: grid of every quantized linear's input, None for floating point.
        kv: grid of keys and values, None for floating point.
        name: a label for reports.
    """

    grid: Grid
    methods: tuple[Method, ...] = (RTN(),)
    overrides: tuple[tuple[str, Grid], ...] = field(default=())
    calibration: Calibration = field(default_factory=Calibration)
    name: str = "custom"
    activations: ActivationGrid | None = None
    kv: PerToken | None = None

    def __post_init__(self) -> None:
        names = [_method_name(m) for m in self.methods]
        for at, method in enumerate(self.methods):
            before = next(
                (
                    n
                    for n, m in zip(names[:at], self.methods, strict=False)
                    if isinstance(m, SOLVERS)
                ),
                None,
            )
            if before and isinstance(method, SOLVERS) and not isinstance(method, TesseraQ):
                raise LowbitError(
                    f"'{names[at]}' after '{before}' in a recipe would do nothing: everything is "
                    "coded by then."
                )
            if before and not isinstance(method, SOLVERS):
                raise LowbitError(
                    f"'{names[at]}' after '{before}' in a recipe: what changes weights or ranges "
                    "comes before what codes them."
                )
            if isinstance(method, QuaRot) and at:
                raise LowbitError(
                    f"'{names[at]}' must come first in a recipe, before '{names[0]}': rotations "
                    "mix the channels others scale."
                )
            for grid in (self.grid, *(g for _, g in self.overrides)):
                if isinstance(method, CLAQ):
                    method.check(grid)
                if isinstance(method, OmniQuant) and not isinstance(grid, Affine):
                    raise LowbitError(
                        f"omniquant learns ranges of uniform grids, and {grid} has none: choose "
                        "another recipe or scheme."
                    )

    @property
    def scheme(self) -> Scheme:
        """The bits of weights, activations, keys and values."""
        grid = self.grid
        symmetric = isinstance(grid, Affine) and grid.symmetric
        weights = (
            grid if isinstance(grid, KQuant) else Affine(grid.bits, grid.group_size, symmetric)
        )
        return Scheme(
            weights,
            self.activations.bits if self.activations else None,
            self.kv.bits if self.kv else None,
        )

    @property
    def rotates_online(self) -> bool:
        """Whether the finished model rotates activations while it runs."""
        return any(isinstance(m, QuaRot) and m.online for m in self.methods)

    def with_scheme(self, scheme: Scheme) -> Recipe:
        """The recipe for other bits; how activations, keys and values are quantized stays as the
        recipe has it.
        """
        grid = (
            as_codebook(scheme.weights, self.grid.per)
            if isinstance(self.grid, Codebook)
            else scheme.weights
        )
        bits, kv_bits = scheme.activation_bits, scheme.kv_bits
        activations = (
            None if bits is None else replace(self.activations or PerToken(bits), bits=bits)
        )
        return replace(
            self,
            grid=grid,
            activations=activations,
            kv=None if kv_bits is None else replace(self.kv or PerToken(kv_bits), bits=kv_bits),
        )

    def grid_of(self, linear: str) -> Grid:
        """The grid of a linear by its full name."""
        return next(
            (g for pattern, g in reversed(self.overrides) if fnmatchcase(linear, pattern)),
            self.grid,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written to TOML and to report.json."""
        out: dict[str, Any] = {
            "name": self.name,
            "scheme": str(self.scheme),
            "methods": [_method_name(m) for m in self.methods],
        }
        if isinstance(self.grid, Codebook):
            out["codebook"] = self.grid.per
        if self.overrides:
            out["overrides"] = {pattern: scheme_name(g) for pattern, g in self.overrides}
        out["calibration"] = dataclasses.asdict(self.calibration)
        for key, grid in (("activations", self.activations), ("kv", self.kv)):
            if grid is not None:
                out[key] = {k: v for k, v in dataclasses.asdict(grid).items() if k != "bits"}
        for method in self.methods:
            options = dataclasses.asdict(method)
            if options:
                out[_method_name(method)] = options
        return out

    def to_toml(self) -> str:
        """The recipe as a TOML document that `Recipe.from_toml` reads back to an equal value."""
        data = self.as_dict()
        lines = [f"{k} = {_toml(v)}" for k, v in data.items() if not isinstance(v, dict)]
        for key, table in data.items():
            if isinstance(table, dict):
                lines += [
                    "",
                    f"[{key}]",
                    *(
                        f"{_toml(k) if key == 'overrides' else k} = {_toml(v)}"
                        for k, v in table.items()
                    ),
                ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Raises:
            LowbitError: an unknown key, method, option or value, named with ``origin``.
        """
        known = (
            "name",
            "scheme",
            "codebook",
            "methods",
            "overrides",
            "calibration",
            "activations",
            "kv",
            *METHODS,
        )
        for key in data:
            if key not in known:
                raise unknown(f"key in {origin}", key, known)
        names = data.get("methods", [])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise LowbitError(
                f"{origin}: 'methods' must be a list of method names ({', '.join(METHODS)})."
            )
        for name in names:
            if name not in METHODS:
                raise unknown(f"method in {origin}", name, METHODS)
        for key in METHODS:
            if key in data and key not in names:
                raise LowbitError(
                    f"{origin} sets options of '{key}', which is not among its methods {names}."
                )
        methods: tuple[Method, ...] = tuple(
            _built(METHODS[n], n, data.get(n, {}), origin) for n in names
        )
        calibration = _built(Calibration, "calibration", data.get("calibration", {}), origin)
        for key, kind in (("scheme", str), ("name", str), ("codebook", str), ("overrides", dict)):
            if key in data and not isinstance(data[key], kind):
                raise LowbitError(
                    f"{origin}: '{key}' must be {'a table' if kind is dict else 'a string'}, got "
                    f"{data[key]!r}."
                )
        scheme = parse_scheme(data.get("scheme", "W4A16" if "codebook" in data else "W4A16g128"))
        grids: list[Grid] = [
            scheme.weights,
            *(weights_only(s) for s in data.get("overrides", {}).values()),
        ]
        if "codebook" in data:
            per: Per = _checked(data["codebook"], Per, f"{origin}: codebook")
            grids = [as_codebook(g, per) for g in grids if isinstance(g, (Affine, KQuant))]
        overrides = tuple(zip(data.get("overrides", {}), grids[1:], strict=True))
        activations = _activation_grid(data, scheme.activation_bits, origin)
        kv = _dynamic(PerToken, data, "kv", scheme.kv_bits, origin)
        return cls(
            grids[0], methods, overrides, calibration, data.get("name", "custom"), activations, kv
        )

    @classmethod
    def from_toml(cls, text: str, origin: str = "recipe") -> Recipe:
        """A recipe from a TOML document; see `from_dict`."""
        try:
            return cls.from_dict(tomllib.loads(text), origin)
        except (
            ValueError,
            RecursionError,
        ) as e:  # also of numbers and nesting that Python gives up on
            raise LowbitError(f"{origin} is not valid TOML: {e}") from e


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _method_name(method: Method) -> str:
    return next(name for name, kind in METHODS.items() if type(method) is kind)


_G = typing.TypeVar("_G")


def _activation_grid(
    data: Mapping[str, Any], bits: int | None, origin: str
) -> ActivationGrid | None:
    options = data.get("activations", {})
    kind: type[Any] = activation_grid(options if isinstance(options, dict) else {})
    found: ActivationGrid | None = _dynamic(kind, data, "activations", bits, origin)
    return found


def _dynamic(
    kind: type[_G], data: Mapping[str, Any], key: str, bits: int | None, origin: str
) -> _G | None:
    """The grid that the options under ``key`` describe; they apply to schemes that quantize it and
    wait for one otherwise.
    """
    options = data.get(key, {})
    if isinstance(options, dict) and "bits" in options:
        raise LowbitError(f"{origin}: '{key}.bits' is said by the scheme, as in W4A8KV4.")
    try:
        grid = _built(
            kind,
            key,
            {**options, "bits": bits or 8} if isinstance(options, dict) else options,
            origin,
        )
    except ValueError as e:
        raise LowbitError(f"{origin}: {key}: {e}.") from e
    return grid if bits else None


_T = typing.TypeVar("_T")


def _built(kind: type[_T], name: str, options: Mapping[str, Any], origin: str) -> _T:
    """A dataclass from some of its fields; an unknown field or a value of the wrong type is an
    error.
    """
    if not isinstance(options, dict):
        raise LowbitError(
            f"{origin}: '{name}' must be a table of options ([{name}]), got {options!r}."
        )
    hints = typing.get_type_hints(kind)
    checked = {}
    for key, value in options.items():
        if key not in hints:
            raise unknown(f"option of {name} in {origin}", key, hints)
        checked[key] = _checked(value, hints[key], f"{origin}: {name}.{key}")
    return kind(**checked)


def _checked(value: Any, hint: Any, where: str) -> Any:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if choices:
        if value not in choices:
            raise LowbitError(
                f"{where} must be one of {', '.join(map(str, choices))}, got {value!r}."
            )
        return value
    # So for nan.
    if hint in (int, float) and isinstance(value, (int, float)) and not -_MOST <= value <= _MOST:
        raise LowbitError(f"{where} must be a number from {-_MOST} to {_MOST}, got {value!r:.30}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise LowbitError(f"{where} must be of type {hint.__name__}, got {value!r}.")
    return value
