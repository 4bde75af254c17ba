"""The dependency direction of docs/architecture.md, and the size of the public interface."""

import ast
import re
from pathlib import Path

import pytest

import lowbit
from lowbit.grid import GRIDS
from lowbit.methods import METHODS

ROOT = Path(lowbit.__file__).parent
ALLOWED = {  # a folder's own row leaves out the folders in it that have rows
    "errors": set(),
    "console": set(),
    "names": set(),
    "verbatim": set(),
    "cache": set(),
    "machine": {"errors"},
    "arithmetic": {"cache", "errors"},
    "grid": {"cache", "errors"},
    "model": {"grid", "errors"},
    "methods": {"grid", "model", "arithmetic", "errors"},
    "recipe": {"grid", "model", "methods", "verbatim", "errors"},
    "stages": {"artifact", "model", "methods", "grid", "machine", "errors"},
    "formats": {"grid", "errors"},
    "kernels": {"grid", "errors"},
    "artifact": {"grid", "model", "formats", "errors"},
    "artifact.readers": set(),
    "artifact.proof": {"artifact", "formats", "machine", "errors"},
    "artifact.card": {"artifact.proof", "grid", "formats", "names", "verbatim"},
    "runtime": {"artifact", "artifact.proof", "grid", "model", "formats", "kernels", "errors"},
    "export": {
        *("artifact", "artifact.card", "artifact.proof"),
        *("grid", "model", "formats", "machine", "names", "verbatim", "errors"),
    },
    "plan": {
        *("plan.targets", "recipe", "methods", "formats", "model", "grid"),
        *("machine", "arithmetic", "errors"),
    },
    "plan.targets": {"export", "recipe", "formats", "model", "grid", "errors"},
    "evaluate": {"model", "arithmetic", "errors"},
    "evaluate.pages": {"verbatim"},
    "evaluate.analyze": {"evaluate", "evaluate.pages", "artifact", "model", "grid", "errors"},
    "evaluate.tasks": {"console", "errors"},
    "run": {
        *("plan", "stages", "recipe", "evaluate", "artifact", "artifact.card", "artifact.proof"),
        *("formats", "model", "grid", "machine", "arithmetic", "names", "errors"),
        "__version__",
    },
    "cli.display": {
        "model",
        *("plan", "plan.targets", "run", "artifact.card", "formats", "grid"),
        *("machine", "console", "verbatim", "errors"),
    },
    "cli.compare": {
        *("cli.display", "run", "recipe", "evaluate", "evaluate.pages", "evaluate.tasks"),
        *("artifact", "model", "grid", "machine", "console", "errors"),
    },
    "demo": {
        *("cli.display", "run", "evaluate", "evaluate.pages", "artifact", "model"),
        *("machine", "console", "verbatim", "errors"),
    },
}


def part_of(names: tuple[str, ...]) -> str:
    """The row that a module belongs to."""
    inner = ".".join(names[:2])
    return inner if inner in ALLOWED else names[0]


def imports(path: Path) -> set[str]:
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {part_of(full)} if full else {alias.name for alias in node.names}
    return found


def parts() -> dict[str, list[Path]]:
    """The files of each row, and of what has none."""
    found: dict[str, list[Path]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts
        found.setdefault(part_of(module), []).append(path)
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    files = parts()[part]
    assert files
    for path in files:
        assert imports(path) - {part} <= ALLOWED[part], path


def test_every_part_has_a_row():
    """But for what is above all: the package itself, and the command line."""
    assert set(parts()) - set(ALLOWED) == {"__init__", "__main__", "cli"}


def test_the_map_names_every_part_and_every_path_of_the_page_is_there():
    text = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    for part in set(parts()) - {"__init__", "__main__"}:
        last = part.rpartition(".")[2]
        assert f"{last}/" in text or f"{last}.py" in text, part
    for path in re.findall(r"`([\w./]+(?:\.py|/))`", text):
        assert (ROOT / path).exists() or (ROOT.parents[1] / path).exists(), path


def test_no_part_imports_one_that_imports_it():
    below = {part: set(allowed) & set(ALLOWED) for part, allowed in ALLOWED.items()}
    while below:
        free = [part for part, on in below.items() if not on]
        assert free, below
        below = {p: on - set(free) for p, on in below.items() if p not in free}


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


def test_papers_know_nothing_of_the_processes_that_share_a_run():
    """Statistics, losses and gradients are reduced by their helpers."""
    for path in sorted((ROOT / "methods").glob("[!_]*.py")):
        if path.stem not in ("cost", "entry"):
            assert not re.search(r"\.ranks\b|\bRanks\b", path.read_text()), path


def test_inputs_are_seen_through_statistics_only():
    found = [p for p in sorted(ROOT.rglob("*.py")) if re.search(r"\.observe\w*\(", p.read_text())]
    assert found == [ROOT / "model" / "statistics.py"]


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
