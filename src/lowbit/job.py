"""quantize(): a model, a recipe and some text in; a proven artifact out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import artifact
from .card import model_card
from .disk import write_atomic
from .errors import DiskFull, Interrupted, LowbitError
from .evaluate import Tally
from .events import BlockDone, Progress, Watch, Working
from .formats import compressed_tensors as ct
from .formats import native
from .grid import Affine, Grid, QTensor
from .identity import Original, fingerprint, own_version, sources, versions
from .loop import (
    SEEDS,
    Streams,
    advance,
    as_read,
    begin,
    check_shared,
    idle_ranks,
    ordered,
    prepared,
    readings_of,
    run,
    surveyed,
)
from .machine import device_of_rank, give_back_memory, pick_device
from .memory import Offload
from .model.block import Block
from .model.calibration import Calibration, Rows, draw_rows
from .model.carried import SourceFiles, source_files
from .model.context import TOKENS_PER_PASS
from .model.parts import ran_out
from .model.ranks import ALONE, Ranks
from .model.storage import Storage
from .model.stream import ModelStream, load_tokenizer
from .output import Output, claimed
from .plan import HELD_OUT, beyond_compressed_tensors, check_divides, check_loadable, needs_of
from .presets import load_recipe
from .proof import Verification, read_report, verify
from .recipe import Recipe
from .record import block_record, command_of, sizes, source_of
from .scheme import Scheme, parse_scheme
from .workplace import RESUMES, Workplace

_PROOF_ROWS, _PROOF_POSITIONS = 2, 8


@dataclass(frozen=True)
class Result:
    """A finished artifact.

    Attributes:
        folder: where it lies.
        report: the contents of its report.json.
        verification: what was checked after writing.
        repeated: an earlier run of the same command had made it; it was only verified again.
    """

    folder: Path
    report: Mapping[str, Any]
    verification: Verification
    repeated: bool = False


def quantize(
    model: str,
    scheme: str | Scheme | Affine | None = None,
    recipe: str | Recipe = "tesseraq",
    *,
    out: str | Path,
    calib: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Sequence[str] = (),
    plain: bool = False,
    offload: str = "auto",
    offload_dir: str | Path | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
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
            a row. None takes the recipe's, which is stdlib, 128 and 2048 (or the model's context if
            that is shorter) if it does not say.
        settings: "method.option=value" changes to the recipe.
        plain: refuse what plain loaders could not run instead of writing it in the library's own
            format.
        offload: where the activation streams live, see `lowbit.memory.Offload`; changes no byte of
            the artifact.
        offload_dir: folder for them on disk, by default that of the unfinished artifact.
        progress: told after each block. watch: told of each step within a block.
        ranks: the processes that share the run, from `lowbit.launch.joined`; all call this alike,
            the first one writes, and all get its result. The folder of ``out`` must be one that all
            of them see.

    Raises:
        LowbitError: bad input, named; or a block or the activations do not fit this machine; or
            another process works in ``out``.
        VerificationError: the artifact is not what was tuned; it stays in OUT.partial.
        Interrupted: a KeyboardInterrupt that says what is kept.
    """
    with claimed(
        Path(out), "quantize", finished=True, resumes=RESUMES, writes=ranks.first
    ) as output:
        return _quantize(
            model,
            scheme,
            recipe,
            output,
            calib,
            samples,
            length,
            seed,
            device,
            settings,
            plain,
            offload,
            offload_dir,
            progress,
            watch,
            ranks,
        )


def _quantize(
    model: str,
    scheme: str | Scheme | Affine | None,
    recipe: str | Recipe,
    output: Output,
    calib: str | None,
    samples: int | None,
    length: int | None,
    seed: int,
    device: str,
    settings: Sequence[str],
    plain: bool,
    offload: str,
    offload_dir: str | Path | None,
    progress: Progress | None,
    watch: Watch | None,
    ranks: Ranks,
) -> Result:
    """See `quantize`; ``output`` is claimed."""
    if not 0 <= seed < SEEDS:
        raise LowbitError(f"seed {seed}: give a whole number from 0 to {SEEDS - 1}.")
    options = {"--scheme": scheme, "--calib": calib, "--samples": samples, "--length": length}
    command = command_of(
        model, recipe, options, settings, seed, "" if device == "auto" else device, plain
    )
    if isinstance(scheme, str):
        scheme = parse_scheme(scheme)
    elif isinstance(scheme, Affine):
        scheme = Scheme(scheme)
    if settings and not isinstance(recipe, str):
        raise LowbitError(
            "settings change a recipe given by name or file; change the Recipe itself instead."
        )
    if isinstance(recipe, str):
        recipe = load_recipe(recipe, scheme=scheme, settings=settings)
    elif scheme is not None:
        recipe = recipe.with_scheme(scheme)
    where = pick_device(device) if ranks.size == 1 else device_of_rank(device, ranks.local)
    stream = ModelStream(model, where)
    check_divides(stream.linear_shapes(), recipe)
    check_loadable(stream.linear_shapes(), recipe, stream.wiring)
    beyond = beyond_compressed_tensors(stream.linear_shapes(), recipe, stream.wiring)
    if plain and beyond:
        raise LowbitError(
            f"compressed-tensors cannot carry {beyond}. Choose another scheme or recipe, or leave "
            "--plain out."
        )
    stream = prepared(stream, recipe, seed)
    recipe = replace(
        recipe, calibration=_calibration(recipe.calibration, stream, calib, samples, length)
    )
    if output.lock is None and ranks.first:
        _check_finished(output, recipe, seed)
    placed = _placed(stream, recipe, where, ranks, output, offload, offload_dir)
    rows = draw_rows(recipe.calibration, load_tokenizer(stream.checkpoint), seed, HELD_OUT)
    top = int(max(rows.calibration.max(), rows.held_out.max() if len(rows.held_out) else 0))
    if top >= stream.config.vocab_size:
        raise LowbitError(
            f"the tokenizer gave id {top}, the model's vocabulary ends at "
            f"{stream.config.vocab_size - 1}: they do not belong together."
        )
    origin = {"source": source_of(stream.checkpoint), "command": command}
    check_shared(ranks, recipe, stream.wiring, len(rows.calibration))
    run = _Run(
        stream, recipe, rows, output, seed, origin, placed, offload_dir, progress, watch, ranks
    )
    try:
        return run.finish()
    except KeyboardInterrupt as e:
        raise Interrupted(run.place.kept()) from e
    except DiskFull as e:
        raise DiskFull(f"{e} {run.place.kept()}") from e
    except (RuntimeError, MemoryError) as e:
        if not ran_out(e) or ranks.size > 1:  # of several, `lowbit.launch` says which
            raise
        again = "run the same command"
        helps = (
            f"{again} with --offload host, or free the device"
            if placed.used == "device"
            else f"free the device, and {again}"
        )
        raise LowbitError(
            f"'{where}' is out of memory ({str(e).splitlines()[0]}). The finished blocks are kept: "
            f"{helps}. If that is not enough, shorter rows "
            "(--length) or another recipe take less, as a run of their own."
        ) from e


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


def _placed(
    stream: ModelStream,
    recipe: Recipe,
    where: torch.device,
    ranks: Ranks,
    output: Output,
    offload: str,
    offload_dir: str | Path | None,
) -> Offload:
    """Where the activations go; nowhere if there is nothing left to do but to verify.

    Raises:
        LowbitError: a block or the activations do not fit, or the folder for them will be the
            artifact's.
    """
    folder = output.partial if offload_dir is None else Path(offload_dir)
    if offload_dir is not None and folder.resolve().is_relative_to(output.folder.resolve()):
        raise LowbitError(
            f"--offload-dir '{offload_dir}' lies in the artifact's own folder '{output.given}', "
            "which is made last. Name one outside of it."
        )
    if (output.folder / artifact.REPORT).is_file():
        return Offload(offload, "host", 0)
    rows, length = recipe.calibration.samples + HELD_OUT, recipe.calibration.length
    needs = needs_of(
        stream.config, recipe, rows, length, where, stream.dtype, ranks.size, ranks.here
    )
    needs.check(where)
    return needs.placed(offload, where, folder)


def _calibration(
    given: Calibration,
    stream: ModelStream,
    source: str | None,
    samples: int | None,
    length: int | None,
) -> Calibration:
    """The recipe's calibration with what was asked for on top, rows no longer than the model's
    context.
    """
    context = getattr(stream.config, "max_position_embeddings", None) or given.length
    if length is not None and length > context:
        raise LowbitError(f"--length {length} is beyond the model's context of {context} tokens.")
    return Calibration(
        source if source is not None else given.source,
        samples if samples is not None else given.samples,
        length if length is not None else min(given.length, context),
    )


class _Run:
    """One run: the state that outlives a block."""

    def __init__(
        self,
        stream: ModelStream,
        recipe: Recipe,
        rows: Rows,
        output: Output,
        seed: int,
        origin: Mapping[str, Any],
        offload: Offload,
        offload_dir: str | Path | None,
        progress: Progress | None,
        watch: Watch | None,
        ranks: Ranks,
    ) -> None:
        self.stream, self.recipe, self.rows, self.seed, self.progress, self.watch = (
            stream,
            recipe,
            rows,
            seed,
            progress,
            watch,
        )
        self.ranks = ranks
        self.origin = dict(origin)  # what report.json says of the model's source and the command
        self.started = time.time()
        self.files = source_files(stream.checkpoint)
        here = Original.of(stream.checkpoint, self.files)
        self.original = here.hashed(ranks)
        identity = fingerprint(stream, self.original, recipe, rows, seed)
        if ranks.size > 1:
            told = {
                **identity,
                "files of the model": here.sizes,
                "sources": sources(),
                "output": str(output.given.absolute()),
            }
            ranks.agree(
                "the run", told, "Start all of them with the same command, files and versions."
            )
        self.place = Workplace(output, identity, len(stream) + 1, ranks)
        self.offload = offload
        self.storage = Storage(offload.used, stream.device, Path(offload_dir or self.place.partial))
        self.records: list[dict[str, Any]] = []

    # --- the blocks -------------------------------------------------------------------------------

    def finish(self) -> Result:
        """Everything from the first tensor to the verified directory; if that exists already, it is
        only verified again.
        """
        if self.place.done:
            return self._result(repeated=True)
        self.stream = ordered(
            self.stream,
            self.recipe,
            self.rows.calibration,
            self.seed,
            self._announce,
            self.storage,
            self.ranks,
        )
        self._outer_shard()
        streams = self._enter()
        for record, after, resumed in self._blocks(streams):
            streams = after
            self._told(record, resumed)
        quality = self._quality(streams)
        return self._result(self._close(streams, quality) if self.ranks.first else None)

    def _result(
        self, verification: Verification | None = None, *, repeated: bool = False
    ) -> Result:
        """What rank 0 has found of the finished directory, told to all."""
        out = self.place.output.given
        found = (read_report(out), verification or verify(out)) if self.ranks.first else None
        report, verification = self.ranks.told(found)
        return Result(out, report, verification, repeated)

    def _outer_shard(self) -> None:
        record = self.place.finished(0)
        if record is None:
            tensors = {**self.stream.outer_tensors(), **self.stream.copied_tensors()}
            self.original.check_unchanged()
            record = self.place.finish(0, tensors, {"name": "outside the blocks"})
        self.records.append(record)

    def _enter(self) -> Streams:
        mine = slice(self.ranks.rank, None, self.ranks.size)
        x = self.stream.embed(
            torch.cat([self.rows.calibration[mine], self.rows.held_out[mine]]), storage=self.storage
        )
        exact = self.stream.in_float32()
        proof = exact.embed(self._proof_ids(), exact.compute) if self.ranks.first else None
        self.stream.release()
        return Streams(x, x, len(self.rows.calibration), proof, self.storage, ranks=self.ranks)

    def _proof_ids(self) -> Tensor:
        source = (
            self.rows.held_out if len(self.rows.held_out) >= _PROOF_ROWS else self.rows.calibration
        )
        return source[:_PROOF_ROWS, : min(256, source.shape[1])]

    def _blocks(self, streams: Streams) -> Iterator[tuple[dict[str, Any], Streams, bool]]:
        kwargs = self.stream.block_kwargs(streams.x.shape[1])
        proof_kwargs = self.stream.in_float32().block_kwargs(
            streams.proof.shape[1] if streams.proof is not None else 2
        )
        self.stream.release()
        self.recipe = surveyed(self.stream, self.recipe, streams, kwargs, self.seed, self._announce)
        start = 0
        while start < len(self.stream):
            record = self.place.finished(start + 1)
            if record is None:
                break
            block = begin(self.stream, start, self.recipe, streams, kwargs[start], self.seed)
            streams = advance(
                self._reloaded(as_read(block, self.recipe)), streams, proof_kwargs[start]
            )
            del block  # else it would be held while the next one is begun
            yield record, streams, True
            start += 1
            give_back_memory()
        clock = time.time()
        blocks = run(
            self.stream,
            self.recipe,
            streams,
            self.seed,
            kwargs,
            proof_kwargs,
            start,
            self._announce,
        )
        first = True
        for (
            block,
            streams,
            # No enumerate: it would hold a block, and what entered it, until the next one ends.
        ) in blocks:
            start += 1
            tensors = artifact.block_tensors(block)
            if first and (idle := idle_ranks(self.recipe, self.ranks)):
                block = block.with_notes(trouble=[*block.notes.get("trouble", ()), *idle])
            first = False
            # before it is noted, or a resume would take a block of another model for this one's
            self.original.check_unchanged()
            record = self.place.finish(
                start,
                tensors,
                block_record(block, tensors, time.time() - clock),
                partial(artifact.compare_block, block),
            )
            clock = time.time()
            yield record, streams, False
            del block, tensors
            give_back_memory()

    def _reloaded(self, block: Block) -> Block:
        """A block of an earlier run, its weights and codes read from its finished shard."""
        held = artifact.read_shard(self.place.shard(int(block.name.rsplit(".", 1)[1]) + 1))
        codes: dict[str, QTensor] = {}
        weights = dict(block.weights)
        for linear in block.wiring.linears:
            full = f"{block.name}.{linear}"
            codes[linear] = artifact.unpack_linear(held, full, block.grids[linear], block.device)
        for name in weights:
            if name.removesuffix(".weight") not in codes:
                weights[name] = held[f"{block.name}.{name}"].to(block.device, weights[name].dtype)
        return replace(block, weights=weights, coded=codes)

    def _announce(self, what: str) -> None:
        give_back_memory()
        if self.watch:
            self.watch(Working(len(self.records) - 1, len(self.stream), what))

    def _told(self, record: dict[str, Any], resumed: bool) -> None:
        self.records.append(record)
        if self.progress:
            self.progress(BlockDone(len(self.records) - 2, len(self.stream), record, resumed))

    # --- the end ----------------------------------------------------------------------------------

    def _close(self, streams: Streams, quality: dict[str, Any] | None) -> Verification:
        place, skipped = self.place, self.stream.skipped_linears()
        grids = {
            e["name"]: self.recipe.grid_of(e["name"])
            for r in self.records[1:]
            for e in r["linears"]
        }
        config = {
            **self.stream.artifact_config(),
            "quantization_config": self._describe(grids, list(skipped)),
        }
        place.write_json("config.json", config)
        files = self.files
        place.carry(self.stream.checkpoint, files.carried)
        weight_map = {t: r["shard"] for r in self.records for t in r["tensors"]}
        total = sum(r["bytes"] for r in self.records)
        place.write_json(
            artifact.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        write_atomic(place.partial / artifact.RECIPE, self.recipe.to_toml().encode())
        self._write_proof(streams)
        report = self._report(own_version(), skipped, quality, files)
        place.write_json(artifact.REPORT, report)
        self.stream.release()
        verification = verify(place.partial)
        report["verification"] = verification.as_dict()
        report["seconds"] = round(time.time() - self.started, 1)
        place.write_json(artifact.REPORT, report)
        place.write_card(model_card(report))
        place.complete()
        return verification

    def _beyond(self) -> str | None:
        return beyond_compressed_tensors(
            self.stream.linear_shapes(), self.recipe, self.stream.wiring
        )

    def _format(self) -> str:
        return native.NAME if self._beyond() else ct.NAME

    def _describe(self, grids: Mapping[str, Grid], skipped: list[str]) -> dict[str, Any]:
        if self._format() == ct.NAME:
            return ct.describe(
                {n: g for n, g in grids.items() if isinstance(g, Affine)},
                skipped,
                self.recipe.activations,
            )
        readings, kv = readings_of(self.stream, self.recipe)
        linears = [e for r in self.records[1:] for e in r["linears"]]
        columns = {e["name"]: e["columns"] for e in linears if "columns" in e}
        outliers = {e["name"]: e["outliers"] for e in linears if "outliers" in e}
        return native.describe(
            grids,
            skipped,
            self.stream.dtype,
            readings,
            kv,
            self.stream.wiring.attention,
            columns,
            outliers,
        )

    @torch.no_grad()
    def _quality(self, streams: Streams) -> dict[str, Any] | None:
        ids = self.rows.held_out
        if not len(ids):
            return None
        floating, tuned = Tally(), Tally()
        for at, i in enumerate(self.ranks.mine(len(ids)), self.ranks.count(streams.tuned_rows)):
            expected = self.stream.head(streams.x[at : at + 1])
            floating.add(expected, ids[i : i + 1])
            tuned.add(self.stream.head(streams.xq[at : at + 1]), ids[i : i + 1], expected)
        floating.merge(self.ranks)
        tuned.merge(self.ranks)
        if not self.ranks.first:
            return None
        # As `Block.run` passes them, held-out rows last.
        together = min(len(streams.xq), max(1, TOKENS_PER_PASS // ids.shape[1]))
        found = {"float": floating.result(together), "quantized": tuned.result(together)}
        return {
            "text": f"{self.rows.source} (held out)",
            **{k: v.as_dict() for k, v in found.items()},
        }

    @torch.no_grad()
    def _write_proof(self, streams: Streams) -> None:
        assert streams.proof is not None
        ids = self._proof_ids()
        logits = self.stream.in_float32().head(streams.proof[:, -_PROOF_POSITIONS:])
        self.place.write_proof({"ids": ids.contiguous(), "logits": logits.cpu()})

    def _report(
        self,
        own_version: str,
        skipped: Mapping[str, str],
        quality: dict[str, Any] | None,
        files: SourceFiles,
    ) -> dict[str, Any]:
        linears = [e for r in self.records[1:] for e in r["linears"]]
        shards = {
            r["shard"]: {"sha256": r["sha256"], "bytes": r["bytes"], "tensors": r["tensors"]}
            for r in self.records
        }
        digest = hashlib.sha256("".join(s["sha256"] for s in shards.values()).encode()).hexdigest()
        blocks = [
            {k: v for k, v in r.items() if k not in ("tensors", "sha256", "bytes", "linears")}
            for r in self.records[1:]
        ]
        return {
            "lowbit": own_version,
            "run": self.place.run,
            "versions": versions(),
            "model": self.stream.checkpoint.name,
            **self.origin,
            "original": self.original.as_dict(),
            "recipe": self.recipe.as_dict(),
            "format": self._format(),
            "beyond_compressed_tensors": self._beyond(),
            "calibration": {
                "source": self.rows.source,
                "samples": len(self.rows.calibration),
                "length": self.rows.calibration.shape[1],
                "sha256": self.rows.sha256,
                **({"conversations": self.rows.conversations} if self.rows.conversations else {}),
            },
            "seed": self.seed,
            "ranks": self.ranks.size,
            "device": str(self.stream.device),
            "compute": str(self.stream.compute),
            "offload": asdict(self.offload),
            "hash": digest,
            "size": sizes(self.stream.stored, self.stream.outer.left_out, self.records),
            "quality": quality,
            "blocks": blocks,
            "copied": self.stream.copied(),
            "carried": list(files.carried),
            "left_out": {**self.stream.outer.left_out, **files.left_out},
            "remarks": list(self.stream.remarks),
            "files": {n: artifact.file_hash(self.place.partial / n) for n in artifact.HASHED},
            "linears": linears + [{"name": n, "skipped": why} for n, why in skipped.items()],
            "shards": shards,
        }
