"""Plan: a recipe and a model, resolved and checked. `lowbit plan` prints what `quantize` executes.

Sizes and memory follow from config.json alone; no tensor is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import compute_dtype
from ..errors import LowbitError
from ..formats.packing import tensor_bytes
from ..grid import AnyGrid
from ..methods.cost import Layer, Rows, Shapes, Work
from ..model.beside import held_at_most
from ..model.calibration import Calibration
from ..model.model import Model, Stage
from ..model.outline import Outline
from ..model.stream import ModelStream
from ..model.wrapper import text_config
from ..recipe import Recipe
from .checks import (
    beyond_compressed_tensors,
    check_cache,
    check_divides,
    check_loadable,
    check_shared,
)
from .memory import PROCESS, Needs, most, needs
from .speed import Speed, run_work, seconds
from .targets import Planned, Verdict, verdicts

HELD_OUT = 16  # rows that a run draws besides the calibration's, to judge the result on
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Setting:
    """Where a run works and on how much.

    Attributes:
        samples, length: calibration rows, held-out ones not counted, and tokens each.
        device: which computes. dtype: of the checkpoint. compute: of forward passes; None means
            float32 on a CPU and the checkpoint's elsewhere.
        ranks: processes that share the rows. here: how many of them are on this machine.
    """

    samples: int
    length: int
    device: torch.device
    dtype: torch.dtype
    compute: torch.dtype | None = None
    ranks: int = 1
    here: int = 1

    @property
    def computes(self) -> torch.dtype:
        """The dtype of forward passes."""
        if self.compute is not None:
            return self.compute
        return torch.float32 if self.device.type == "cpu" else self.dtype


@dataclass(frozen=True)
class Plan:
    """One run, resolved: every grid of every linear, what precedes the blocks, and what it takes.
    Sizes in bytes.

    Attributes:
        recipe: with what a run was asked for on top.
        outline: of the model as its stages will leave it.
        stages: what methods want of the whole model, before the blocks, in order.
        setting: where it works and on how much.
        beyond: what compressed-tensors cannot carry, so that the artifact is in the format of
            lowbit; None if it carries it all.
        tensor_parallel: devices among which a server will divide every linear.
    """

    recipe: Recipe
    outline: Outline
    stages: tuple[Stage, ...]
    setting: Setting
    beyond: str | None
    tensor_parallel: int = 1

    @classmethod
    def of(
        cls,
        outline: Outline,
        recipe: Recipe,
        setting: Setting,
        *,
        plain: bool = False,
        tensor_parallel: int = 1,
    ) -> Plan:
        """Resolve a recipe for a model, and refuse what cannot be done.

        Args:
            plain: refuse what plain loaders could not run.

        Raises:
            LowbitError: a group size that does not fit, a size that cannot be rotated, a file that
                is not there, grids or activations that no loader takes or that several processes
                cannot share.
        """
        if tensor_parallel < 1:
            raise LowbitError(
                f"--tensor-parallel is a number of devices, at least 1; got {tensor_parallel}."
            )
        check_divides(outline.shapes, recipe)
        check_cache(recipe, outline)
        found = [entry.before(method, recipe.grid) for _, entry, method in recipe.entries]
        stages = tuple(stage for stage in found if stage is not None)
        outline = replace(outline, kv=recipe.kv is not None)
        for stage in stages:
            outline = stage.planned(outline)
        beyond = beyond_compressed_tensors(recipe, outline)
        check_loadable(recipe, outline, beyond, setting.dtype)
        if plain and beyond:
            raise LowbitError(
                f"compressed-tensors cannot carry {beyond}. Choose another scheme or recipe, or "
                "leave --plain out."
            )
        check_shared(recipe, outline, setting.samples, setting.ranks)
        return cls(recipe, outline, stages, setting, beyond, tensor_parallel)

    def model(self, source: ModelStream, rows: Tensor, **context: Any) -> Model:
        """The model that the stages begin with.

        Args:
            source: its checkpoint. rows: (n, length) int64, the calibration rows of all ranks.
            context: other fields of `Model`: seed, storage, ranks, announce.
        """
        recipe = self.recipe
        return Model(
            source, recipe.grid_of, recipe.methods, rows, recipe.activations, recipe.kv, **context
        )

    # --- sizes ------------------------------------------------------------------------------------

    @cached_property
    def grids(self) -> dict[str, AnyGrid]:
        """Full linear name -> grid."""
        return {n: self.recipe.grid_of(n) for n in self.outline.shapes}

    @cached_property
    def quantized(self) -> int:
        """Parameters inside quantized linears."""
        return sum(a * b for a, b in self.outline.shapes.values())

    @property
    def parameters(self) -> int:
        """Of the model, tied heads once."""
        o = self.outline
        return self.quantized + o.rest + o.outside + o.around

    @property
    def original(self) -> int:
        """Bytes of the 16-bit checkpoint."""
        return 2 * self.parameters

    @cached_property
    def packed(self) -> int:
        """Bytes of the quantized linears."""
        total, more = 0, 0.0
        for name, (rows, width) in self.outline.shapes.items():
            grid = self.grids[name]
            total += tensor_bytes(grid, rows, width, _SCALE_BYTES)
            for _, entry, method in self.recipe.entries:
                more += entry.extra_bytes(method, grid, rows, width)
        return total + round(more)

    @property
    def artifact(self) -> int:
        """Bytes of the packed artifact."""
        o = self.outline
        return self.packed + 2 * (o.rest + o.stored_outside + o.around)

    @property
    def scratch(self) -> int:
        """Bytes on disk beside the artifact while it is polished, at most: for each process, of
        every 16-bit scale or level its variable and Adam's moments, twice, and the variable at its
        best, twice.
        """
        if not any(entry.role == "polish" for _, entry, _ in self.recipe.entries):
            return 0
        shapes = self.outline.shapes
        codes = sum(self.grids[n].bits * a * b for n, (a, b) in shapes.items()) // 8
        return self.setting.ranks * (self.packed - codes) // 2 * 4 * (2 * 3 + 2)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears, scales and zero points included."""
        return 8 * self.packed / self.quantized

    @property
    def model_bits_per_weight(self) -> float:
        """Of everything."""
        return 8 * self.artifact / self.parameters

    # --- what it takes ----------------------------------------------------------------------------

    @cached_property
    def shapes_of(self) -> tuple[Shapes, ...]:
        """What the cost of methods depends on, for each kind of block."""
        o, s = self.outline, self.setting
        config = o.config
        sizes = s.dtype.itemsize, s.computes.itemsize
        rows = Rows(s.samples + HELD_OUT, s.length, *sizes, s.ranks, s.here)
        found = []
        for kind in o.kinds:
            layer = Layer(
                kind.linears,
                kind.rest,
                o.stored_outside,
                config.hidden_size,
                config.vocab_size,
                o.frame.streams,
                kind.shares(config),
            )
            sites, inner = list(kind.graph.readings), kind.graph.inner
            grid = self.recipe.grid
            levels = kind.graph.levels
            found.append(
                Shapes(layer, grid, sites, inner, rows, HELD_OUT, s.device, s.computes, levels)
            )
        return tuple(found)

    @property
    def shapes(self) -> Shapes:
        """The same for the largest kind of block."""
        return max(self.shapes_of, key=lambda s: s.layer.weights + s.layer.rest)

    @cached_property
    def memory(self) -> Needs:
        """What one process holds while it runs: the most that any kind of block takes."""
        process = PROCESS if self.setting.device.type == "cpu" else 0
        here = self.setting.here
        found = most([needs(self.recipe, shapes, process, here) for shapes in self.shapes_of])
        return replace(found, beside=self._beside)

    @property
    def _beside(self) -> int:
        """Bytes that lie beside one process's streams at most."""
        rows = self.shapes.rows
        row = held_at_most(self.outline.items, self.outline.blocks, rows.length, rows.stored)
        return rows.mine(rows.count) * row

    @property
    def check_memory(self) -> int:
        """Of the closing check, in a process of its own: the whole model decoded, in float32, and
        while it is loaded a quarter of it again.
        """
        return PROCESS + 5 * self.parameters

    @property
    def check_memory_by_block(self) -> int:
        """Of the same where it has one block at a time: what lies outside, and the largest block as
        it is stored, decoded, and in float32.
        """
        o = self.outline
        block = max(s.layer.weights + s.layer.rest for s in self.shapes_of)
        # In 16 bits as it is read, too: all of a block, and of what lies outside some.
        return PROCESS + 5 * (o.outside + o.tied_head * o.rotated + o.around) + 7 * block

    @cached_property
    def work(self) -> dict[str, Work]:
        """What one process does, by what is done."""
        return run_work(self.recipe, self.shapes_of, self.outline.of_layers)

    def seconds(self, speed: Speed) -> float:
        """Counted work at the measured speed of a device, see `lowbit.plan.speed`."""
        return sum(seconds(work, speed) for work in self.work.values())

    # --- who loads it -----------------------------------------------------------------------------

    @cached_property
    def runtimes(self) -> tuple[Verdict, ...]:
        """What each runtime says to the result, in the order of `lowbit.plan.targets.TARGETS`."""
        o = self.outline
        return verdicts(
            Planned(
                self.recipe,
                o.shapes,
                o.described,
                o.config,
                self.beyond,
                o.biased,
                self.tensor_parallel,
                frozenset(o.online),
            )
        )

    def verdict(self, target: str) -> Verdict:
        """What a runtime says, by its name in `lowbit.plan.targets.TARGETS`."""
        return next(v for v in self.runtimes if v.runtime.lower() == target)

    def as_dict(self, speed: Speed | None = None) -> dict[str, Any]:
        """Plain data, for JSON."""
        m = self.memory
        return {
            "model_type": self.outline.config.model_type,
            "blocks": self.outline.blocks,
            "parameters": self.parameters,
            "quantized": self.quantized,
            "around": self.outline.around,
            "original": self.original,
            "artifact": self.artifact,
            "scratch": self.scratch,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "memory": {k: v for k, v in asdict(m).items() if k != "lighter"},
            "check_memory": self.check_memory,
            "check_memory_by_block": self.check_memory_by_block,
            "seconds": None if speed is None else self.seconds(speed),
            "work": {part: asdict(work) for part, work in self.work.items()},
            "runtimes": [asdict(v) for v in self.runtimes],
            "remarks": list(self.outline.remarks),
            "block_memory": m.block,
            "outer_memory": m.outer,
            "activations": m.streams,
            "peak_memory": m.peak,
        }


def plan_for(
    source: ModelStream,
    recipe: Recipe,
    samples: int,
    length: int,
    *,
    ranks: int = 1,
    here: int = 1,
    plain: bool = False,
) -> Plan:
    """The plan of a run on a model that is open.

    Args:
        samples, length, ranks, here: as in `Setting`. plain: as in `Plan.of`.
    """
    setting = Setting(samples, length, source.device, source.dtype, source.compute, ranks, here)
    return Plan.of(Outline.of(source.whole_config), recipe, setting, plain=plain)


def make_plan(
    config: Any,
    recipe: Recipe,
    samples: int = 128,
    length: int = 2048,
    *,
    tensor_parallel: int = 1,
    device: torch.device | None = None,
    dtype: str = "auto",
    ranks: int = 1,
    plain: bool = False,
) -> Plan:
    """The plan of a run on this machine, from a transformers config alone.

    Args:
        tensor_parallel: devices among which a server will divide every linear. device: which
            computes, by default a CPU. dtype: of forward passes, see
            `lowbit.arithmetic.compute_dtype`. ranks: processes that share the run; memory is of
            each.
        plain: as in `Plan.of`.

    Raises:
        LowbitError: as `Plan.of`, or an unsupported family.
    """
    outline, where = Outline.of(config), device or torch.device("cpu")
    context = getattr(outline.config, "max_position_embeddings", None) or length
    compute = compute_dtype(dtype, where, outline.dtype, int(outline.config.hidden_size))
    setting = Setting(samples, min(length, context), where, outline.dtype, compute, ranks, ranks)
    return Plan.of(outline, recipe, setting, plain=plain, tensor_parallel=tensor_parallel)


def calibration_of(
    given: Calibration,
    config: Any,
    source: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    bos: str | None = None,
) -> Calibration:
    """A recipe's calibration with what was asked for on top, rows no longer than the model's
    context.

    Raises:
        LowbitError: longer rows than that were asked for.
    """
    text = text_config(config, config.model_type)
    context = getattr(text, "max_position_embeddings", None) or given.length
    if length is not None and length > context:
        raise LowbitError(f"--length {length} is beyond the model's context of {context} tokens.")
    return Calibration(
        given.source if source is None else source,
        given.samples if samples is None else samples,
        min(given.length, context) if length is None else length,
        given.bos if bos is None else bos,
    )
