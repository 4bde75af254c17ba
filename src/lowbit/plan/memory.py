"""What a run holds in memory: one block while a method works on it, the activation streams, and
where those go.

The numbers of each method are its own, see `lowbit.methods.cost`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional, cast, get_args

import torch

from ..errors import LowbitError, in_bytes, unknown
from ..machine import free_memory
from ..methods.cost import Shapes
from ..model.context import SUMMED, tokens_at_a_time
from ..model.storage import Place, lies_in_memory
from ..recipe import Recipe

FreeMemory = Callable[[torch.device], Optional[int]]

# Resident before a model is opened: Python, torch, transformers and their libraries.
PROCESS = 490 << 20
_WORD, _WORDS = 760, 50_000  # bytes of a tokenizer's word, and how many PROCESS covers: measured
_STREAMS = 3  # x, xq and target of one block: `lowbit.model.model.Streams`
_SUMS = 6  # temporaries of a KL
_HOLES = 1.1  # what allocators hold and cannot use: measured


@dataclass(frozen=True)
class Offload:
    """Where a run keeps its activation streams.

    Attributes:
        asked: "device", "host", "disk", or "auto": the first of them that has room for the streams
            (and, as far as it works in the same memory, for the hungriest step of a block).
        used: what it came to; on a CPU "device" is "host".
        bytes: of all streams together.
    """

    asked: str
    used: Place
    bytes: int


@dataclass(frozen=True)
class Needs:
    """Bytes of device memory that one block takes, and bytes of the streams.

    Attributes:
        steps: most that is held while a method works, by its name, block and activations of a batch
            included; "passes" and "quality" are what every run does besides.
        least: what the hungriest of them cannot do without, whatever its code: less memory than
            this is refused.
        stream: one activation stream. copies: how many live at a time.
        outer: embeddings, final norm and head as they compute, held with the last block (and alone
            at the start).
        process: what the libraries take of the same memory: on a CPU.
        processes: how many of the run's are on this machine. Every number here is of one; on a CPU
            all take from the same memory.
        beside: what lies beside the streams at most, see `lowbit.model.beside`.
        lighter: names of recipes that take less than a step, for an error.
    """

    steps: Mapping[str, int]
    least: int
    stream: int
    copies: int
    outer: int
    process: int = 0
    processes: int = 1
    lighter: Mapping[str, str] = field(default_factory=dict)
    beside: int = 0

    @property
    def peak(self) -> int:
        """The largest sum of all, if the streams live where blocks are computed."""
        return self.process + self.block + self.outer + self.streams

    @property
    def block(self) -> int:
        """The hungriest step."""
        return max(self.steps.values())

    @property
    def streams(self) -> int:
        """All streams that live at a time, and what lies beside them."""
        return self.stream * self.copies + self.beside

    def check(self, device: torch.device, room: FreeMemory | None = None) -> None:
        """Refuse a block that certainly does not fit.

        Args:
            room: bytes free on a device; None asks the machine.

        Raises:
            LowbitError: ``least``, for all processes that share it, is more than the device has
                free.
        """
        free = (room or free_memory)(device)
        if _has(free, self.least * self._sharing(device)):
            return
        hungry = max(self.steps, key=lambda k: self.steps[k])
        where = "this machine" if device.type == "cpu" else f"'{device}'"
        each = f" in each of {self.processes} processes" if self._sharing(device) > 1 else ""
        lighter = self.lighter.get(hungry, "")
        helps = [f"a recipe that takes less (--recipe {lighter})"] if lighter else []
        helps += ["fewer processes"] if each else []
        helps += [
            f"ending what else takes memory on {where}",
            "a device with more of it (--device)",
        ]
        raise LowbitError(
            f"one block of this model does not fit {where}: it takes at least "
            f"{in_bytes(self.least)}{each} (about {in_bytes(self.block)} "
            f"in '{hungry}'), and {in_bytes(free or 0)} are free. What helps: "
            f"{', '.join(helps[:-1])}, or {helps[-1]}."
        )

    def _sharing(self, device: torch.device) -> int:
        """Processes that take from the same memory as this one."""
        return self.processes if device.type == "cpu" else 1

    def placed(
        self, asked: str, device: torch.device, folder: Path, room: FreeMemory | None = None
    ) -> Offload:
        """Where the streams go.

        Args:
            room: bytes free on a device; None asks the machine.
            folder: for files on disk; its nearest ancestor that exists says how much is free.

        Raises:
            LowbitError: no such place, "auto" finds no room in any, or the one asked for certainly
                has not enough.
        """
        room = room or free_memory
        known = ("auto", *get_args(Place))
        if asked not in known:
            raise unknown("place for --offload", asked, known)
        if asked != "auto":
            used = cast(Place, "host" if asked == "device" and device.type == "cpu" else asked)
            self._check_place(used, device, folder, room)
            return Offload(asked, used, self.streams)
        if device.type != "cpu" and _has(room(device), self.streams + self.block + self.outer):
            return Offload(asked, "device", self.streams)
        host = torch.device("cpu")
        if _has(room(host), self._on_host(device, self.block + self.outer)):
            return Offload(asked, "host", self.streams)
        free, wanted = disk_free(folder), self.streams * self.processes
        if lies_in_memory(folder):
            free = 0
        if not _has(free, wanted):
            raise LowbitError(
                f"nowhere is room for the activations of {in_bytes(wanted)}: in memory "
                f"{in_bytes(room(host) or 0)} are free "
                f"(a block takes {in_bytes(self.block)} besides), in '{folder}' "
                f"{in_bytes(free or 0)} on disk. Name a folder on another disk "
                "(--offload-dir), or take fewer --samples."
            )
        return Offload(asked, "disk", self.streams)

    def _on_host(self, device: torch.device, besides: int) -> int:
        """Host memory that the streams of all processes take there, on a CPU with what they work
        in.
        """
        if device.type == "cpu":
            return (self.streams + besides) * self.processes
        # Page-locked: torch takes powers of two.
        rounded = self.copies * (1 << max(0, self.stream - 1).bit_length()) + 2 * self.beside
        return self.processes * rounded

    def _check_place(
        self, place: Place, device: torch.device, folder: Path, room: FreeMemory
    ) -> None:
        """Refuse a place that has less free than the streams and the least of a block take."""
        if place == "disk":
            free, wanted, where = disk_free(folder), self.streams * self.processes, f"'{folder}'"
        elif place == "device":
            free, wanted, where = room(device), self.streams + self.least, f"'{device}'"
        else:
            free, wanted = room(torch.device("cpu")), self._on_host(device, self.least)
            where = "this machine's memory"
        if not _has(free, wanted):
            others = {
                "disk": "another disk (--offload-dir) or --offload host",
                "host": "--offload disk",
                "device": "--offload host or disk",
            }
            raise LowbitError(
                f"the activations do not fit {where}: {in_bytes(wanted)} are wanted there, "
                f"{in_bytes(free or 0)} are free. "
                f"Take {others[place]}, or fewer --samples."
            )


def _has(free: int | None, wanted: int) -> bool:
    return free is None or wanted <= free


def disk_free(folder: Path) -> int | None:
    """Bytes free where a folder lies or would be made; None if that cannot be said."""
    try:
        return shutil.disk_usage(
            next(p for p in (folder, *folder.absolute().parents) if p.exists())
        ).free
    except (OSError, StopIteration):
        return None


def most(of_kinds: Sequence[Needs]) -> Needs:
    """What a run takes whose blocks are of several kinds, from what it would take were all of one:
    the most of each.
    """
    first = of_kinds[0]
    return replace(
        first,
        steps={name: max(n.steps[name] for n in of_kinds) for name in first.steps},
        least=max(n.least for n in of_kinds),
    )


def _quality(vocab: int, length: int) -> int:
    """Bytes while the result is judged: logits of two streams, and temporaries of their sums."""
    tokens = min(length, tokens_at_a_time(vocab))
    return 4 * vocab * (2 * tokens + _SUMS * min(tokens, max(1, SUMMED // vocab)))


def needs(recipe: Recipe, shapes: Shapes, process: int = 0, processes: int = 1) -> Needs:
    """Count what a run of a recipe takes. Estimates are of the code as it is; see `Needs.least` for
    the bound.

    Args:
        process: bytes that the libraries take of the same memory. processes: how many of the run's
            are on this machine.
    """
    layer, rows = shapes.layer, shapes.rows
    base, kept = 4 * (layer.weights + layer.rest), 0
    coded = 5 * layer.weights  # uint8 codes, and the weights they decode to
    steps, lighter, least = dict[str, int](), dict[str, str](), base + coded
    copies, libraries = _STREAMS, 0
    for name, entry, method in recipe.entries:
        cost = entry.cost(method, shapes)
        kept += cost.keeps
        steps[name], lighter[name] = base + kept + cost.held, cost.lighter
        least = max(least, base + kept + cost.least)
        copies = max(copies, _STREAMS + cost.streams)
        libraries = max(libraries, cost.libraries)
    # Packed in a byte at most, and one linear unpacked for the comparison: see `run.shards`.
    stored = layer.weights + layer.largest
    passing = base + kept + coded + stored + max(shapes.passing, 16 * layer.largest)
    steps = {"passes": passing, **steps, "quality": _quality(layer.vocab, rows.length)}
    steps = {name: round(most * _HOLES) for name, most in steps.items()}
    stream = rows.mine(rows.count) * rows.length * layer.passed * rows.stored
    outer = layer.outside * rows.compute
    words = _WORD * max(0, layer.vocab - _WORDS)
    resident = process + words + libraries if process else 0
    return Needs(steps, least, stream, copies, outer, resident, processes, lighter)
