"""How long a run takes: work counted from shapes, over what this device was measured to sustain.

Counted are matrix products and the bytes of the passes over activations, weights and logits. Left
out: launching kernels, which is what small models and column loops (GPTQ, CLAQ) wait for on a GPU;
reading, packing, hashing and the closing check. So an estimate is low where those count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .grid import Codebook
from .machine import free_memory
from .memory import Layer, Rows
from .methods import AWQ, CLAQ, GPTQ, Method, OmniQuant, TesseraQ
from .methods.omniquant import steps as omniquant_steps
from .methods.tesseraq import multiplies_bfloat16, soft_shares
from .recipe import Recipe

# Bytes that pass memory for every weight, counted from the code, temporaries included.
_STEP = 36  # a step of soft rounding: the weights made, and their variables moved
_HARDEN = 80  # a phase of it: distances, bins, histogram, masks
_CANDIDATE = 60  # a scale of AWQ's search: scaled and rounded in float64
_SHRINK = 40  # a range of its clip search
# for every logit of a step: the softmax of both models in float32, the divergence and its gradient
_LOGITS = 44
_JUDGED = 32  # rows on which losses that decide are computed
_SEARCHED = 1024  # tokens after which a CPU looks at a candidate of AWQ's search


@dataclass(frozen=True)
class Speed:
    """What a device sustains.

    Attributes:
        half: FLOP/s of a matrix product in bfloat16. single: in float32. copies: bytes/s of memory,
            reads and writes together.
    """

    half: float
    single: float
    copies: float


@dataclass(frozen=True)
class Work:
    """FLOPs of products in 16 bits and in float32, and bytes that pass memory."""

    half: float = 0.0
    single: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.half + other.half, self.single + other.single, self.moved + other.moved)

    def __mul__(self, times: float) -> Work:
        return Work(self.half * times, self.single * times, self.moved * times)

    def seconds(self, speed: Speed) -> float:
        """One kind after the other at a device's rates."""
        return self.half / speed.half + self.single / speed.single + self.moved / speed.copies


# --- work -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """What the work depends on.

    Attributes:
        layer: sizes. sites: linears that read the same input, in order. held_out: rows that pass
            and teach nothing.
        rows: calibration rows of the run, those held out not included.
        device: which computes. compute: dtype of forward passes there.
    """

    layer: Layer
    sites: Sequence[Sequence[str]]
    rows: Rows
    held_out: int
    device: torch.device
    compute: torch.dtype

    @property
    def widths(self) -> list[int]:
        """Inputs of each site."""
        return [self.layer.linears[names[0]][1] for names in self.sites]

    def products(self, flops: float, half: bool | None = None) -> Work:
        """Products of a forward pass, or, with ``half``, in the precision it says."""
        half = self.compute.itemsize == 2 if half is None else half
        return Work(half=flops) if half else Work(single=flops)

    def forward(self, rows: float, half: bool | None = None) -> Work:
        """So many rows through a block: attention's own products included, activations written once
        and read once.
        """
        layer, tokens = self.layer, rows * self.rows.length
        # Numbers a token, as memory.py has them.
        wide = sum(a + b for a, b in layer.linears.values()) + 10 * layer.hidden + 2 * layer.widest
        flops = tokens * (2.0 * layer.weights + 4.0 * self.rows.length * layer.hidden)
        return self.products(flops, half) + Work(moved=2.0 * tokens * self.rows.compute * wide)


def run_work(recipe: Recipe, shapes: Shapes, blocks: int) -> Work:
    """The work of a run, all blocks, of one process."""
    rows = shapes.rows
    # Target, next input; two losses.
    passing = 2 * rows.mine(rows.count + shapes.held_out) + 2 * min(_JUDGED, rows.mine(rows.count))
    each = shapes.forward(passing)
    for method in recipe.methods:
        each += _of_method(method, recipe, shapes)
    return each * blocks + _last_block(recipe, shapes)


def _of_method(method: Method, recipe: Recipe, shapes: Shapes) -> Work:
    """The work of a method on one block."""
    if isinstance(method, AWQ):
        return _awq(method, recipe, shapes)
    if isinstance(method, (GPTQ, CLAQ)):
        return _columns(method, shapes)
    if isinstance(method, OmniQuant):
        epochs = method.epochs or (40 if recipe.grid.bits <= 2 else 20)
        steps = omniquant_steps(epochs, shapes.rows.count, method.batch)
        return shapes.forward(shapes.rows.mine(method.batch)) * (4.5 * steps)
    if isinstance(method, TesseraQ):
        return _tesseraq(method, shapes)
    return Work()


def _awq(method: AWQ, recipe: Recipe, shapes: Shapes) -> Work:
    layer, length = shapes.layer, shapes.rows.length
    rows = shapes.rows.mine(min(method.rows or shapes.rows.count, shapes.rows.count))
    tokens = rows * length
    total = shapes.forward(2 * rows)  # inputs of all sites, twice
    if method.scales:
        # A CPU leaves a candidate once it has lost: all are begun, about two are finished.
        begun = min(1.0, _SEARCHED / tokens) if shapes.device.type == "cpu" else 1.0
        tried = method.exponents * begun + 2 * (1 - begun)
        # The last site is judged through its Gram matrix, the others by running their part.
        wide = shapes.widths[-1]
        judged = 2.0 * (
            layer.weights
            - sum(a * b for n, (a, b) in layer.linears.items() if n in shapes.sites[-1])
        )
        total += shapes.products(judged * tokens * (1 + tried))
        outputs = sum(layer.linears[n][0] for n in shapes.sites[-1])
        total += Work(
            single=2.0 * tokens * wide**2 + 2.0 * outputs * wide**2 * tried,
            moved=_CANDIDATE * layer.weights * method.exponents,
        )
    if method.clip != "none" and not isinstance(recipe.grid, Codebook):
        size = recipe.grid.group_size
        seen = min(tokens, method.clip_tokens or tokens)
        moments = sum(2.0 * seen * width * (size or width) for width in shapes.widths)
        searched = (
            sum(2.0 * a * b * (size or b) for a, b in layer.linears.values()) * method.shrinks
        )
        total += Work(single=moments + searched, moved=_SHRINK * layer.weights * method.shrinks)
    return total


def _columns(method: GPTQ | CLAQ, shapes: Shapes) -> Work:
    """Hessians, their factors, and the column loop; its launches are not counted."""
    rows = shapes.rows.mine(min(method.rows or shapes.rows.count, shapes.rows.count))
    tokens, widths = rows * shapes.rows.length, shapes.widths
    # The part of the block from one site to the next.
    passes = len(widths) / 2 if method.true_sequential else 1
    square = sum(2.0 * tokens * n**2 + 2.0 * n**3 for n in widths)
    loop = sum(2.0 * a * b * b for a, b in shapes.layer.linears.values())
    return shapes.forward(rows) * passes + Work(single=square + loop)


def _tesseraq(method: TesseraQ, shapes: Shapes) -> Work:
    layer, phases = shapes.layer, len(soft_shares(method.schedule)) * method.rounds
    # None are made in float16.
    half = shapes.compute == torch.bfloat16 or method.in_bfloat16(shapes.device)
    # Forward, and twice that back.
    steps = shapes.forward(shapes.rows.mine(method.batch), half) * (3 * method.steps)
    judged = shapes.forward(2 * min(_JUDGED, shapes.rows.mine(shapes.rows.count)))
    return steps + judged + Work(moved=(_STEP * method.steps + _HARDEN * phases) * layer.weights)


def _last_block(recipe: Recipe, shapes: Shapes) -> Work:
    """What tuning the last block on its logits adds: two products with the head forward, one back,
    and passes over the logits.
    """
    total = Work()
    for method in recipe.methods:
        if isinstance(method, TesseraQ) and method.objective == "logits":
            tokens = shapes.rows.mine(method.batch) * shapes.rows.length * method.steps
            logits = float(tokens) * shapes.layer.vocab
            # The readout has the precision of forward passes, whatever that of the steps.
            total += shapes.products(6.0 * logits * shapes.layer.hidden) + Work(
                moved=_LOGITS * logits
            )
    return total


# --- speed ----------------------------------------------------------------------------------------


class Bench(Protocol):
    """Where rates are measured: a device and a clock."""

    def product(self, size: int, dtype: torch.dtype) -> Callable[[int], None]:
        """Makes a function that computes so many (size, size) products and then waits for the
        device once.
        """
        ...

    def copy(self, numbers: int) -> Callable[[int], None]:
        """The same for adding one float32 tensor to another, 12 bytes a number."""
        ...

    def clock(self) -> float:
        """Seconds."""
        ...

    def free(self) -> int | None:
        """Bytes that could be taken, None where nobody tells."""
        ...


class _Device:
    """A real device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock = device, time.perf_counter

    def product(self, size: int, dtype: torch.dtype) -> Callable[[int], None]:
        a = torch.randn(size, size, device=self.device).to(dtype)
        out = torch.empty_like(a)
        return self._repeated(lambda: torch.mm(a, a, out=out), out)

    def copy(self, numbers: int) -> Callable[[int], None]:
        a, b = (torch.zeros(numbers, device=self.device) for _ in range(2))
        return self._repeated(lambda: a.add_(b), a)

    def _repeated(self, work: Callable[[], object], out: torch.Tensor) -> Callable[[int], None]:
        def run(times: int) -> None:
            for _ in range(times):
                work()
            out.view(-1)[0].item()

        return run

    def free(self) -> int | None:
        return free_memory(self.device)


# Of products: on a CPU, elsewhere.
_SIZES: Mapping[bool, tuple[int, ...]] = {
    True: (512, 1024, 2048),
    False: (1024, 2048, 4096, 8192),
}
_NUMBERS: Mapping[bool, int] = {True: 1 << 23, False: 1 << 27}
_AT_ONCE = 10  # before the device is waited for: its latency must not count as its rate
_BUDGET = 0.25  # seconds that a repetition takes at most, as far as one product does not


def measure_speed(device: torch.device, bench: Bench | None = None) -> Speed:
    """What a device sustains: the best of a few sizes and repetitions, in about two seconds, one on
    a CPU.

    Args:
        bench: where to measure instead, for tests.
    """
    bench, cpu = bench or _Device(device), device.type == "cpu"
    single = _product_rate(bench, torch.float32, _SIZES[cpu])
    half = (
        _product_rate(bench, torch.bfloat16, _SIZES[cpu]) if multiplies_bfloat16(device) else single
    )
    numbers = _NUMBERS[cpu]
    while numbers > 1 << 16 and not _fits(bench, 8 * numbers):
        numbers //= 4
    return Speed(half, single, 12 * numbers / _shortest(bench, bench.copy(numbers)))


def _product_rate(bench: Bench, dtype: torch.dtype, sizes: Sequence[int]) -> float:
    best = 0.0
    for size in sizes:
        if best and not _fits(bench, 2 * size**2 * dtype.itemsize + 4 * size**2):
            break
        took = _shortest(bench, bench.product(size, dtype))
        best = max(best, 2.0 * size**3 / took)
        if 8 * took > _BUDGET:  # what the next size would take
            break
    return best


def _fits(bench: Bench, wanted: int) -> bool:
    free = bench.free()
    return free is None or 4 * wanted <= free  # others use the device too


def _shortest(bench: Bench, run: Callable[[int], None]) -> float:
    """Seconds that one repetition takes when several follow each other; the shortest found."""
    run(1)  # the first one also loads libraries
    took = _timed(bench, run, 1)
    times = max(1, min(_AT_ONCE, int(_BUDGET / max(took, 1e-9))))
    return min([took, *(_timed(bench, run, times) / times for _ in range(2))])


def _timed(bench: Bench, run: Callable[[int], None], times: int) -> float:
    start = bench.clock()
    run(times)
    return max(bench.clock() - start, 1e-9)
