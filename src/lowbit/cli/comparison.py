"""`lowbit compare`: every recipe with every scheme, with reports that grow cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.disk import disk
from ..console import Console
from ..evaluate import window_length
from ..evaluate.pages import write_comparison
from ..model.calibration import Calibration
from ..model.config import load_config
from ..model.source import open_files
from .compare import Cell, Terms, cells, opened, title_of
from .display import Progress, comparison_table
from .sentences import check_needed


@dataclass(frozen=True)
class CompareOptions:
    """The options of the command, see `lowbit.cli.options`.

    Raises:
        LowbitError: an option without the one that it belongs to.
    """

    model: str
    schemes: str
    recipes: str
    output: Path
    calib: str
    samples: int
    length: int | None
    text: str
    eval_length: int | None
    windows: int | None
    bos: str
    tasks: str | None
    task_data: Path | None
    limit: int | None
    settings: tuple[str, ...]
    seed: int
    keep: bool
    device: str

    def __post_init__(self) -> None:
        of_tasks = {"--task-data": self.task_data, "--limit": self.limit}
        check_needed(of_tasks, "--tasks", bool(self.tasks))

    def cells(self) -> list[Cell]:
        """Return the combinations. Raises LowbitError as `lowbit.cli.compare.terms.cells`."""
        return cells(_names(self.schemes), _names(self.recipes), self.settings)

    def terms(self) -> Terms:
        """Return what is the same for every cell.

        Raises:
            LowbitError: the model cannot be read, or a length is beyond its context.
        """
        config = load_config(open_files(self.model))
        length = window_length(config, self.length)
        return Terms(
            model=self.model,
            calibration=Calibration(self.calib, self.samples, length, self.bos),
            text=self.text,
            length=window_length(config, self.eval_length, "--eval-length"),
            windows=self.windows,
            tasks=tuple(_names(self.tasks or "")),
            task_data=None if self.task_data is None else str(self.task_data),
            limit=self.limit,
            seed=self.seed,
            device=self.device,
            settings=self.settings,
        )


def run_compare(given: CompareOptions, console: Console) -> list[dict[str, Any]]:
    """Measure every cell, write the reports after each, print the table, and return the rows.

    Raises:
        LowbitError: a bad name or option, or a folder that cannot be used. A cell that fails is a
            row with an ``error``.
    """

    def show(cell: Cell) -> Progress:
        console.print(f"\n{cell.recipe}, {cell.scheme}")
        return Progress(console)

    wanted = given.cells()
    terms = given.terms()
    rows: list[dict[str, Any]] = []
    with opened(terms, given.output, given.keep) as comparison:
        for row in comparison.run(wanted, show):
            rows.append(row)
            if "error" in row:
                console.print(f"failed: {row['recipe']}, {row['scheme']}: {row['error']}")
            with disk(given.output):
                write_comparison(given.output, rows, title_of(terms, rows))
    console.print(comparison_table(rows, title_of(terms, rows)))
    page = given.output / "report.html"
    console.print(f"{page}, comparison.md, comparison.csv, comparison.json")
    return rows


def _names(given: str) -> list[str]:
    return [n.strip() for n in given.split(",") if n.strip()]
