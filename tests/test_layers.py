"""The dependency direction of docs/architecture.md, and the size of the public interface."""

import ast
from pathlib import Path

import pytest

import lowbit
from lowbit.grid import GRIDS
from lowbit.methods import METHODS

ROOT = Path(lowbit.__file__).parent
ALLOWED = {
    "grid": {"errors"},
    "model": {"grid", "errors"},
    "methods": {"grid", "model", "errors"},
    "formats": {"grid", "errors"},
    "kernels": {"grid", "errors"},
    "runtime": {"grid", "formats", "kernels", "artifact", "errors"},
    "errors": set(),
    "console": set(),
    "names": set(),
    "verbatim": set(),
    "report": {"verbatim"},
    "evaluate": {"model", "errors"},
    "analyze": {"grid", "model", "evaluate", "disk", "report", "verbatim", "errors"},
    "tasks": {"console", "errors"},
    "machine": {"errors"},
    "scheme": {"grid", "errors"},
    "recipe": {"grid", "model", "methods", "scheme", "errors"},
    "record": {
        "grid",
        "model",
        "formats",
        "machine",
        "scheme",
        "recipe",
        "artifact",
        "card",
        "names",
        "errors",
    },
    "disk": {"errors"},
    "lock": {"disk", "errors"},
    "tree": {"disk", "lock", "errors"},
    "output": {"disk", "lock", "tree", "errors"},
    "workplace": {"artifact", "disk", "lock", "output", "tree", "model", "errors"},
    "identity": {"model", "methods", "recipe", "artifact", "proof", "errors", "__version__"},
    "launch": {"machine", "model", "errors"},
    "loop": {"grid", "model", "methods", "recipe", "errors"},
    "presets": {"grid", "methods", "recipe", "scheme", "errors"},
    "artifact": {"grid", "model", "formats", "disk", "lock", "output", "tree", "errors"},
    "proof": {"artifact", "formats", "errors"},
    "card": {"grid", "scheme", "formats", "proof", "names", "verbatim", "errors"},
    "push": {"artifact", "proof", "errors"},
    "export": {
        "grid",
        "model",
        "formats",
        "artifact",
        "disk",
        "output",
        "proof",
        "card",
        "names",
        "verbatim",
        "errors",
    },
    "targets": {"grid", "model", "methods", "formats", "scheme", "recipe", "export", "errors"},
    "memory": {"grid", "model", "methods", "machine", "recipe", "errors"},
    "estimate": {"grid", "methods", "machine", "memory", "recipe"},
    "plan": {
        "grid",
        "model",
        "methods",
        "formats",
        "recipe",
        "targets",
        "memory",
        "estimate",
        "errors",
    },
}


def imports(path: Path) -> set[str]:
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {full[0]} if full else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    files = sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / f"{part}.py"]
    assert files
    for path in files:
        assert imports(path) - {part} <= ALLOWED[part], path


KNOW_GRIDS = ("grid", "formats", "kernels", "runtime", "export", "__init__")


def concrete_grids(path: Path) -> set[str]:
    """What a file imports of single kinds of grids."""
    names = {n for g in GRIDS for n in (g.__name__, f"{g.__name__}Params")}
    modules = {g.__module__.rpartition(".")[2] for g in GRIDS}
    package = ("lowbit", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if full[:2] == ("lowbit", "grid"):
                one = len(full) > 2 and full[2] in modules
                found |= {a.name for a in node.names if one or a.name in names | modules}
    return found


def test_single_kinds_of_grids_are_known_where_bytes_are_only():
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in KNOW_GRIDS:
            assert not concrete_grids(path), path
    assert concrete_grids(ROOT / "__init__.py") == {"Affine"}


def concrete_methods(path: Path) -> set[str]:
    """What a file imports of single methods."""
    names = {entry.kind.__name__ for entry in METHODS.values()}
    package = ("lowbit", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if full[:2] == ("lowbit", "methods"):
                paper = len(full) > 2 and full[2] in METHODS
                found |= {a.name for a in node.names if paper or a.name in {*names, *METHODS}}
    return found


def test_single_methods_are_known_where_they_are_only():
    """But for plain rounding, which codes what a recipe leaves uncoded."""
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] != "methods" and path != ROOT / "__init__.py":
            assert concrete_methods(path) <= {"RTN"}, path


def test_papers_import_no_papers():
    for path in sorted((ROOT / "methods").glob("[!_]*.py")):
        assert not concrete_methods(path), path


def test_public_names():
    assert sorted(lowbit.__all__) == sorted(
        [
            "AWQ",
            "RTN",
            "Affine",
            "LowbitError",
            "QTensor",
            "Recipe",
            "TesseraQ",
            "VerificationError",
            "quantize",
            "verify",
        ]
    )
