"""quantize(): a model, a recipe and some text in; a proven artifact out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ..arithmetic import compute_dtype
from ..artifact.files import REPORT
from ..artifact.output import Output, claimed
from ..artifact.proof import Verification, read_report
from ..errors import DiskFull, Interrupted, LowbitError
from ..grid import AnyGrid
from ..grid.names import Scheme
from ..machine import device_of_rank, give_back_memory, pick_device
from ..model.calibration import Rows, draw_rows
from ..model.carried import source_files
from ..model.microbatches import ran_out
from ..model.model import SEEDS, Model, Stage
from ..model.ranks import ALONE, Ranks
from ..model.storage import Storage
from ..model.stream import ModelStream
from ..model.tokenizer import load_tokenizer
from ..plan import HELD_OUT, calibration_of, plan_for
from ..plan.memory import Offload
from ..recipe import Recipe
from ..stages import Blocks, Entered
from .asked import Asked, Options, Result
from .closing import close, proof_ids, quality, verified
from .events import OnBlock, OnStep, Working
from .identity import Original, fingerprint, sources
from .polishing import check_rows, polishing
from .record import source_of
from .report import Facts, format_of
from .shards import Outside, Shards
from .workplace import RESUMES, Workplace


def quantize(
    model: str | Path,
    scheme: str | Scheme | AnyGrid | None = None,
    recipe: str | Recipe = "tesseraq",
    *,
    out: str | Path,
    calib: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    bos: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    settings: Sequence[str] = (),
    plain: bool = False,
    bits: str | None = None,
    offload: str = "auto",
    offload_dir: str | Path | None = None,
    progress: OnBlock | None = None,
    watch: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Quantize a model and write a verified artifact; continue an unfinished run of the same
    command.

    Args:
        model: local folder or hub id.
        scheme: such as "W2A16g64" or "W4A8KV4"; None takes the recipe's own.
        recipe: a name, a .toml file or a Recipe.
        out: the artifact's directory, one that does not exist or is empty. OUT.partial while it is
            being made, OUT/.partial if OUT exists.
        calib: calibration text, see `lowbit.model.text.documents`. samples, length: rows and tokens
            a row. bos: what rows begin with, see `lowbit.model.bos.begun`. None takes the recipe's,
            which is stdlib, 128, 2048 (or the model's context if that is shorter) and "auto" if it
            does not say.
        dtype: of forward passes: auto, float32, bfloat16 or float16, see
            `lowbit.arithmetic.compute_dtype`.
        settings: "method.option=value" changes to the recipe.
        bits: of single linears, see `lowbit.recipe.widths.with_bits`.
        plain: refuse what plain loaders could not run instead of writing it in the library's own
            format.
        offload: where the activation streams live, see `lowbit.plan.memory.Offload`; changes no
            byte of the artifact.
        offload_dir: folder for them on disk, by default that of the unfinished artifact.
        progress: told after each block. watch: told of each step within a block.
        ranks: the processes that share the run, from `lowbit.run.launch.joined`; all call this
            alike, the first one writes, and all get its result. The folder of ``out`` must be one
            that all of them see.

    Raises:
        LowbitError: bad input, named; or a block or the activations do not fit this machine; or
            another process works in ``out``.
        VerificationError: the artifact is not what was tuned; it stays in OUT.partial.
        Interrupted: a KeyboardInterrupt that says what is kept.
    """
    place = claimed(Path(out), "quantize", finished=True, resumes=RESUMES, writes=ranks.first)
    with place as output:
        text = None if calib is None else str(calib)
        given = samples, length, seed, device, tuple(settings), plain, bos, dtype, bits
        asked = Asked(str(model), scheme, recipe, text, *given)
        options = Options(offload, offload_dir, progress, watch, ranks)
        return Run(asked, options, output).result()


class Begun(Protocol):
    """Finished shards that a run begins with."""

    def check(self, original: Original, rows: Rows, format_: str) -> None:
        """Raise LowbitError if they are not this run's."""

    def give(self, place: Workplace) -> None:
        """Put them into the directory of a run."""


class Run:
    """One run: planned, then executed. ``output`` is claimed."""

    def __init__(
        self, asked: Asked, options: Options, output: Output, begun: Begun | None = None
    ) -> None:
        self.started, self.begun = time.time(), begun
        if not 0 <= asked.seed < SEEDS:
            raise LowbitError(f"seed {asked.seed}: give a whole number from 0 to {SEEDS - 1}.")
        self.asked, self.options, self.output, self.ranks = asked, options, output, options.ranks
        recipe, ranks = asked.resolved(), options.ranks
        device = pick_device(asked.device)
        if ranks.size > 1:
            device = device_of_rank(asked.device, ranks.local)
        stream = ModelStream(asked.model, device)
        hidden = int(stream.config.hidden_size)
        self.stream = stream.computing(compute_dtype(asked.dtype, device, stream.dtype, hidden))
        calibration = calibration_of(
            recipe.calibration,
            self.stream.config,
            asked.calib,
            asked.samples,
            asked.length,
            asked.bos,
        )
        recipe = replace(recipe, calibration=calibration)
        self.plan = plan_for(
            self.stream,
            recipe,
            calibration.samples,
            calibration.length,
            ranks=ranks.size,
            here=ranks.here,
            plain=asked.plain,
        )
        if output.lock is None and ranks.first:
            _check_finished(output, recipe, asked.seed)
        self.offload = self._placed()
        self.rows = self._drawn()

    def _placed(self) -> Offload:
        """Where the activations go; nowhere if there is nothing left to do but to verify.

        Raises:
            LowbitError: a block or the activations do not fit, or the folder for them will be the
                artifact's.
        """
        output, given = self.output, self.options.offload_dir
        folder = output.partial if given is None else Path(given)
        if given is not None and folder.resolve().is_relative_to(output.folder.resolve()):
            raise LowbitError(
                f"--offload-dir '{given}' lies in the artifact's own folder '{output.given}', "
                "which is made last. Name one outside of it."
            )
        if (output.folder / REPORT).is_file():
            return Offload(self.options.offload, "host", 0)
        needs, device = self.plan.memory, self.plan.setting.device
        needs.check(device)
        return needs.placed(self.options.offload, device, folder)

    def _drawn(self) -> Rows:
        """The calibration rows.

        Raises:
            LowbitError: there are too few, or the tokenizer is another model's.
        """
        tokenizer = load_tokenizer(self.stream.checkpoint)
        calibration = self.plan.recipe.calibration
        further = sum(e.further(m, calibration.length) for _, e, m in self.plan.recipe.entries)
        rows = draw_rows(calibration, tokenizer, self.asked.seed, HELD_OUT, further)
        check_rows(self.plan.recipe, rows)
        top = int(max(rows.calibration.max(), rows.held_out.max() if len(rows.held_out) else 0))
        size = self.stream.config.vocab_size
        if top >= size:
            raise LowbitError(
                f"the tokenizer gave id {top}, the model's vocabulary ends at {size - 1}: they do "
                "not belong together."
            )
        return rows

    def result(self) -> Result:
        """Everything from the first tensor to the verified directory; if that exists already, it is
        only verified again.
        """
        files = source_files(self.stream.checkpoint)
        original = Original.of(self.stream.checkpoint, files).hashed(self.ranks)
        if self.begun is not None:
            self.begun.check(original, self.rows, format_of(self.plan))
        place = self._entered(original)
        try:
            if self.begun is not None and not place.done:
                self.begun.give(place)
            if place.done:
                return self._told(repeated=True)
            shards = Shards(place, original, [], self.stream.stored_name, self.options.progress)
            model = self._executed(shards)
            found, polish = quality(model, self.rows), place.polished()
            if not self.ranks.first:
                return self._told()
            recipe = replace(self.plan.recipe, methods=model.methods)
            facts = Facts(
                command=self.asked.command,
                source=source_of(self.stream.checkpoint),
                original=original,
                files=files,
                rows=self.rows,
                seed=self.asked.seed,
                ranks=self.ranks.size,
                offload=self.offload,
                quality=found,
                polish=polish,
                started=self.started,
            )
            plan = replace(self.plan, recipe=recipe)
            return self._told(close(place, model, plan, facts, shards.records))
        except KeyboardInterrupt as e:
            raise Interrupted(place.kept()) from e
        except DiskFull as e:
            raise DiskFull(f"{e} {place.kept()}") from e
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e) or self.ranks.size > 1:  # of several, `lowbit.run.launch` says which
                raise
            raise LowbitError(self._out_of_memory(e)) from e

    def _entered(self, original: Original) -> Workplace:
        """The directory of the run, as an earlier one left it."""
        recipe, seed = self.plan.recipe, self.asked.seed
        identity = fingerprint(self.stream, original, recipe, self.rows, seed)
        if self.ranks.size > 1:
            told = {
                **identity,
                "files of the model": original.sizes,
                "sources": sources(),
                "output": str(self.output.given.absolute()),
            }
            remedy = "Start all of them with the same command, files and versions."
            self.ranks.agree("the run", told, remedy)
        return Workplace(self.output, identity, len(self.stream) + 1, self.ranks)

    def _executed(self, shards: Shards) -> Model:
        """The plan's stages, one after the other."""
        ranks, held_out = self.ranks, self.rows.held_out
        folder = Path(self.options.offload_dir or shards.place.partial)
        blocks = len(self.stream)

        def announce(what: str) -> None:
            give_back_memory()
            if self.options.watch:
                self.options.watch(Working(max(0, len(shards.records) - 1), blocks, what))

        model = self.plan.model(
            self.stream,
            self.rows.calibration,
            seed=self.asked.seed,
            storage=Storage(self.offload.used, self.stream.device, folder),
            ranks=ranks,
            announce=announce,
        )
        mine = slice(ranks.rank, None, ranks.size)
        rows = torch.cat([self.rows.calibration[mine], held_out[mine]])
        entered = Entered(rows, proof_ids(self.rows) if ranks.first else None)
        idle = self._idle()
        pipeline: tuple[Stage, ...] = (
            *self.plan.stages,
            Outside(shards),
            Blocks(entered, shards, idle),
            *polishing(self.plan.recipe, self.rows, replace(entered, rows=held_out[mine]), shards),
        )
        for stage in pipeline:
            model = stage(model)
        return model

    def _idle(self) -> tuple[str, ...]:
        """Remarks on methods whose steps look at fewer rows than there are ranks."""
        found, size = [], self.ranks.size
        for name, entry, method in self.plan.recipe.entries:
            batch = entry.cost(method, self.plan.shapes).batch
            if 0 < batch < size:
                waiting = f"{size - batch} of {size} ranks wait in it"
                found.append(f"{name} has {batch} rows a step: {waiting}")
        return tuple(found)

    def _told(self, verification: Verification | None = None, *, repeated: bool = False) -> Result:
        """What rank 0 has found of the finished directory, told to all."""
        out = self.output.given
        found = (read_report(out), verification or verified(out)) if self.ranks.first else None
        report, verification = self.ranks.broadcast(found)
        return Result(out, report, verification, repeated)

    def _out_of_memory(self, error: BaseException) -> str:
        again = "run the same command"
        helps = f"free the device, and {again}"
        if self.offload.used == "device":
            helps = f"{again} with --offload host, or free the device"
        said = (str(error) or type(error).__name__).splitlines()[0]  # Python's own says nothing
        return (
            f"'{self.plan.setting.device}' is out of memory ({said}). The "
            f"finished blocks are kept: {helps}. If that is not enough, shorter rows (--length) or "
            "another recipe take less, as a run of their own."
        )


def _check_finished(output: Output, recipe: Recipe, seed: int) -> None:
    """Refuse a folder with a finished artifact that this command cannot have made; whether it has
    is found out later, from every byte.

    Raises:
        LowbitError: it was made by other methods, on another scheme, or from another seed.
    """
    report, wanted = read_report(output.folder), recipe.as_dict()
    made = report.get("recipe", {})
    if (
        "run" not in report
        or report.get("seed") != seed
        or any(made.get(k) != wanted[k] for k in ("scheme", "methods"))
    ):
        raise LowbitError(
            f"'{output.given}' exists and is not empty. Choose another -o, or remove it first."
        )
