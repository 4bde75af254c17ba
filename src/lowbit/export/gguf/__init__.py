"""GGUF, a complete file for llama.cpp: the same codes in its block types, its names, its metadata
and the tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifact.disk import disk
from ...artifact.files import PROOF, read_shard, save_shard
from ...artifact.hashing import Hashing
from ...artifact.output import Output
from ...artifact.proof import Verification, compare_logits
from ...errors import LowbitError
from ...formats import gguf
from ...formats.ggml import BLOCKS, BlockType
from ...grid import Affine, KQuant
from ...model.checkpoint import Stored
from ...model.config import config_at
from ...model.wrapper import text_config
from ...names import model_name
from ...verbatim import encodable
from ..ahead import ahead
from ..place import Place, place
from ..source import Linear, Source
from . import tokens
from .model import Architecture, Spot, joined
from .rounded import Inside, RoundedModel
from .types import FLOATS, REST, Held, chosen, decoded, held, rounded
from .written import Written

TYPES = tuple(b.name.lower() for b in BLOCKS.values() if b.name.lower() not in FLOATS)


def export(
    source: Source,
    output: Output,
    python: str,
    asked: str | None = None,
    embeddings: str | None = None,
) -> Verification:
    """Write the file, with its report and proof, into a folder.

    Args:
        asked: a block type of `TYPES` for all weights; None chooses by each one's grid.
        embeddings: a type of `REST` for embeddings and head; None keeps their numbers.

    Raises:
        LowbitError: the artifact, its tokenizer or its family holds something that GGUF or
            llama.cpp cannot say. VerificationError: a check failed.
    """
    if asked is not None and asked.lower() not in TYPES:
        raise LowbitError(
            f"no block type '{asked}': choose one of {', '.join(TYPES)}, or leave it out."
        )
    if embeddings is not None and embeddings.lower() not in REST:
        raise LowbitError(f"--embeddings takes {', '.join(REST)}; got '{embeddings}'.")
    source.only_weights(gguf.NAME)
    return _Export(source, asked, embeddings).write(output, python)


def remarks(report: dict[str, Any]) -> list[str]:
    """What a person should know of an export besides its proof, from its report."""
    said = report["gguf"]
    types = ", ".join(f"{n} linears in {t}" for t, n in said["types"].items())
    outer = ", ".join(f"{n} in {e['type']}" for n, e in said["outer"].items())
    extra = max(e["extra_error"] for e in report["linears"] if "skipped" not in e)
    lines = [f"{said['file']}: {types}; {outer}"]
    if extra or said["moved"] is not None:
        moved = ""
        if said["moved"] is not None:
            by = f"{said['moved']:.1e} of their spread"
            moved = f", which moves the logits by {by} (proof made anew)"
        lines.append(
            f"scales and offsets rounded as the type holds them: at most {extra:.1e} of scale^2 / "
            f"12 in a linear{moved}"
        )
    return [*lines, *said["remarks"]]


class _Export:
    """One export: everything that can be refused is, before anything is written."""

    def __init__(self, source: Source, asked: str | None, embeddings: str | None) -> None:
        self.source = source
        self.whole = whole = config_at(source.folder / "config.json")
        self.config = text_config(whole, source.report["model"])
        self.architecture = Architecture.of(self.config)
        self.kinds = {
            n: chosen(source.grids[n], columns, asked, n)
            for n, (_, columns) in source.shapes.items()
        }
        self.asked = None if embeddings is None else embeddings.lower()
        self.words = tokens.read(source.folder, self.config.vocab_size)
        self.remarks = [*self.architecture.remarks, *self.words.remarks]
        sizes: Counter[str] = Counter()
        for name, (rows, columns) in source.shapes.items():
            sizes[self.kinds[name].name] += rows * columns
        self.most = BLOCKS[sizes.most_common(1)[0][0]]
        self.name = (
            encodable(model_name(source.report) or Path(source.report["model"]).resolve().name)
            or "model"
        )
        self.file = f"{self.name}-{self.most.name}.gguf"
        self.others = {n: t for n, t in source.others().items() if n not in source.copied}
        if source.copied:
            self.remarks.append(
                f"{len(source.copied)} tensors that the model's class does not know are left out, "
                "for GGUF has no names for them"
            )
        if self.config is not whole:
            self.remarks.append(
                f"the file has the text model of '{whole.model_type}' alone, which neither sees "
                "nor hears"
            )
        self.known: dict[str, dict[str, Any]] = {}
        self.outer: dict[str, dict[str, Any]] = {}

    def _rest_of(self, full: str, kept: Stored) -> BlockType:
        """The type of a tensor that is not quantized: vectors and routers as llama.cpp wants them,
        other matrices as they are stored or as asked for.
        """
        wanted = len(kept.shape) == 1 or self.architecture.spot(full).is_router
        return BLOCKS["F32" if wanted else (self.asked or kept.kind).upper()]

    def _entries(self) -> list[gguf.Entry]:
        parts: list[tuple[Spot, tuple[int, ...], BlockType]] = [
            (self.architecture.spot(f"{n}.weight"), shape, self.kinds[n])
            for n, shape in self.source.shapes.items()
        ]
        for full, kept in self.others.items():
            kind = self._rest_of(full, kept)
            if kept.shape[-1] % kind.size:
                raise LowbitError(
                    f"'{full}' has rows of {kept.shape[-1]} numbers, which blocks of {kind.name} "
                    "do not divide: choose another type for --embeddings."
                )
            parts.append((self.architecture.spot(full), kept.shape, kind))
        found = joined(parts)
        if self.architecture.factors is not None:
            found.append(
                gguf.Entry("rope_freqs.weight", (len(self.architecture.factors),), BLOCKS["F32"])
            )
        return sorted(found, key=_place_in_file)

    def _metadata(self) -> dict[str, Any]:
        return {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            "general.name": self.name,
            "general.file_type": self.most.file_type,
            "general.quantization_version": 2,
            "lowbit.version": self.source.report["lowbit"],
            "lowbit.exported_from": self.source.report["hash"],
            **self.architecture.metadata,
            **self.words.metadata,
        }

    def write(self, output: Output, python: str) -> Verification:
        entries = self._entries()
        refitted = any(
            "_K" in k.name and isinstance(self.source.grids[n], Affine)
            for n, k in self.kinds.items()
        )
        inexact = refitted or any(
            t.kind.lower() != (self.asked or t.kind.lower())
            for full, t in self.others.items()
            if len(t.shape) > 1 and not self.architecture.spot(full).is_router
        )
        ids = read_shard(self.source.folder / PROOF)["ids"]
        anew, moved = inexact or ids.shape[1] > self.architecture.context, None
        with place(self.source, output, carry=False) as made:
            with (
                disk(path := made.partial / self.file),
                gguf.Writer(path, self._metadata(), entries) as file,
            ):
                written = Written(file, made.hashing)
                for full, kept in ahead(self._tensors(made.hashing)):
                    written.add(self.architecture.spot(full), kept.rows)
                if self.architecture.factors is not None:
                    written.add(
                        Spot("rope_freqs.weight"), self.architecture.factors.view(torch.uint8)
                    )
                if anew:
                    moved = self._prove(made, RoundedModel(self.source, self._views(file)))
            made.add_gguf(self.file, written.record([e.name for e in entries]))
            made.leave_out(self.source.copied, "GGUF has no name for it")
            made.report["gguf"] = {
                "file": self.file,
                "types": dict(Counter(k.name for k in self.kinds.values())),
                "outer": self.outer,
                "remarks": self.remarks,
                "moved": moved,
            }
            made.write((PROOF.parent / "tokens.json").as_posix(), self.words.samples)
            inside = self.source.config if self.config is self.whole else self.config.to_dict()
            plain = {k: v for k, v in inside.items() if k != "quantization_config"}
            made.write((PROOF.parent / "config.json").as_posix(), plain)
            return made.close(gguf.NAME, self.known, python)

    def _views(self, file: gguf.Writer) -> dict[str, Inside]:
        """Parameters by their names in the artifact, as they are read back from the file."""

        def inside(full: str, shape: tuple[int, ...], kind: BlockType) -> Inside:
            spot, columns = self.architecture.spot(full), shape[-1]

            def read() -> Tensor:
                rows = file.back(spot.tensor, spot.part).view(-1, kind.row_bytes(columns))
                return self.architecture.given(full, decoded(rows, kind).view(shape))

            return Inside(shape, read)

        linears = {
            f"{n}.weight": inside(f"{n}.weight", shape, self.kinds[n])
            for n, shape in self.source.shapes.items()
        }
        others = {n: inside(n, t.shape, self._rest_of(n, t)) for n, t in self.others.items()}
        return {**linears, **others}

    def _tensors(self, hashing: Hashing) -> Iterator[tuple[str, Held]]:
        """(full parameter name, what the file will hold of it), one shard of the source in memory
        at a time.
        """
        for _, linears, others in self.source.shards(hashing):
            for name, linear in linears.items():
                full, kind = f"{name}.weight", self.kinds[name]
                rows, columns = self.source.shapes[name]
                kept = _held(linear, kind, self.architecture.rows(full, rows))
                size = kept.rows.numel()
                self.known[name] = {
                    "tensor": self.architecture.spot(full).tensor,
                    "type": kind.name,
                    "bytes": size,
                    "bits_per_weight": 8 * size / (rows * columns),
                    "extra_error": kept.extra,
                }
                yield full, kept
            for full, value in others.items():
                if full not in self.others:
                    continue
                if value.dim() == 1:
                    vector = self.architecture.stored(full, value).contiguous()
                    yield full, Held(vector.view(torch.uint8), 0.0)
                    continue
                kind, kept = rounded(
                    value, self._rest_of(full, self.others[full]).name.lower(), full
                )
                self.outer[full] = {
                    "type": kind.name,
                    "bytes": kept.rows.numel(),
                    "relative_error": kept.extra,
                }
                yield full, kept

    def _prove(self, made: Place, model: RoundedModel) -> float:
        """Proof logits of what the file holds in place of the tuned model's; how far they are from
        those, relative to their spread.
        """
        proof, context = read_shard(self.source.folder / PROOF), self.architecture.context
        last = proof["logits"].shape[1]
        logits = model.logits(proof["ids"], last)
        moved = compare_logits(proof["logits"], logits)[0]
        ids = proof["ids"][:, :context].contiguous()
        if ids.shape[1] < proof["ids"].shape[1]:
            logits = model.logits(ids, last)
        save_shard(made.partial / PROOF, {"ids": ids, "logits": logits.contiguous()})
        return moved


def _place_in_file(entry: gguf.Entry) -> tuple[int, int, str]:
    """Embedding, blocks by number, then the rest, as llama.cpp's own converter has it."""
    if entry.name.startswith("blk."):
        return 1, int(entry.name.split(".")[1]), entry.name
    return (0 if entry.name == "token_embd.weight" else 2), 0, entry.name


def _held(linear: Linear, kind: BlockType, order: Tensor | None) -> Held:
    """A linear in a block type, its rows in another order."""
    if isinstance(linear.grid, KQuant):
        rows = linear.blocks()
        return Held(rows if order is None else rows[order], 0.0)
    q = linear.packed()
    return held(q if order is None else q.ordered(order), kind, linear.name)
