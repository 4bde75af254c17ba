"""What a run holds in memory, counted from shapes: one block while a method works on it, the
activation streams, and where those go.

The numbers follow the methods' code: which tensors live together when most of them do. P is the
weights of a block's linears, L those of its largest linear. Where a method's code changes, its line
here has to; benchmarks/growth.py prints some beside measured peaks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch

from .errors import LowbitError, in_bytes, unknown
from .grid import Codebook, Grid
from .machine import free_memory
from .methods import AWQ, CLAQ, GPTQ, CrossQuant, Method, OmniQuant, QuaRot, SmoothQuant, TesseraQ
from .methods._reconstruct import JUDGED_TOKENS
from .model.context import TOKENS_PER_PASS
from .model.storage import Place, lies_in_memory
from .recipe import Recipe

Room = Callable[[torch.device], int | None]

# Resident before a model is opened: Python, torch, transformers and their libraries.
PROCESS = 490 << 20
_STREAMS = 3  # x, xq and target of one block: `lowbit.loop.Streams`
_OPTIMIZER = 80 << 20  # what torch loads (its compiler) when an optimizer takes its first step
_HOLES = 1.1  # what allocators hold and cannot use: measured


@dataclass(frozen=True)
class Layer:
    """Shapes of a model, as far as memory is concerned.

    Attributes:
        linears: linear of one block -> (out, in). rest: parameters of a block outside its linears.
        outside: parameters outside the blocks, tied ones once. hidden: width of the residual
            stream. vocab: of the head.
    """

    linears: Mapping[str, tuple[int, int]]
    rest: int
    outside: int
    hidden: int
    vocab: int

    @property
    def weights(self) -> int:
        """P: weights in the linears of a block."""
        return sum(a * b for a, b in self.linears.values())

    @property
    def largest(self) -> int:
        """L: weights of the largest linear."""
        return max(a * b for a, b in self.linears.values())

    @property
    def widest(self) -> int:
        """Most inputs or outputs of a linear."""
        return max(max(shape) for shape in self.linears.values())


@dataclass(frozen=True)
class Rows:
    """The calibration as it passes through a block.

    Attributes:
        count: rows, held-out ones included. length: tokens each. stored, compute: bytes of a number
            in streams and in arithmetic.
        ranks: processes that share the rows.
    """

    count: int
    length: int
    stored: int
    compute: int
    ranks: int = 1

    def mine(self, rows: int) -> int:
        """How many of so many rows one process has to do with, at most."""
        return -(-min(rows, self.count) // self.ranks)

    def tokens(self, most: int) -> int:
        """Tokens in a batch of whole rows, at most so many (or one row)."""
        return min(self.mine(self.count), max(1, most // self.length)) * self.length


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
            included; "passes" is what every run does besides.
        least: what the hungriest of them cannot do without, whatever its code: less memory than
            this is refused.
        stream: one activation stream. copies: how many live at a time.
        outer: embeddings, final norm and head as they compute, held with the last block (and alone
            at the start).
        process: what the libraries take of the same memory: on a CPU.
        processes: how many of the run's are on this machine. Every number here is of one; on a CPU
            all take from the same memory.
    """

    steps: Mapping[str, int]
    least: int
    stream: int
    copies: int
    outer: int
    process: int = 0
    processes: int = 1

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
        """All streams that live at a time."""
        return self.stream * self.copies

    def check(self, device: torch.device, room: Room | None = None) -> None:
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
        lighter = {"gptq": "awq or rtn", "claq": "awq or rtn", "awq": "rtn", "passes": ""}.get(
            hungry, "gptq or awq or rtn"
        )
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
        self, asked: str, device: torch.device, folder: Path, room: Room | None = None
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
        return self.copies * self.processes * (1 << max(0, self.stream - 1).bit_length())

    def _check_place(self, place: Place, device: torch.device, folder: Path, room: Room) -> None:
        """Refuse a place that has less free than the streams and the least of a block take."""
        if place == "disk":
            free, wanted, where = disk_free(folder), self.streams * self.processes, f"'{folder}'"
        elif place == "device":
            free, wanted, where = room(device), self.streams + self.least, f"'{device}'"
        else:
            free, wanted, where = (
                room(torch.device("cpu")),
                self._on_host(device, self.least),
                "this machine's memory",
            )
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


def needs(layer: Layer, rows: Rows, recipe: Recipe, process: int = 0, processes: int = 1) -> Needs:
    """Count what a run of a recipe takes. Estimates are of the code as it is; see `Needs.least` for
    the bound.

    Args:
        process: bytes that the libraries take of the same memory. processes: how many of the run's
            are on this machine.
    """
    base = 4 * (layer.weights + layer.rest)
    passing = _passing(layer, rows)
    coded = 5 * layer.weights  # uint8 codes, and the weights they decode to
    clipped = any(isinstance(m, AWQ) and m.clip != "none" for m in recipe.methods)
    kept = rows.stored * layer.weights if clipped else 0  # weights before the clip, for judging
    steps = {"passes": base + kept + coded + max(passing, 16 * layer.largest)}
    least = base + coded
    for method in recipe.methods:
        name = type(method).__name__.lower()
        steps[name] = base + _step(method, recipe.grid, layer, rows, passing, kept)
        least = max(least, base + _floor(method, recipe.grid, layer, rows, kept))
    steps = {name: round(most * _HOLES) for name, most in steps.items()}
    if process and any(isinstance(m, OmniQuant) for m in recipe.methods):
        process += _OPTIMIZER
    copies = _STREAMS + int(
        any(isinstance(m, OmniQuant) and _second(m, recipe) for m in recipe.methods)
    )
    stream = rows.mine(rows.count) * rows.length * layer.hidden * rows.stored
    return Needs(steps, least, stream, copies, layer.outside * rows.compute, process, processes)


def _second(method: OmniQuant, recipe: Recipe) -> bool:
    """Whether OmniQuant also keeps the float block's output on the quantized stream."""
    return not method.clips and (
        method.second_loss == "on" or (method.second_loss == "auto" and recipe.grid.bits <= 2)
    )


def _cast(layer: Layer, rows: Rows) -> int:
    """The weights in the compute dtype, where that is not the float32 they are held in."""
    return 0 if rows.compute == 4 else rows.compute * layer.weights


def _passing(layer: Layer, rows: Rows) -> int:
    """Activations of a batch that passes without gradients: three as wide as the block gets, and
    the residual stream around them.
    """
    return rows.tokens(TOKENS_PER_PASS) * rows.compute * (
        3 * layer.widest + 4 * layer.hidden
    ) + _cast(layer, rows)


def _training(layer: Layer, rows: Rows, batch: int) -> int:
    """What a forward pass saves for gradients, and the gradients of the widest activations."""
    wide = sum(a + b for a, b in layer.linears.values()) + 10 * layer.hidden + 2 * layer.widest
    return rows.mine(batch) * rows.length * rows.compute * wide + _cast(layer, rows)


def _step(method: Method, grid: Grid, layer: Layer, rows: Rows, passing: int, kept: int) -> int:
    """Most bytes held besides a block's float32 weights while a method works."""
    weights, largest = layer.weights, layer.largest
    if isinstance(method, AWQ):
        tokens = rows.mine(method.rows or rows.count) * rows.length
        # A site's inputs, their products.
        seen = tokens * rows.compute * max(3 * layer.hidden, layer.widest) + 4 * layer.widest**2
        scales = 4 * weights + seen + max(passing, 32 * largest) if method.scales else 0
        # Folded, and clipped.
        clip = 8 * weights + kept + max(passing, 20 * largest) if method.clip != "none" else 0
        return max(scales, clip)
    if isinstance(method, TesseraQ):
        # Per weight: nu and its two moments, a code and the way to the other, a snapshot, soft
        # weights and their gradients; codebooks hold both codes as indices and both levels. Then
        # the readout of the last block, five times its logits.
        state = (56 if isinstance(grid, Codebook) else 18 + 2 * rows.compute) * weights
        read = 5 * 4 * layer.vocab if method.objective == "logits" else 0
        stepping = (
            _training(layer, rows, method.batch) + read * rows.mine(method.batch) * rows.length
        )
        return kept + state + max(stepping, read * rows.tokens(JUDGED_TOKENS))
    if isinstance(method, OmniQuant):
        return kept + 40 * weights + _training(layer, rows, method.batch)
    if isinstance(method, (GPTQ, CLAQ)):
        square = 8 * layer.widest**2
        sites = {b for _, b in layer.linears.values()}
        waiting = 0 if method.true_sequential else sum(8 * b * b for b in sites)
        return (
            kept
            + 5 * weights
            + waiting
            + max(square + passing, 5 * square, 2 * square + 24 * largest)
        )
    if isinstance(method, (SmoothQuant, CrossQuant, QuaRot)):
        return 4 * weights + max(passing, 24 * largest)
    return weights + 12 * largest


def _floor(method: Method, grid: Grid, layer: Layer, rows: Rows, kept: int) -> int:
    """Bytes besides a block's float32 weights that live together while a method works, whatever the
    activations.
    """
    if isinstance(method, TesseraQ):  # as in `_step`, soft weights and their gradient in 16 bits
        return kept + (52 if isinstance(grid, Codebook) else 18 + 2 * 2) * layer.weights
    if isinstance(method, OmniQuant):
        return 2 * rows.compute * layer.weights
    if isinstance(method, (GPTQ, CLAQ)):  # a Hessian and its factor in float64
        return 16 * max(b for _, b in layer.linears.values()) ** 2
    return 0
