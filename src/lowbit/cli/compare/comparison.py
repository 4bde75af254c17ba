"""A folder of finished cells: a repeated comparison goes on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...artifact.disk import disk
from ...artifact.output import working
from ...artifact.tree import entries
from ...errors import DiskFull, Interrupted, LowbitError
from .bench import Bench, Row, Show
from .files import read_state, write_state
from .terms import Cell, Terms

_STATE = "compare.json"
_CELLS = "cells"


class Comparison:
    """A directory of finished cells.

    Args:
        folder: one JSON file per finished cell lies in it; a repeated call goes on from them. No
            other process works in it, see `opened`.
        keep: keep the artifacts too.

    Attributes:
        bench: measures a cell.

    Raises:
        LowbitError: the folder holds a comparison on other terms, or something else; the evaluation
            text is missing or too short, or a task unknown.
    """

    def __init__(self, terms: Terms, folder: Path, keep: bool = False) -> None:
        self._folder = folder
        # The device may differ: cells of another kind are measured anew, see `Bench.made_with`.
        state = json.loads(json.dumps(asdict(terms) | {"device": None}))
        path = folder / _STATE
        if path.is_file():
            self._must_match(read_state(path), state)
        elif folder.exists() and any(not n.endswith(".tmp") for n in entries(folder)):
            raise LowbitError(f"'{folder}' exists and holds no comparison. Choose another -o.")
        self.bench = Bench(terms, folder, keep)
        with disk(folder):
            (folder / _CELLS).mkdir(parents=True, exist_ok=True)
        write_state(path, state)

    def _must_match(self, old: Mapping[str, Any] | None, terms: Mapping[str, Any]) -> None:
        """Refuse cells that were measured on other terms, or nobody knows on which."""
        if old is None or not set(terms) <= set(old):
            if any((self._folder / _CELLS).glob("*.json")):
                raise LowbitError(
                    f"'{self._folder / _STATE}' is damaged: it no longer says on which terms the "
                    f"cells there were measured. Remove '{self._folder}', or choose another -o."
                )
            return
        changed = [k for k in terms if old[k] != terms[k]]
        if changed:
            raise LowbitError(
                f"'{self._folder}' holds a comparison with another {', '.join(changed)}. Choose "
                "another -o, or remove it."
            )

    def _file_of(self, cell: Cell) -> Path:
        return self._folder / _CELLS / f"{cell.name}.json"

    def finished(self, cell: Cell) -> Row | None:
        """Return what an earlier call measured.

        None if the cell failed, never ran, is damaged, or ran with another model, text, recipe,
        version or kind of device.
        """
        row = read_state(self._file_of(cell))
        if row is None or "error" in row or row.get("made_with") != self.bench.made_with(cell):
            return None
        return row

    def run(self, wanted: Sequence[Cell], show: Show) -> Iterator[Row]:
        """Measure every cell that is not finished yet.

        Args:
            show: makes a progress display for the quantization of a cell.

        Yields:
            a row for each cell, failures included.
        """
        for cell in wanted:
            row = self.finished(cell)
            if row is None:
                row = self._attempt(cell, show)
                self.bench.check_unchanged()  # or the row would be of another model than it says
                write_state(self._file_of(cell), row)
            yield row

    def _attempt(self, cell: Cell, show: Show) -> Row:
        """Measure a cell. A failing method is a result too: the other cells go on."""
        try:
            return self.bench.measure(cell, show)
        except DiskFull:
            raise
        except Exception as e:
            said = str(e) if isinstance(e, LowbitError) else f"{type(e).__name__}: {e}"
            return {
                "scheme": cell.scheme,
                "recipe": cell.recipe,
                "error": " ".join(said.split()),
            }

    def kept(self) -> str:
        """Return a sentence for the user on what an interruption leaves."""
        rows = [read_state(path) for path in (self._folder / _CELLS).glob("*.json")]
        done = sum(row is not None and "error" not in row for row in rows)
        return f"Cells measured and kept in '{self._folder}': {done}. The same command continues."


@contextmanager
def opened(terms: Terms, folder: Path, keep: bool = False) -> Iterator[Comparison]:
    """Yield a `Comparison` in a folder where no other process works meanwhile.

    Raises:
        LowbitError: as `Comparison`; the folder is in use, or cannot be written.
        Interrupted, DiskFull: raised within, with a sentence on the cells that are kept.
    """
    with working(folder, "compare") as place:
        comparison = Comparison(terms, place, keep)
        try:
            yield comparison
        except KeyboardInterrupt as e:
            raise Interrupted(comparison.kept()) from e
        except DiskFull as e:
            raise DiskFull(f"{e} {comparison.kept()}") from e
