"""A model as a stream of blocks: a skeleton without data, and tensors read when a block is needed
and dropped after it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowbitError
from .beside import Kept, Keys, at
from .checkpoint import FLOATS, Checkpoint, config_at
from .experts import replace_fused
from .forms import check_forms
from .graph import Described, Frame, Graph
from .intake import (
    check_floats,
    check_source,
    dtype_of_most,
    without_quantization,
)
from .modules import ModuleNames
from .naming import Names
from .order import check_order, order_block, order_outer
from .outer import Outer, outer_of
from .raw import Raw
from .residual import Basis, basis_of, rotate_block, rotate_outer
from .shell import CACHES, Shell
from .skeleton import build_skeleton, fast_attention
from .source import open_source
from .storage import Storage
from .tokenizer import load_tokenizer as load_tokenizer
from .tracing import described
from .wrapper import is_wrapper, text_config, whole_model
from .written import Written


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint, without running any code that comes with it."""
    path = checkpoint.file("config.json")
    assert path is not None  # Checkpoint() has checked
    return config_at(path)


def _code_remarks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a person should know of code that comes with a model."""
    if not checkpoint.config_json.get("auto_map"):
        return ()
    return (
        "the model brings code of its own (auto_map in config.json), which is carried along and "
        "was not run: what was quantized is "
        "transformers' own class",
    )


class ModelStream:
    """A decoder-only model, one block in memory at a time.

    Args:
        model: local folder or hub id.
        device: where blocks are computed.
        compute: dtype of the arithmetic; None means float32 on a CPU and the model's own elsewhere.
        revision: hub branch, tag or commit.

    Raises:
        LowbitError: unsupported family, unreadable or incomplete checkpoint. Raised before any
            tensor data is read.
    """

    def __init__(
        self,
        model: str | Path,
        device: torch.device | str = "cpu",
        compute: torch.dtype | None = None,
        revision: str | None = None,
    ) -> None:
        self.checkpoint = open_source(model, revision)
        check_source(self.checkpoint)
        self.stored = self.checkpoint.stored()
        self.whole_config = load_config(self.checkpoint)
        self.config = text_config(self.whole_config, self.checkpoint.name)
        self.described: Described = described(self.config)
        self.described.check(self.checkpoint.name)
        self.device = torch.device(device)
        skeleton = build_skeleton(self.config, self.checkpoint.name, **fast_attention(self.config))
        whole = whole_model(self.whole_config) if is_wrapper(self.whole_config) else None
        modules = ModuleNames(skeleton if whole is None else whole)
        replace_fused(skeleton)
        self.names = self._found(skeleton)
        self._shell = Shell(skeleton, self.frame)
        self._blocks = self._shell.blocks
        leftover = self._check_blocks()
        self.outer: Outer = outer_of(
            self.checkpoint,
            self.skeleton,
            {
                n: self.names.places[n][0].tensor
                for n in self._shell.stored
                if n in self.names.places
            },
            self.stored,
            self._tied(skeleton),
        )
        self.written = Written.of(
            self.names, modules, self.described, self._shell.stored_in, self.outer
        )
        self._remarks: tuple[str, ...] = (
            *leftover,
            *self.outer.remarks,
            *_code_remarks(self.checkpoint),
        )
        self.dtype = dtype_of_most(
            self.stored,
            (p.tensor for n in self.linear_shapes() for p in self.names.places[f"{n}.weight"]),
        )
        self.compute = compute or (torch.float32 if self.device.type == "cpu" else self.dtype)
        self._fixed: dict[str, Tensor] | None = None
        self._basis: Basis | None = None
        self._order: Tensor | None = None

    def in_float32(self) -> ModelStream:
        """The same model computed in float32 at least; itself if it is."""
        wide = torch.promote_types(self.compute, torch.float32)
        if wide == self.compute:
            return self
        out = copy(self)
        out.compute, out._fixed = wide, None
        return out

    def rotated(self, seed: int) -> ModelStream:
        """The same model in a random Hadamard basis of its residual stream, norms fused; see
        `lowbit.model.residual`.

        Raises:
            LowbitError: the family or its hidden size does not allow it.
        """
        out = copy(self)
        out._basis = basis_of(
            self.described,
            self.config.hidden_size,
            self.frame.centred,
            self.config.model_type,
            seed,
        )
        out._fixed = None
        return out

    def ordered(self, order: Tensor) -> ModelStream:
        """The same model with channel i of its residual stream the one that was ``order[i]``; see
        `lowbit.model.order`.

        Raises:
            LowbitError: the family does not allow it, or the model is rotated, which mixes its
                channels.
        """
        if self._basis is not None:
            raise LowbitError(
                "crossquant.fold=group sorts channels that quarot has mixed: use --set "
                "crossquant.fold=channel, or leave quarot out."
            )
        check_order(self.described, self.config.model_type)
        out = copy(self)
        out._order, out._fixed = order.cpu(), None
        return out

    def artifact_config(self) -> dict[str, Any]:
        """What an artifact's config.json says, but for its quantization: the original's, and what
        is true of the tensors written.
        """
        said = without_quantization(self.checkpoint.config_json)
        if is_wrapper(self.whole_config):
            if self.outer.tied and not self.tied:
                said["tie_word_embeddings"] = False
                said["text_config"] = {**said["text_config"], "tie_word_embeddings": False}
            return said
        if getattr(self.config, "tie_word_embeddings", False) and not self.tied:
            said["tie_word_embeddings"] = False
        named = str(self.dtype).removeprefix("torch.")
        keys = [k for k in ("dtype", "torch_dtype") if k in said] or ["dtype"]
        return {**said, **dict.fromkeys(keys, named)}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the model as it is seen here."""
        copied = self.copied()
        if not copied or (self._basis is None and self._order is None):
            return self._remarks
        return (
            *self._remarks,
            "the channels of the residual stream are no longer the original's, and tensors that "
            f"are copied as they are ('{next(iter(copied))}') "
            "may read it: leave the rotation or the order out if they are to be used",
        )

    @property
    def tied(self) -> bool:
        """The head and the embedding are one matrix, in the model as it is seen here."""
        return self.outer.tied and self._basis is None

    @property
    def skeleton(self) -> Any:
        """The transformers model on the meta device, its blocks taken out."""
        return self._shell.skeleton

    def _tied(self, skeleton: Any) -> bool:
        """What the configs say of the head. A wrapper's head that is stored is not tied, whichever
        of its configs says so.
        """
        if not is_wrapper(self.whole_config):
            return bool(getattr(self.config, "tie_word_embeddings", False))
        parts = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
        names = [f"{n}.weight" for p in parts for n, m in skeleton.named_modules() if m is p]
        one, other = (self.names.places[n] for n in names)
        return one == other

    def _of_blocks(self) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of everything that blocks store."""
        return {
            f"{self.block_name(i)}.{name}": shape
            for i in range(len(self))
            for name, shape in self._shell.stored_in[i].items()
        }

    def _found(self, skeleton: Any) -> Names:
        """Where the checkpoint holds what the skeleton asks for.

        Raises:
            LowbitError: something is missing; or the weights are another quantizer's.
        """
        try:
            return Names.of(skeleton, self.whole_config, self.stored, self.checkpoint.name)
        except LowbitError:
            known = [n for n in skeleton.state_dict() if n in self.stored]
            check_floats(self.checkpoint, self.stored, known, [""])
            raise

    def _check_blocks(self) -> tuple[str, ...]:
        """Refuse blocks of which much is of a form that is not known, and tensors that are no
        floats; remarks.
        """
        unknown = check_forms(
            {
                self.block_name(i): (block, self.graph(i).linears)
                for i, block in enumerate(self._blocks)
            }
        )
        return unknown + check_floats(
            self.checkpoint,
            self.stored,
            [p.tensor for n in self._floats() for p in self.names.places.get(n, ())],
            self._prefixes(),
        )

    def _floats(self) -> set[str]:
        """What of the skeleton is floats."""
        parts: list[tuple[str, Any]] = [("", self.skeleton)]
        parts += [(f"{self.block_name(i)}.", block) for i, block in enumerate(self._blocks)]
        return {
            prefix + n
            for prefix, module in parts
            for n, t in module.state_dict().items()
            if t.is_floating_point()
        }

    def _prefixes(self) -> list[str]:
        """What the names of each block's tensors begin with in the checkpoint."""
        found = set()
        for full in self._of_blocks():
            for place in self.names.places.get(full, ()):
                head, middle, tail = full.partition(f"{self.frame.layers}.")
                number, _, inside = tail.partition(".")
                if not head and middle and place.tensor.endswith(f".{number}.{inside}"):
                    found.add(place.tensor.removesuffix(inside))
        return sorted(found)

    def __len__(self) -> int:
        return len(self._blocks)

    def block_name(self, i: int) -> str:
        """The block's prefix in the checkpoint."""
        return self.described.block_name(i)

    @property
    def frame(self) -> Frame:
        """What lies around the blocks."""
        return self.described.frame

    def graph(self, i: int) -> Graph:
        """What reads what in block i."""
        return self.described.graph(i)

    def block_module(self, i: int) -> nn.Module:
        """The block's module, without data: forward only, for `torch.func.functional_call`."""
        return self._blocks[i]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out, in) of every quantizable linear."""
        out = {}
        for i, block in enumerate(self._blocks):
            for name in self.graph(i).linears:
                rows, columns = block.get_parameter(f"{name}.weight").shape
                out[f"{self.block_name(i)}.{name}"] = (rows, columns)
        return out

    def block_weights(self, i: int) -> dict[str, Tensor]:
        """The block's tensors by their names inside the block, on the device, in float32 (float64
        if that is the compute dtype).
        """
        prefix = self.block_name(i) + "."
        names = [prefix + n for n in self._shell.stored_in[i] if prefix + n in self.names.places]
        held = torch.promote_types(self.compute, torch.float32)
        weights = {
            k[len(prefix) :]: v.to(self.device, held if v.is_floating_point() else None)
            for k, v in self.names.read(self.checkpoint, names).items()
        }
        if self._order is not None:
            weights = order_block(weights, self.graph(i), self._order)
        if self._basis is None:
            return weights
        return rotate_block(weights, self.graph(i), self._basis, self.dtype, self.block_dtypes(i))

    def _ready(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.compute) if t.is_floating_point() else t.to(self.device)

    def block_dtypes(self, i: int) -> dict[str, torch.dtype]:
        """The dtypes in which the checkpoint stores a block's tensors, by their names inside the
        block.
        """
        prefix = self.block_name(i) + "."
        found = {}
        for name in self._shell.stored_in[i]:
            places = self.names.places.get(prefix + name)
            kind = self.stored[places[0].tensor].kind if places else ""
            if kind in FLOATS:
                found[name] = FLOATS[kind]
        return found

    def outer_tensors(self) -> dict[str, Tensor]:
        """The tensors outside the blocks as an artifact stores them: by name, in the checkpoint's
        dtypes.
        """
        names = self.outer.names
        read = self.checkpoint.read(names.values())
        tensors = {name: read[source] for name, source in names.items()}
        frame, head = self.frame, self.outer.head
        norm = f"{frame.trunk}.{frame.final[0]}" if frame.final else None
        embeddings = tuple(f"{frame.trunk}.{n}.weight" for n in frame.embeddings)
        if self._order is not None:
            return order_outer(tensors, embeddings, norm, head, self._order)
        if self._basis is None:
            return tensors
        tensors.setdefault(head, tensors[self.outer.embedding])
        return rotate_outer(tensors, embeddings, norm, head, frame.final_offset, self._basis)

    def copied_tensors(self) -> dict[str, Tensor | Raw]:
        """Tensors of the checkpoint that go out bit for bit as they are stored, read when they are
        written.
        """
        return self.checkpoint.as_stored(self.copied())

    def copied(self) -> dict[str, str]:
        """Names of these tensors -> why they are not quantized."""
        outside = "not a parameter of the model's class in transformers, "
        if is_wrapper(self.whole_config):
            outside = "outside the text model, "
        unread = {n: outside + self.checkpoint.copied(n) for n in sorted(self.names.unread)}
        of_parts = dict.fromkeys(self.written.copied, "none of its parts is quantized, copied")
        return {n: why for n, why in (unread | of_parts).items() if n not in self.outer.left_out}

    def stored_name(self, name: str) -> str | None:
        """The name of a parameter, or of a linear, in an artifact's files; None of one that is part
        of a tensor that is copied.

        Args:
            name: its full name in the text model.
        """
        return self.written.name(name)

    def tensor_name(self, name: str) -> str:
        """The same of what lies outside the blocks."""
        return self.written.outer(name)

    def skipped_linears(self) -> dict[str, str]:
        """Full name -> the reason why a linear is not quantized: those outside the blocks, then
        those of blocks whose graphs do not hold them.
        """
        kept = "kept in the model's dtype"
        of_head = f"output head, {kept}" + (" (tied to the embedding)" if self.tied else "")
        elsewhere = f"outside the decoder blocks, {kept}"
        head = self.skeleton.get_output_embeddings()
        outside = {
            name: of_head if module is head else elsewhere
            for name, module in self.skeleton.named_modules()
            if isinstance(module, nn.Linear)
        }
        inside = {}
        for i, block in enumerate(self._blocks):
            held, reasons = set(self.graph(i).linears), dict(self.graph(i).kept)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and name not in held:
                    why = reasons.get(name, "not in the block's graph")
                    inside[f"{self.block_name(i)}.{name}"] = f"{why}: kept in its own dtype"
        return outside | inside

    def _outer(self) -> dict[str, Tensor]:
        """Everything outside the blocks, ready to compute, tied names included."""
        if self._fixed is None:
            held = {k: self._ready(v) for k, v in self.outer_tensors().items()}
            held.setdefault(self.outer.head, held[self.outer.embedding])
            for name, buffer in self.skeleton.named_buffers():
                held.setdefault(name, buffer.to(self.device))
            self._fixed = held
        return self._fixed

    def release(self) -> None:
        """Forget the tensors outside the blocks; they are read again when next needed."""
        self._fixed = None

    def embed(
        self, ids: Tensor, dtype: torch.dtype | None = None, storage: Storage | None = None
    ) -> Tensor:
        """Token ids (n, length) int64 -> the first block's input (n, length, hidden) in ``dtype``,
        by default the model's.

        Args:
            storage: where it is put; None means on the device.
        """
        return self.entering(ids, dtype, storage)[0]

    @torch.no_grad()
    def entering(
        self, ids: Tensor, dtype: torch.dtype | None = None, storage: Storage | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and what depends on the tokens alone of what blocks are given beside their
        input: number of an item -> (n, ...).
        """
        out: Tensor | None = None
        kept: Kept | None = None
        place = storage or Storage("device", self.device)
        shown = {n: t for n, t in enumerate(self.described.items) if t.maker is None}
        for row, one in enumerate(ids):
            called = self._shell.enter(one[None].to(self.device), self._outer())
            x = called[0].x.to(dtype or self.dtype)
            if out is None or kept is None:
                out = place.empty((len(ids), *x.shape[1:]), x.dtype)
                kept = Kept(len(ids), place, out)
            out[row] = x[0]
            found: dict[Keys, Tensor]
            found = {(n,): at(called[t.readers[0][0]].kwargs, t.path) for n, t in shown.items()}
            kept.put(slice(row, row + 1), found)
        assert out is not None and kept is not None  # rows are at least one
        return out, {n: kept.values[n,] for n in shown}

    @torch.no_grad()
    def block_kwargs(self, length: int) -> list[dict[str, Any]]:
        """What each block is called with besides its input, for unpadded rows of ``length`` tokens.

        Captured per block, since hybrid models give different masks and rotary tables to different
        layers. Batch dimensions are 1 and broadcast.
        """
        ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        off = {"use_cache": False, **dict.fromkeys(CACHES)}
        return [
            {k: off.get(k, v) for k, v in called.kwargs.items()}
            for called in self._shell.enter(ids, self._outer())
        ]

    def readout(self) -> Callable[[Tensor], Tensor]:
        """The last block's output (n, length, hidden) -> logits (n, length, vocab) float32;
        differentiable by its input.
        """
        logits = self._shell.readout(self._outer())
        return lambda x: logits(x.to(self.device, self.compute))

    @torch.no_grad()
    def head(self, x: Tensor) -> Tensor:
        """The last block's output (n, length, hidden) -> logits (n, length, vocab) in float32."""
        return self.readout()(x)
