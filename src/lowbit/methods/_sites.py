"""The walk of a column-loop method through a block: step by step the Hessians of the sites that are
reached at once, then the codes of what reads them.

Within a step nothing depends on anything else, so its work is dealt out over ranks: whole sites
where there are as many as ranks (experts), else each in parts, of which a method says what they
are. Whoever works on a part of a site factors its Hessian: that is repeated by the ranks that share
a site, and by no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import LowbitError
from ..grid import Coded
from ..grid.kmeans import NotFiniteError
from ..model.block import Block
from ..model.dealing import divided, owners
from ..model.graph import Site
from ..model.statistics import Call, Statistic
from ._hessian import Inputs, Walk, factored, input_hessians
from ._parts import Part, joined

# Bytes of calls kept for the next step, so that it need not run the block from its start.
_KEPT = 1 << 28


@dataclass(frozen=True)
class Found:
    """What came out of a part.

    Attributes:
        codes: of each span. remarks: (what, of which linear).
    """

    codes: Sequence[Coded]
    remarks: Sequence[tuple[str, str]] = ()


Divide = Callable[[Block, Sequence[str], int], list[Part]]
Solve = Callable[[Block, Part, "Inputs | None"], Found]


def solve_sites(block: Block, walk: Walk, divide: Divide, solve: Solve) -> Block:
    """Code all linears that are not coded yet, site by site, each on the Hessian of its inputs.

    Args:
        divide: linears that read the same inputs, and into how many parts the work on them should
            be cut, 1 on a single rank -> the parts.
        solve: codes for one part; None if its linears see nothing but zeros.

    Raises:
        LowbitError: a Hessian is not finite, or not invertible with any damping tried; what was
            compensated for ran away.
    """
    steps = walk.steps(block)
    passes = _Passes(min(walk.rows or block.tuned_rows, block.tuned_rows))
    trouble: list[str] = []
    remarks: dict[str, list[str]] = {}
    for number, step in enumerate(steps):
        said = ", ".join(name for names in step for name in names)
        block.announce(f"{walk.method}: inputs of {said}")
        following = steps[number + 1] if number + 1 < len(steps) else []
        jobs = _jobs(block, step, divide)
        work = _Step(block, walk, solve, jobs, passes.hessians(block, step, following))
        block, done = work.done()
        for job, (_, met) in zip(jobs, done, strict=True):
            trouble += met if job.first else ()
        for found, _ in done:
            for what, name in found.remarks:
                remarks.setdefault(what, []).append(name)
    told = (f"{walk.method}: {', '.join(names)}: {what}" for what, names in remarks.items())
    return block.remarked(*trouble, *told)


@dataclass(frozen=True)
class _Job:
    """A part of the work on a site.

    Attributes:
        site: its linears. first: whether this is the first part of them.
    """

    site: tuple[str, ...]
    part: Part
    first: bool

    def cost(self, block: Block) -> float:
        """Operations: the factor, and the columns of these rows."""
        width = block.weight(self.site[0]).shape[1]
        operations: int = width**2 * (width + 2 * sum(s.count for s in self.part))
        return float(operations)


def _jobs(block: Block, sites: Sequence[tuple[str, ...]], divide: Divide) -> list[_Job]:
    """Whole sites, or parts of them where they are fewer than ranks."""
    parts = max(1, block.ranks.size // len(sites))
    return [
        _Job(names, part, i == 0)
        for names in sites
        for i, part in enumerate(divide(block, names, parts))
    ]


@dataclass
class _Step:
    """Sites that are reached at once.

    Attributes:
        hessians: of each site by its first linear, until it is factored.
    """

    block: Block
    walk: Walk
    solve: Solve
    jobs: list[_Job]
    hessians: dict[str, Tensor]
    _factored: tuple[str, Inputs | None, list[str]] | None = None

    def done(self) -> tuple[Block, list[tuple[Found, list[str]]]]:
        """The block with codes of all sites; and by job what was found, and what was met with on
        the way to the site's factor.
        """
        block, ranks = self.block, self.block.ranks
        costs = [job.cost(block) for job in self.jobs]
        owner = owners(costs, ranks.size)
        own = {job.site[0] for job, r in zip(self.jobs, owner, strict=True) if r == ranks.rank}
        self.hessians = {n: h for n, h in self.hessians.items() if n in own}
        done = divided(ranks, costs, self._one)
        self._factored = None
        spans = [s for job in self.jobs for s in job.part]
        codes = joined(zip(spans, (q for found, _ in done for q in found.codes), strict=True))
        block = block.with_params({n: q.params for n, q in codes.items()})
        return block.with_codes(codes), done

    def _one(self, number: int) -> tuple[Found, list[str]]:
        job, walk = self.jobs[number], self.walk
        names = dict.fromkeys(s.linear for s in job.part)
        self.block.announce(f"{walk.method}: codes of {', '.join(names)}")
        first = job.site[0]
        if self._factored is None or self._factored[0] != first:
            self._factored = None  # as large as what is made next
            met: list[str] = []
            inputs = factored(self.block, walk, first, self.hessians.pop(first), met)
            self._factored = first, inputs, met
        inputs, met = self._factored[1:]
        try:
            found = self.solve(self.block, job.part, inputs)
            for q in found.codes:
                q.grid.check_finite(q.params)
        except NotFiniteError as e:
            raise LowbitError(
                f"'{self.block.name}.{first}' and what reads the same inputs: {e}. Calibrate on "
                f"more rows, or raise {walk.method}.damping."
            ) from e
        return found, met


class _Passes:
    """Passes over the calibration rows, one a step.

    A step inside the submodule that the step before it looked at need not run the block from its
    start: the submodule's calls are kept, as long as nothing before it changes.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._kept: tuple[str, list[Call]] | None = None
        self._pools: dict[Site, Statistic] = {}

    def hessians(
        self, block: Block, step: Sequence[tuple[str, ...]], following: Sequence[tuple[str, ...]]
    ) -> dict[str, Tensor]:
        """The Hessian of each site of a step, by its first linear; see `input_hessians`."""
        linears = [names[0] for names in step]
        part = self._worth_keeping(block, step, following)
        calls: list[Call] = []
        keep = {} if part is None else {part: calls}
        self._pools = {s: p for s, p in self._pools.items() if not set(s.reads).isdisjoint(linears)}
        found = input_hessians(block, linears, self._rows, self._kept, keep, self._pools)
        self._kept = None if part is None else (part, calls)
        return found

    def _worth_keeping(
        self, block: Block, step: Sequence[tuple[str, ...]], following: Sequence[tuple[str, ...]]
    ) -> str | None:
        """The submodule whose calls the next step can start from; None if that saves nothing."""
        first, graph = step[0][0], block.graph
        part = graph.site_of(first).probe
        # Little runs before attention.
        if not following or part == graph.attention:
            return None
        if not following[0][0].startswith(f"{part}."):
            return None
        numbers = self._rows * block.xq.shape[1] * block.weight(first).shape[1]
        return part if numbers * block.compute.itemsize <= _KEPT else None
