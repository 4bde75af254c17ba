"""Recipes as TOML, in both directions, and as the plain data between."""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import LowbitError, unknown
from ..grid import ActivationGrid, AnyGrid, PerToken, activation_grid
from ..grid.names import Per, as_codebook, parse_scheme, weights_only
from ..methods import METHODS
from ..model.calibration import Calibration
from ..verbatim import encodable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Of an option's number: no sensible one is near it, and what tensors count and multiply holds it.
_MOST = 2**31 - 1
# What a string of TOML cannot hold as it is.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_KEYS = ("name", "scheme", "codebook", "methods", "overrides", "calibration", "activations", "kv")


def parsed(text: str, origin: str) -> dict[str, Any]:
    """A TOML document as plain data.

    Raises:
        LowbitError: it is none.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also of numbers and nesting that Python gives up on
        raise LowbitError(f"{origin} is not valid TOML: {e}") from e


def written(data: Mapping[str, Any]) -> str:
    """Plain data, tables of tables not among it, as a TOML document. Bytes of a path that were no
    text become question marks: TOML is UTF-8.
    """
    lines = [f"{k} = {_toml(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for key, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{key}]"]
            quoted = key == "overrides"  # whose keys are patterns
            lines += [f"{_toml(k) if quoted else k} = {_toml(v)}" for k, v in table.items()]
    return "\n".join(lines) + "\n"


def read(data: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a `Recipe` from plain data.

    Raises:
        LowbitError: an unknown key, method, option or value, named with ``origin``.
    """
    names = _names(data, origin)
    methods = tuple(_built(METHODS[n].kind, n, data.get(n, {}), origin) for n in names)
    calibration = _built(Calibration, "calibration", data.get("calibration", {}), origin)
    for key, kind in (("scheme", str), ("name", str), ("codebook", str), ("overrides", dict)):
        if key in data and not isinstance(data[key], kind):
            wanted = "a table" if kind is dict else "a string"
            raise LowbitError(f"{origin}: '{key}' must be {wanted}, got {data[key]!r}.")
    scheme = parse_scheme(data.get("scheme", "W4A16" if "codebook" in data else "W4A16g128"))
    overrides = data.get("overrides", {})
    for pattern, given in overrides.items():
        if not isinstance(given, str):
            raise LowbitError(
                f"{origin}: override '{pattern}' must be a scheme in quotes, as in "
                f'"*.down_proj" = "W4A16", got {given!r}.'
            )
    grids: list[AnyGrid] = [scheme.weights, *(weights_only(s) for s in overrides.values())]
    if "codebook" in data:
        per: Per = _checked(data["codebook"], Per, f"{origin}: codebook")
        grids = [as_codebook(g, per) for g in grids]
    return {
        "grid": grids[0],
        "methods": methods,
        "overrides": tuple(zip(overrides, grids[1:], strict=True)),
        "calibration": calibration,
        "name": data.get("name", "custom"),
        "activations": _activation_grid(data, scheme.activation_bits, origin),
        "kv": _dynamic(PerToken, data, "kv", scheme.kv_bits, origin),
    }


def _names(data: Mapping[str, Any], origin: str) -> list[str]:
    """Names of the methods, every key of the data being known."""
    known = (*_KEYS, *METHODS)
    for key in data:
        if key not in known:
            raise unknown(f"key in {origin}", key, known)
    names = data.get("methods", [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        listed = ", ".join(METHODS)
        raise LowbitError(f"{origin}: 'methods' must be a list of method names ({listed}).")
    for name in names:
        if name not in METHODS:
            raise unknown(f"method in {origin}", name, METHODS)
    for key in METHODS:
        if key in data and key not in names:
            raise LowbitError(
                f"{origin} sets options of '{key}', which is not among its methods {names}."
            )
    return names


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        text = encodable(value).replace("\\", "\\\\").replace('"', '\\"')
        return '"' + _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + '"'
    return repr(value)


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


def _built(kind: Callable[..., _T], name: str, options: Mapping[str, Any], origin: str) -> _T:
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
