"""How long a run takes: work counted from shapes, over what this device was measured to sustain.

Counted are matrix products and the bytes of the passes over activations, weights and logits. Of
several processes it is what each of them does, its part of what is divided and all of what is
repeated, and what it sends, where the speed of the link is known. Left out: launching kernels,
which is what small models and column loops (GPTQ, CLAQ) wait for on a GPU; reading, packing,
hashing and the closing check. So an estimate is low where those count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..arithmetic import multiplies_bfloat16
from ..machine import free_memory
from ..methods.cost import Shapes, Work
from ..recipe import Recipe

_JUDGED = 32  # rows on which losses that decide are computed


@dataclass(frozen=True)
class Speed:
    """What a device sustains.

    Attributes:
        half: FLOP/s of a matrix product in bfloat16. single: in float32. copies: bytes/s of memory,
            reads and writes together. near, far: bytes/s that one process sends to others of its
            machine and of other machines; infinite where nobody has measured them.
    """

    half: float
    single: float
    copies: float
    near: float = math.inf
    far: float = math.inf


def seconds(work: Work, speed: Speed) -> float:
    """One kind of work after the other at a device's rates."""
    computed = work.half / speed.half + work.single / speed.single
    return computed + work.moved / speed.copies + work.near / speed.near + work.far / speed.far


Parts = dict[str, Work]


def block_work(recipe: Recipe, shapes: Shapes) -> tuple[Parts, Parts]:
    """The work of one block, of one process, by what is done; and what there is more to do if it is
    the last one.
    """
    rows = shapes.rows
    # Target, next input; two losses.
    passing = 2 * rows.mine(rows.count) + 2 * shapes.learned(_JUDGED)
    each, last = {"passes": shapes.forward(passing)}, Parts()
    for name, entry, method in recipe.entries:
        cost = entry.cost(method, shapes)
        for part, work in (cost.parts or {"": cost.work}).items():
            each[f"{name}: {part}" if part else name] = work
        last[f"{name}: last block"] = cost.last
    return each, last


def run_work(recipe: Recipe, kinds: Sequence[Shapes], of_layers: Sequence[int]) -> Parts:
    """The work of a run, all blocks, of one process, by what is done.

    Args:
        kinds: of each kind of block. of_layers: of each block, the index of its kind.
    """
    of_kinds = [block_work(recipe, shapes) for shapes in kinds]
    total: Parts = {}
    for kind, (each, _) in enumerate(of_kinds):
        for part, work in each.items():
            total[part] = total.get(part, Work()) + work * of_layers.count(kind)
    for part, work in of_kinds[of_layers[-1]][1].items():
        total[part] = total.get(part, Work()) + work
    return {part: work for part, work in total.items() if work != Work()}


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
