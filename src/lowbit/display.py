"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .console import Console, Table
from .errors import LowbitError
from .machine import free_memory
from .plan import Plan
from .plan.memory import FreeMemory
from .plan.speed import Speed
from .run.events import BlockDone, Working
from .run.quantize import Result
from .targets import Verdict
from .verbatim import literal, shell

_SHOWN = 12  # rows of the live table
_USUALLY_LEFT = ("README.md", "model.safetensors.index.json")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _row(done: BlockDone, left: float) -> tuple[str, ...]:
    r = done.record
    linears = r["linears"]
    bits = sum(8 * e["bytes"] for e in linears) / sum(
        e["shape"][0] * e["shape"][1] for e in linears
    )
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


_COLUMNS = ("block", "linear", "loss rtn -> tuned", "bits", "time", "memory", "left", "remarks")


def _linear_rows(done: BlockDone) -> list[tuple[str, ...]]:
    """The linears of a block, each with the relative error of its own output: tuning looks at the
    block's output only, so one linear's may rise.
    """
    cut = len(done.record["name"]) + 1
    return [
        (
            "",
            e["name"][cut:],
            f"{e['error_nearest']:.3g} -> {e['error']:.3g}",
            f"{e['bits_per_weight']:.3f}",
            "",
            "",
            "",
            "",
        )
        for e in done.record["linears"]
    ]


class Progress:
    """A context manager that is told how a run goes on and shows it.

    Args:
        console: where to write; a live table if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rows: list[tuple[str, ...]] = []
        self._last: list[tuple[str, ...]] = []
        self._now = ""
        self._live = (
            Live(self._table(), console=console, auto_refresh=False)
            if console.is_terminal
            else None
        )
        self._spent: list[float] = []

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
        """A step within a block begins."""
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


@contextmanager
def windows_bar(console: Console, what: str = "windows") -> Iterator[Callable[[int, int], None]]:
    """A progress bar over evaluation windows on a terminal, nothing elsewhere; yields what to tell
    (done, in all).
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


def analysis_tables(data: Mapping[str, Any]) -> list[Table]:
    """What `lowbit analyze` found: every input, then grids and the remove-kernel experiment."""
    width = data["grids"][0].split()[0]
    shown = [g for g in data["grids"] if g.startswith(width + " ")]
    heads = (g.removeprefix(width + " ").replace("CrossQuant", "cross") for g in shown)
    each = Table(
        "block",
        "input of",
        "zero",
        *heads,
        "largest",
        "channels",
        "tokens",
        ">= 6",
        title=data["title"],
    )
    for s in data["sites"]:
        block, _, inside = s["linears"][0].partition("layers.")[2].partition(".")
        name = ", ".join(
            [inside.rpartition(".")[2], *(n.rpartition(".")[2] for n in s["linears"][1:])]
        )
        numbers = (
            f"{s['largest']:.3g}",
            f"{s['channel_spread']:.3g}",
            f"{s['token_spread']:.3g}",
            str(s["outlier_channels"]),
        )
        each.add_row(
            block, name, f"{s['zeros']:.1%}", *(f"{s['kernel'][g]:.2%}" for g in shown), *numbers
        )
    each.caption = (
        f"at {width}, share of non-zero elements that become zero under each grid; channels, "
        "tokens: the largest maximum over the median one; "
        ">= 6: channels that reach 6"
    )
    means = Table(
        "grid", "mean kernel share", "perplexity, weights in 8 bits", "with the kernel restored"
    )
    cost = {(r["grid"], r["kind"]): f"{r['perplexity']:.4f}" for r in data["removals"] if r["grid"]}
    for name, share in data["mean"].items():
        means.add_row(
            name,
            f"{share:.3%}",
            cost.get((name, "quantized"), ""),
            cost.get((name, "restored"), ""),
        )
    tables = [each, means]
    removed = [r for r in data["removals"] if r["grid"] is None and r["kind"] != "none"]
    if removed:
        base = next(r["perplexity"] for r in data["removals"] if r["kind"] == "none")
        kinds, shares = (
            list(dict.fromkeys(r["kind"] for r in removed)),
            list(dict.fromkeys(r["share"] for r in removed)),
        )
        zeroed = Table(
            "set to zero",
            *kinds,
            title=f"perplexity with a share of non-zero elements set to zero; {base:.4f} with none",
        )
        for share in shares:
            zeroed.add_row(
                f"{share:g}",
                *(
                    f"{r['perplexity']:.4f}"
                    for k in kinds
                    for r in removed
                    if (r["kind"], r["share"]) == (k, share)
                ),
            )
        zeroed.add_row(
            "1 % worse at",
            *("never here" if (at := data["knees"][k]) is None else f"{at:.3f}" for k in kinds),
        )
        tables.append(zeroed)
    return tables


def plan_rows(
    p: Plan, speed: Speed | None, offload: str, folder: Path, free: FreeMemory | None = None
) -> list[tuple[str, str]]:
    """What a run needs, in words.

    Args:
        speed: of the device; None says nothing of the time.
        offload, folder, free: as `lowbit.plan.memory.Needs.placed`.
    """
    gib, model_type = 2**30, p.outline.config.model_type
    took = "not said of a GPU that is not here"
    if speed is not None:
        took = (
            f"about {duration(p.seconds(speed))} with recipe '{p.recipe.name}' at this machine's "
            "measured speed (an estimate; packing and the closing check come on top)"
        )
    return [
        (
            "model",
            f"{model_type}, {p.outline.blocks} blocks, {p.parameters / 1e9:.3g} B parameters, "
            f"{p.quantized / p.parameters:.1%} of them quantized",
        ),
        (
            "size",
            f"{p.original / gib:.3g} -> {p.artifact / gib:.3g} GiB ({p.original / 1e9:.3g} -> "
            f"{p.artifact / 1e9:.3g} GB)",
        ),
        (
            "bits per weight",
            f"{p.bits_per_weight:.3f} in quantized linears, {p.model_bits_per_weight:.3f} over "
            "all parameters",
        ),
        *memory_rows(p, p.setting.device, offload, folder, free),
        ("disk", f"{p.artifact / gib:.3g} GiB, besides activations that are kept there"),
        ("time", took),
    ]


def memory_rows(
    plan: Plan, device: torch.device, offload: str, folder: Path, room: FreeMemory | None = None
) -> tuple[tuple[str, str], ...]:
    """What a plan says of memory, with activations where ``offload`` says, files in ``folder`` and
    so much room on devices.
    """
    m, gib = plan.memory, 2**30
    free = (room or free_memory)(device)
    steps = ", ".join(f"{name} {most / gib:.3g}" for name, most in m.steps.items())
    try:
        placed = (
            f"--offload {offload} puts them here on the "
            f"{m.placed(offload, device, folder, room).used}"
        )
    except LowbitError as e:
        placed = str(e)
    there = "" if free is None else f"; {free / gib:.3g} are free there"
    peak = "peak memory" if m.processes == 1 else f"peak memory of each of {m.processes}"
    return (
        (
            peak,
            f"{m.peak / gib:.3g} GiB: a block {m.block / gib:.3g}, embeddings and head "
            f"{m.outer / gib:.3g}, activations "
            f"{m.streams / gib:.3g}"
            + (f", libraries {m.process / gib:.2g}" if m.process else "")
            + there,
        ),
        ("of a block", f"GiB by step: {steps}; below {m.least / gib:.3g} it cannot be done"),
        ("activations", f"{m.copies} x {m.stream / gib:.3g} GiB; {placed}"),
        (
            "closing check",
            f"about {plan.check_memory / gib:.3g} GiB, in a process of its own that loads the "
            "whole model",
        ),
    )


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """All cells of a comparison, failures included."""
    tasks = any(r.get("tasks") for r in rows)
    table = Table(
        "scheme",
        "recipe",
        "bits",
        "size",
        "perplexity",
        "KL",
        "top-1",
        *(("mean acc",) if tasks else ()),
        "time",
        title=title,
    )
    for r in rows:
        if "error" in r:
            table.add_row(
                r["scheme"],
                r["recipe"],
                "",
                "",
                "failed",
                *("",) * (4 if tasks else 3),
                style="red",
            )
            continue
        bits = "" if r["bits"] is None else f"{r['bits']:.3f}"
        accuracy = (
            (f"{r['tasks']['mean_acc']:.3f}",)
            if tasks and r["tasks"]["mean_acc"] is not None
            else ("",)
            if tasks
            else ()
        )
        table.add_row(
            r["scheme"],
            r["recipe"],
            bits,
            size(r["bytes"]),
            f"{r['perplexity']:.4g}",
            f"{r['kl']:.4f}",
            f"{r['top1']:.1%}",
            *accuracy,
            duration(r["seconds"]) if r["seconds"] else "",
        )
    return table


def runtimes_table(verdicts: Sequence[Verdict]) -> Table:
    """What every runtime says to a plan, a line each."""
    table = Table("runtime", "verdict", "format", "how, or why not", show_lines=True)
    for v in verdicts:
        how = (f"{v.weights} - {v.requires}", _made(v), *v.notes) if v.accepts else v.reasons
        table.add_row(v.runtime, "loads" if v.accepts else "refuses", v.format, "\n".join(how))
    return table


def runtime_table(v: Verdict) -> Table:
    """What one runtime says that accepts a plan."""
    table = Table(show_header=False)
    rows = [
        ("runtime", v.runtime),
        ("needs", v.requires),
        ("format", v.format),
        ("weights", v.weights),
        ("export", _made(v)),
    ]
    for row in [*rows, *(("note", n) for n in v.notes)]:
        table.add_row(*row)
    return table


def _made(v: Verdict) -> str:
    return v.export or "as quantized, no export"


def remarks_of(report: Mapping[str, Any]) -> list[str]:
    """What a person should know of an artifact's source, and of what became of its tensors and
    files; older reports have none.
    """
    lines = list(report.get("remarks", ()))
    copied, left = report.get("copied", {}), report.get("left_out", {})
    if copied:
        lines.append(
            f"{len(copied)} tensors that the model's class does not know were copied as they are: "
            f"{_some(copied)}"
        )
    odd = [
        f"{name} ({why})"
        for name, why in left.items()
        if name not in _USUALLY_LEFT and not name.startswith(".")
    ]
    return lines + [f"left out: {line}" for line in odd]


def _some(names: Iterable[str], shown: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (
        f" and {len(listed) - shown} more" if len(listed) > shown else ""
    )


def summary(result: Result) -> str:
    """The closing block: sizes, proof, and what to type next."""
    report: Mapping[str, Any] = result.report
    s, folder = report["size"], result.folder
    lines = [
        "already made by an earlier run of this command; verified again" if result.repeated else "",
        f"{size(s['before'])} -> {size(s['after'])} on disk; {s['bits_per_weight']:.3f} bits per "
        "quantized weight, "
        f"{s['model_bits_per_weight']:.3f} over all parameters",
    ]
    lines += [f"note: {remark}" for remark in remarks_of(report)]
    kept = report.get("offload")  # older reports have none
    if kept and kept["used"] == "disk":
        lines.append(f"activations were kept on disk, {size(kept['bytes'])} at most")
    q = report["quality"]
    if q:
        lines.append(
            f"{q['text']}, {q['quantized']['windows']} x {q['quantized']['length']} tokens: "
            f"perplexity {q['float']['perplexity']:.4g} -> "
            f"{q['quantized']['perplexity']:.4g}, KL {q['quantized']['kl']:.4g}, top-1 "
            f"{q['quantized']['top1']:.1%}"
        )
    lines += [
        f"verified: {result.verification.summary}",
        f"hash {report['hash'][:16]}, {duration(report['seconds'])}, report in "
        f"{folder / 'report.json'}",
        "",
        *_use(folder, report),
        f"evaluate  lowbit eval {shell(folder)} --text stdlib --reference {shell(report['model'])}",
        f"check     lowbit verify {shell(folder)}",
        f"share     lowbit push {shell(folder)} OWNER/NAME    (with its model card, README.md)",
    ]
    return "\n".join(lines)


def _use(folder: Path, report: Mapping[str, Any]) -> list[str]:
    if report["format"] == "lowbit":
        return [
            f"load      import lowbit; AutoModelForCausalLM.from_pretrained({literal(folder)})    "
            "(runs in transformers, after import lowbit)",
            "serve     no server reads this format, chosen for "
            f"{report.get('beyond_compressed_tensors', 'what compressed-tensors cannot carry')}",
            "          if vLLM can run it all the same, this makes a copy for it, or says why "
            f"not: lowbit export {shell(folder)} -o DIR",
        ]
    return [
        f"load      AutoModelForCausalLM.from_pretrained({literal(folder)})    (plain "
        "transformers with compressed-tensors)",
        f"serve     vllm serve {shell(folder)}    (which versions: lowbit plan "
        f"{shell(report['model'])} --scheme {report['recipe']['scheme']})",
    ]
