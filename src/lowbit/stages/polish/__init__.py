"""Polish: the stage after the blocks. Codes stay; what they leave free is trained on the divergence
of the whole model's logits, see `lowbit.methods.polish`.

One block is in memory at a time: its codes come from its shard, its variables and Adam's moments
from a file beside it. An interrupted run goes on from the last look at the rows kept apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import LowbitError
from ...machine import give_back_memory, peak_memory
from ...methods._batches import shared
from ...model.block import Block
from ...model.model import Model, float_blocks
from ...model.outline import Outline
from ..blocks import Blocks, Entered
from .passes import Frame, Passes, Variables, without_rows
from .state import MOMENTS, State

Record = Mapping[str, Any]
_WARM, _BETAS, _EPSILON = 5, (0.9, 0.95), 1e-10


class Knobs(Protocol):
    """What `lowbit.methods.polish.Polish` says; read-only."""

    @property
    def batch(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def norms(self) -> bool: ...

    @property
    def apart(self) -> int: ...

    @property
    def checks(self) -> int: ...

    @property
    def patience(self) -> int: ...

    def steps(self, length: int) -> int:
        """How many are made on rows of so many tokens."""
        ...


class PolishStore(Protocol):
    """Where finished blocks lie, and are put again."""

    @property
    def polished(self) -> Record | None:
        """What an earlier run said of the polish that it finished; None if there is none, or if a
        block is not what it left.
        """
        ...

    def scratch(self, rank: int) -> Path:
        """A folder for a rank while it works; all ranks of the run see it."""
        ...

    def held(self, i: int, block: Block, *, anew: bool) -> Block:
        """A block as it was stored before it was polished.

        Args:
            block: its parameters as the float model has them; of the coded linears they may be
                missing. anew: as it is stored now.
        """
        ...

    def loaded(self, i: int, block: Block) -> Block:
        """As of `lowbit.stages.BlockStore`."""
        ...

    def replace(self, i: int, block: Block, floats: Block) -> None:
        """Store a block in the place of the one that is stored.

        Args:
            floats: the same with the float model's weights.
        """
        ...

    def finish(self, record: Record) -> None:
        """Note that all is done."""
        ...


@dataclass(frozen=True)
class PolishRows:
    """Rows (n, length) int64 of all ranks.

    Attributes:
        train: that steps are made on, in turn. checked: that the state is chosen by.
    """

    train: Tensor
    checked: Tensor

    def check(self, method: Knobs) -> None:
        """Raise LowbitError if there are too few of one kind."""
        if not len(self.checked):
            raise LowbitError(
                "polish chooses by rows that nothing was learned from, and the calibration text "
                "has none left: give more text (--calib), fewer --samples, or leave polish out."
            )
        if len(self.train) < method.batch:
            raise LowbitError(
                f"polish makes steps on {method.batch} rows, and there are {len(self.train)}: use "
                "a smaller polish.batch, more --samples or more text."
            )


@dataclass(frozen=True)
class Polished:
    """The stage.

    Attributes:
        method: its knobs. rows: what it learns from. entered: what passes once more when it is
            done, so that what leaves the last block is the polished model's: no calibration rows.
            store: of blocks.
    """

    method: Knobs
    rows: PolishRows
    entered: Entered
    store: PolishStore

    def planned(self, outline: Outline) -> Outline:
        return outline

    def __call__(self, model: Model) -> Model:
        if self.store.polished is not None:
            return model
        record = _Polishing(self, model).record()
        self.store.finish(record)
        if not record["kept_step"]:  # the blocks are as they were, and so is what left them
            return model
        give_back_memory()
        again = Blocks(self.entered, _Stored(self.store))
        done = again(replace(model, rows=model.rows[:0], streams=None))
        return replace(done, rows=model.rows)


@dataclass(frozen=True)
class _Stored:
    """Blocks that are all finished; a `lowbit.stages.BlockStore`."""

    store: PolishStore

    def finished(self, i: int) -> Record | None:
        return {}

    def keep(self, i: int, block: Block, seconds: float) -> Callable[[], Record]:
        raise AssertionError(f"block {i} is finished")

    def loaded(self, i: int, block: Block) -> Block:
        return self.store.loaded(i, block)


class _Polishing:
    """The work of the stage."""

    def __init__(self, stage: Polished, model: Model) -> None:
        self.stage, self.model, self.method = stage, model, stage.method
        self.ranks, rows = model.ranks, stage.rows
        self.steps = self.method.steps(rows.train.shape[1])
        self.train, self.checked = rows.train, rows.checked
        blocks = len(model.source)
        self.state, self.first = (
            State(stage.store.scratch(rank), blocks) for rank in (self.ranks.rank, 0)
        )

    def record(self) -> Record:
        """Train, keep the best, store it; what the report says."""
        clock = time.time()
        # All ranks have the same state; of an earlier run there may have been more or fewer.
        note = self.ranks.broadcast(self.first.note if self.ranks.first else None)
        if note is None or not self.ranks.first:
            self.state.begin()
        frames, expected = self._prepared(anew=note is None)
        self.model.announce("polish: the beginning")
        passes = Passes(self.model, frames, self._variables)
        if note is None:
            for i, frame in enumerate(frames):
                zeros = frame.free().zeros()
                moments = {f"{k}{n}": t.clone() for n, t in zeros.items() for k in MOMENTS}
                self.state.write(i, {**zeros, **moments})
            start = self._checked(passes, expected)
            note = {"step": 0, "best": 0, "looks": [{"step": 0, "kl": start, "train_kl": None}]}
            self.state.keep(note, best=True)
        else:
            self.state.go_on(self.first)
            self.ranks.broadcast(None)  # before the first one's is written over
        note = self._trained(note, passes, expected)
        if note["best"]:
            for i, frame in enumerate(frames):
                self.model.announce(f"polish: storing block {i + 1} of {len(frames)}")
                variables = self._variables(i, best=True)
                block = frame.free().block_of(variables)
                floats = replace(block, weights=self.model.source.block_weights(i))
                self.stage.store.replace(i, block, floats)
        looks = note["looks"]
        kls = {look["step"]: look["kl"] for look in looks}
        return {
            "tokens": note["step"] * self.method.batch * self.train.shape[1],
            "rows": len(self.train),
            "checked_rows": len(self.checked),
            "kl_before": kls[0],
            "kl": kls[note["best"]],
            "kept_step": note["best"],
            "looks": looks,
            "seconds": round(time.time() - clock, 1),
            "peak_memory": self._peak(),
        }

    def _peak(self) -> int:
        """Bytes, of the rank that needs most; of the whole run so far on a CPU."""
        most = torch.tensor([peak_memory(self.model.source.device)], dtype=torch.int64)
        self.ranks.max_(most)
        return int(most)

    # --- what is there ----------------------------------------------------------------------------

    def _prepared(self, *, anew: bool) -> tuple[list[Frame], Tensor]:
        """The frames of the blocks, and what leaves the float model's last block for this rank's
        rows, of those of training and those it is chosen by.
        """
        model = replace(self.model, rows=torch.cat([self.train, self.checked]))
        frames: list[Frame] = []
        target: Tensor | None = None
        for i, block in enumerate(float_blocks(model, "polish: the float model")):
            target = block.target
            read = self.model.input_quantizers(i)
            plain = replace(without_rows(block), input_quantizers=read, kv=self.model.kv_grid(i))
            held = self.stage.store.held(i, plain, anew=anew)
            # Floats of coded linears are not needed, and others are read again with the codes, but
            # for parts of larger tensors.
            names = {
                n: w
                if held.weights[n] is w and n.removesuffix(".weight") not in held.coded
                else w.new_empty(0)
                for n, w in plain.weights.items()
            }
            bare = replace(plain, weights=names)
            opened = partial(self.stage.store.held, i, bare, anew=False)
            frames.append(Frame(opened, self.method.norms))
        assert target is not None
        return frames, target

    def _variables(self, i: int, *, best: bool = False) -> Variables:
        return self.state.read(i, self.model.source.device, best=best)

    def _checked(self, passes: Passes, expected: Tensor) -> float:
        """The divergence on the rows that the state is chosen by, over all ranks."""
        rows = torch.arange(len(self.train), len(self.train) + len(self.checked))
        ids, wanted = self._of(rows, expected)
        total, tokens = self.ranks.total(passes.divergence(ids, wanted), ids.numel())
        return total / tokens

    def _of(self, rows: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of some rows: ids, and what leaves the float model's last block.

        Args:
            rows: their numbers over all ranks, those it is chosen by after those of training.
        """
        ids = torch.cat([self.train, self.checked])[rows[self.ranks.share(len(rows))]]
        [wanted] = shared(self.ranks, rows, (expected,), self.model.source.device)
        return ids, wanted

    # --- training ---------------------------------------------------------------------------------

    def _trained(self, note: dict[str, Any], passes: Passes, expected: Tensor) -> dict[str, Any]:
        """Steps until there are enough, or too many looks without gain."""
        every = math.ceil(self.steps / self.method.checks)
        losses: list[float] = []
        while note["step"] < self.steps and self._without_gain(note) < self.method.patience:
            step = note["step"]
            latest = note["looks"][-1]["kl"]
            self.model.announce(f"polish: step {step + 1} of {self.steps}, KL {latest:.4g} apart")
            rows = self._rows_of(step)
            tokens = len(rows) * self.train.shape[1]
            ids, wanted = self._of(rows, expected)
            losses.append(passes.descend(ids, wanted, tokens, partial(self._step, step)))
            note = {**note, "step": step + 1}
            if (step + 1) % every == 0 or step + 1 == self.steps:
                kl = self._checked(passes, expected)
                [train] = self.ranks.total(sum(losses) / len(losses))
                losses = []
                best = min(look["kl"] for look in note["looks"])
                look = {"step": step + 1, "kl": kl, "train_kl": train}
                better = kl < best
                note = {**note, "looks": [*note["looks"], look]}
                note["best"] = step + 1 if better else note["best"]
                self.state.keep(note, best=better)
        return note

    @staticmethod
    def _without_gain(note: Mapping[str, Any]) -> int:
        """How many looks were made since the best one."""
        return sum(look["step"] > note["best"] for look in note["looks"])

    def _rows_of(self, step: int) -> Tensor:
        """Numbers of the rows of a step: all in turn, in another order each time."""
        first, count = step * self.method.batch, len(self.train)
        places = torch.arange(first, first + self.method.batch)
        out = []
        for turn in sorted({int(p) // count for p in places}):
            generator = torch.Generator().manual_seed((self.model.seed * 1_000_003 + turn) % 2**63)
            order = torch.randperm(count, generator=generator)
            out.append(order[places[places // count == turn] % count])
        return torch.cat(out)

    @torch.no_grad()
    def _step(self, step: int, i: int, variables: Variables, gradients: Variables) -> None:
        """One step of Adam on the variables of a block."""
        held = self.state.read(i, self.model.source.device, moments=True)
        names = list(variables)
        summed = [gradients[k].float().contiguous() for k in names]
        self.ranks.sum_(*summed)
        rate = self.method.lr * min(1.0, (step + 1) / _WARM)
        rate *= 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        for k, g in zip(names, summed, strict=True):
            first, second = held[f"first.{k}"], held[f"second.{k}"]
            first.lerp_(g, 1 - _BETAS[0])
            second.lerp_(g.square(), 1 - _BETAS[1])
            a, b = (1 - beta ** (step + 1) for beta in _BETAS)
            held[k] -= rate * (first / a) / ((second / b).sqrt() + _EPSILON)
        self.state.write(i, held)
