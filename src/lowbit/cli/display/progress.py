"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ...console import Console, Table
from ...run.events import BlockDone, Working
from .units import duration, size

_SHOWN = 12  # rows of the live table
_COLUMNS = ("block", "linear", "loss rtn -> tuned", "bits", "time", "memory", "left", "remarks")


class Progress:
    """A context manager that shows how a run goes on: it is called after each block.

    Args:
        console: where to write; a live table if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rows: list[tuple[str, ...]] = []
        self._last: list[tuple[str, ...]] = []
        self._now = ""
        self._spent: list[float] = []  # seconds of each block that this run has finished
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(self._table(), console=console, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._now = ""
            self._live.update(self._table() if self._rows else "", refresh=True)
            self._live.stop()

    def working(self, event: Working) -> None:
        """Show that a step within a block begins."""
        self._now = f"block {event.index + 1}/{event.blocks}, {event.what}"
        if self._live:
            self._live.update(self._table(), refresh=True)

    def __call__(self, done: BlockDone) -> None:
        if not done.resumed:
            self._spent.append(done.record["seconds"])
        mean = sum(self._spent) / len(self._spent) if self._spent else done.record["seconds"]
        row = _row(done, mean * (done.blocks - done.index - 1))
        self._rows.append(row)
        self._last = _linear_rows(done)
        if self._live:
            self._live.update(self._table(), refresh=True)
        else:
            if len(self._rows) == 1:
                self.console.print("  ".join(_COLUMNS[:-1]))
            self.console.print("  ".join(c for c in row if c))

    def _table(self) -> Table:
        columns = _COLUMNS if any(row[-1] for row in self._rows) else _COLUMNS[:-1]
        table = Table(caption=self._now or None, caption_justify="left")
        for name in columns:
            table.add_column(name, justify="right")
        for row in (*self._rows[-_SHOWN:], *self._last):
            table.add_row(*row[: len(columns)])
        return table


def _row(done: BlockDone, left: float) -> tuple[str, ...]:
    """Return the row of a finished block; ``left`` is the estimated time to the end in seconds."""
    r = done.record
    linears = r["linears"]
    weights = sum(e["shape"][0] * e["shape"][1] for e in linears)
    bits = sum(8 * e["bytes"] for e in linears) / weights
    return (
        f"{done.index + 1}/{done.blocks}" + (" (resumed)" if done.resumed else ""),
        f"{len(linears)} linears",
        f"{r['loss_before']:.4g} -> {r['loss_after']:.4g}",
        f"{bits:.3f}",
        duration(r["seconds"]),
        size(r["peak_memory"]),
        duration(left),
        "; ".join(r.get("trouble", [])),
    )


def _linear_rows(done: BlockDone) -> list[tuple[str, ...]]:
    """Return the rows of a block's linears, each with the relative error of its own output.

    Tuning looks at the block's output only, so the error of one linear may rise.
    """
    cut = len(done.record["name"]) + 1
    rows: list[tuple[str, ...]] = []
    for e in done.record["linears"]:
        error = f"{e['error_nearest']:.3g} -> {e['error']:.3g}"
        rows.append(("", e["name"][cut:], error, f"{e['bits_per_weight']:.3f}", "", "", "", ""))
    return rows


@contextmanager
def progress_bar(console: Console, what: str = "windows") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal, nothing elsewhere.

    Args:
        what: is counted, in words.

    Yields:
        a function to call with the numbers done and in all.
    """
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)
