"""Recipes by name: those that come with the package, files, and parts joined by "+"."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import LowbitError, unknown
from ..grid import PerToken, activation_grid
from ..grid.names import Scheme
from ..methods import METHODS
from .recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# One scale of effort, and what is behind it.
SHORT = {
    "fast": "tesseraq-fast",
    "default": "tesseraq",
    "best": "tesseraq-best",
}


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, without the short ones."""
    folder = resources.files(__package__) / "named"
    return tuple(
        sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    )


def load_recipe(name: str, *, scheme: Scheme | None = None, settings: Sequence[str] = ()) -> Recipe:
    """A named recipe (`SHORT` names too), several of them joined by "+", or one from a .toml file;
    for another scheme, with single options changed.

    Of each part of a joined name the method that the part is called after is taken, with its
    options ("smoothquant+gptq", "omniquant+tesseraq-best"); the scheme, how activations, keys and
    values are quantized and the calibration come from the last part that says so. With "+polish"
    at its end what is before it stays as it is, whole ("fast+polish").

    Args:
        settings: "method.option=value" or "overrides.PATTERN=SCHEME" strings, the value written as
            in TOML (quotes optional).

    Raises:
        LowbitError: no such recipe, file, method, option or value.
    """
    origin = name if name.endswith(".toml") else f"recipe '{name}'"
    joined = "+" in name and not name.endswith(".toml") and name not in recipe_names()
    data = _joined(name) if joined else _read(name, origin)
    for setting in settings:
        _apply(data, setting)
    if scheme is not None:
        data["scheme"] = str(scheme)
    recipe = Recipe.from_dict(data, origin)
    for key, grid in (("activations", recipe.activations), ("kv", recipe.kv)):
        given = next((x for x in settings if x.strip().startswith(f"{key}.")), None)
        if given is not None and grid is None:
            raise LowbitError(
                f"--set {given} has no effect: scheme {recipe.scheme} leaves them in floating "
                "point."
            )
    own = data.get("activations", {})
    if recipe.activations is None and activation_grid(own) is not PerToken:
        raise LowbitError(
            f"{origin} is about quantized activations, and scheme {recipe.scheme} leaves them in "
            "floating point: write A8 or A4 in it."
        )
    return recipe


def _read(name: str, origin: str) -> dict[str, Any]:
    name = SHORT.get(name, name)
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise LowbitError(f"no such recipe file: '{name}'.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise LowbitError(
                f"recipe file '{name}' is not UTF-8 text (byte {e.start}). Convert it first."
            ) from e
    elif name in recipe_names():
        text = (resources.files(__package__) / "named" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise unknown("recipe", name, (*recipe_names(), *SHORT))
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also of numbers and nesting that Python gives up on
        raise LowbitError(f"{origin} is not valid TOML: {e}") from e


def _joined(name: str) -> dict[str, Any]:
    before, _, last = name.rpartition("+")
    method = _method_of(last)
    if method in METHODS and METHODS[method].role == "polish" and last in recipe_names():
        # It follows whatever a recipe does, all of it.
        data = _joined(before) if "+" in before else _read(before, f"recipe '{before}'")
        if method in data["methods"]:
            raise LowbitError(f"recipe '{name}' has '{method}' twice.")
        own = _read(last, f"recipe '{last}'")[method]
        return {**data, "name": name, "methods": [*data["methods"], method], method: own}
    out: dict[str, Any] = {"name": name, "methods": []}
    for part in name.split("+"):
        if part.endswith(".toml"):
            raise LowbitError(
                f"recipe '{name}': files cannot be joined; write the methods into one file."
            )
        data, method = _read(part, f"recipe '{part}'"), _method_of(SHORT.get(part, part))
        if method in out["methods"]:
            raise LowbitError(f"recipe '{name}' has '{method}' twice.")
        if method in data["methods"]:  # not so where the name is that of an activation grid
            out["methods"].append(method)
        for key in (method, "scheme", "codebook", "activations", "kv", "calibration"):
            if key in data:
                out[key] = data[key]
    return out


def _method_of(name: str) -> str:
    """The method that a recipe is called after: the longest name it begins with."""
    called = [m for m in METHODS if name == m or name.startswith(f"{m}-")]
    return max(called, key=len, default=name)


def _apply(data: dict[str, Any], setting: str) -> None:
    target, equals, text = setting.partition("=")
    section, dot, key = target.strip().partition(".")
    if not equals or not dot or not key:
        raise LowbitError(
            f"--set takes METHOD.OPTION=VALUE, for example tesseraq.iters=100; got '{setting}'."
        )
    sections = ("overrides", "calibration", "activations", "kv", *METHODS)
    if section not in sections:
        raise unknown("section in --set", section, sections)
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except (ValueError, RecursionError):
        value = text.strip()
    table = data.setdefault(section, {})
    if isinstance(table, dict):  # else it is refused where the recipe is read
        table[key] = value
