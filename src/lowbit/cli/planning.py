"""`lowbit plan`: from its options to what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..console import Console, Table
from ..errors import LowbitError
from ..grid.names import parse_scheme
from ..machine import free_memory, pick_device
from ..model.tracing import described
from ..plan import Plan, calibration_of, make_plan, read_config
from ..plan.memory import FreeMemory
from ..plan.speed import measure_speed
from ..plan.targets import check_target, demand
from ..recipe import load_recipe
from ..recipe.widths import with_bits
from .display import graph_data, graph_tables, plan_rows, runtime_table, runtimes_table
from .places import write_json


@dataclass(frozen=True)
class PlanOptions:
    """What `lowbit plan` was asked, see its help."""

    model: str
    scheme: str | None
    recipe: str
    settings: Sequence[str]
    samples: int | None
    length: int | None
    target: str | None
    tensor_parallel: int
    plain: bool
    device: str
    gpu_memory: float | None
    dtype: str
    ranks: int
    offload: str
    folder: Path
    graph: bool
    json: Path | None
    bits: str | None = None

    @property
    def where(self) -> torch.device:
        """The device that is planned for."""
        if self.gpu_memory is None:
            return pick_device(self.device)
        if self.device != "auto":
            raise LowbitError(
                "--gpu-memory plans for a GPU that is not here, --device for one that is: give one "
                "of them."
            )
        return torch.device("cuda")

    @property
    def free(self) -> FreeMemory | None:
        """How much memory a device has free, where a GPU is planned for that is not here."""
        if self.gpu_memory is None:
            return None
        gpu = int(self.gpu_memory * 2**30)
        return lambda d: free_memory(d) if d.type == "cpu" else gpu

    def planned(self) -> Plan:
        """The plan.

        Raises:
            LowbitError: it cannot be made.
        """
        scheme = None if self.scheme is None else parse_scheme(self.scheme)
        recipe = load_recipe(self.recipe, scheme=scheme, settings=self.settings)
        if self.bits is not None:
            recipe = with_bits(recipe, self.bits)
        config = read_config(self.model)
        rows = calibration_of(recipe.calibration, config, None, self.samples, self.length)
        return make_plan(
            config,
            recipe,
            rows.samples,
            rows.length,
            tensor_parallel=self.tensor_parallel,
            device=self.where,
            dtype=self.dtype,
            ranks=self.ranks,
            plain=self.plain,
        )


def run_plan(asked: PlanOptions, out: Console) -> None:
    """Print a plan, write it, then refuse what cannot be done."""
    target = None if asked.target is None else check_target(asked.target, asked.tensor_parallel)
    where, free = asked.where, asked.free
    found = described(read_config(asked.model)) if asked.graph else None
    for shown in [] if found is None else graph_tables(found):  # also of what the plan refuses
        out.print(shown)
    p = asked.planned()
    speed = measure_speed(where) if free is None else None
    if target is not None:
        demand(p.verdict(target))
    table = Table(show_header=False)
    for row in plan_rows(p, speed, asked.offload, asked.folder, free):
        table.add_row(*row)
    out.print(table)
    out.print(runtimes_table(p.runtimes) if target is None else runtime_table(p.verdict(target)))
    if asked.json:
        said: dict[str, Any] = {"target": target, "tensor_parallel": asked.tensor_parallel}
        if found is not None:
            said["graph"] = graph_data(found)
        write_json(asked.json, {**p.as_dict(speed), **said})
    p.memory.check(where, free)
    if free is None:  # else it is not this machine's memory and disk that count
        p.memory.placed(asked.offload, where, asked.folder, free)
