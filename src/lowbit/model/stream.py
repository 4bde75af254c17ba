"""A model as a stream of blocks: a skeleton without data, and tensors read when a block is needed
and dropped after it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowbitError
from .arrangement import Arrangement
from .beside import Kept, Keys, at
from .experts import Experts
from .graph import Described, Frame, Graph
from .grouped import Version
from .inventory import Inventory, linear_shapes
from .opened import Opened
from .order import check_order
from .precision import Wide, as_computed
from .raw import Raw
from .residual import basis_of
from .shell import CACHES
from .storage import Storage
from .tracing import described


class ModelStream:
    """A decoder-only model, one block in memory at a time.

    Args:
        model: local folder or hub id, or what has been opened of one.
        device: where blocks are computed.
        compute: dtype of the arithmetic; None means float32 on a CPU and the model's own elsewhere.
        revision: hub branch, tag or commit.

    Raises:
        LowbitError: unsupported family, unreadable or incomplete checkpoint. Raised before any
            tensor data is read.
    """

    def __init__(
        self,
        model: str | Path | Opened,
        device: torch.device | str = "cpu",
        compute: torch.dtype | None = None,
        revision: str | None = None,
    ) -> None:
        opened = model if isinstance(model, Opened) else Opened.of(model, revision)
        self.checkpoint, self.stored = opened.checkpoint, opened.stored
        self.whole_config, self.config = opened.whole_config, opened.config
        self.described: Described = described(self.config)
        self.described.check(opened.name)
        self.inventory = Inventory.of(opened, self.described)
        self.names, self.outer = self.inventory.names, self.inventory.outer
        self.written, self.dtype = self.inventory.written, self.inventory.dtype
        self._shell = self.inventory.shell
        self._arrangement = Arrangement()
        self.device = torch.device(device)
        self.compute = compute or (torch.float32 if self.device.type == "cpu" else self.dtype)
        self._fixed: dict[str, Tensor] | None = None

    def in_float32(self) -> ModelStream:
        """The same model computed in float32 at least; itself if it is."""
        return self.computing(torch.promote_types(self.compute, torch.float32))

    def computing(self, dtype: torch.dtype) -> ModelStream:
        """The same model computed in a dtype; itself if it is."""
        if dtype == self.compute:
            return self
        out = copy(self)
        out.compute, out._fixed = dtype, None
        return out

    def rotated(self, seed: int) -> ModelStream:
        """The same model in a random Hadamard basis of its residual stream, norms fused; see
        `lowbit.model.residual`.

        Raises:
            LowbitError: the family or its hidden size does not allow it.
        """
        basis = basis_of(
            self.described,
            self.config.hidden_size,
            self.frame.centred,
            self.config.model_type,
            seed,
        )
        return self._arranged(replace(self._arrangement, basis=basis))

    def ordered(self, order: Tensor) -> ModelStream:
        """The same model with channel i of its residual stream the one that was ``order[i]``; see
        `lowbit.model.order`.

        Raises:
            LowbitError: the family does not allow it, or the model is rotated, which mixes its
                channels.
        """
        if self._arrangement.basis is not None:
            raise LowbitError(
                "crossquant.fold=group sorts channels that quarot has mixed: use --set "
                "crossquant.fold=channel, or leave quarot out."
            )
        check_order(self.described, self.config.model_type)
        return self._arranged(replace(self._arrangement, order=order.cpu()))

    def _arranged(self, arrangement: Arrangement) -> ModelStream:
        out = copy(self)
        out._arrangement, out._fixed = arrangement, None
        return out

    def artifact_config(self) -> dict[str, Any]:
        """What an artifact's config.json says, but for its quantization: the original's, and what
        is true of the tensors written.
        """
        opened = self.inventory.opened
        before = self.outer.tied if opened.wrapped else opened.says_tied
        return opened.artifact_config(self.dtype, before and not self.tied)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the model as it is seen here."""
        copied, known = self.copied(), self.inventory.remarks
        if not copied or self._arrangement.plain:
            return known
        return (
            *known,
            "the channels of the residual stream are no longer the original's, and tensors that "
            f"are copied as they are ('{next(iter(copied))}') "
            "may read it: leave the rotation or the order out if they are to be used",
        )

    @property
    def tied(self) -> bool:
        """The head and the embedding are one matrix, in the model as it is seen here."""
        return self.outer.tied and self._arrangement.basis is None

    @property
    def skeleton(self) -> Any:
        """The transformers model on the meta device, its blocks taken out."""
        return self._shell.skeleton

    def __len__(self) -> int:
        return len(self._shell.blocks)

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
        return self._shell.blocks[i]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (out, in) of every quantizable linear."""
        return linear_shapes(self.described, self._shell.blocks)

    def block_weights(self, i: int) -> dict[str, Tensor]:
        """The block's tensors by their names inside the block, on the device, in float32 (float64
        if that is the compute dtype).
        """
        held = torch.promote_types(self.compute, torch.float32)
        weights = {
            # Sent as it is stored: half the bytes, and widened there.
            name: t.to(self.device).to(held if t.is_floating_point() else t.dtype)
            for name, t in self.inventory.block(i).items()
        }
        return self._arrangement.block(weights, self.graph(i), self.dtype, self.block_dtypes(i))

    def experts_in_steps(self) -> frozenset[Version]:
        """The ways in which experts are computed in steps of tuning; none without experts.

        Raises:
            LowbitError: LOWBIT_EXPERTS names no way.
        """
        modules = (m for block in self._shell.blocks for m in block.modules())
        return frozenset(m.in_steps(self.device) for m in modules if isinstance(m, Experts))

    def wide_in(self, i: int) -> Wide:
        """What of block i stays in float32, by its name inside the block."""
        return self.inventory.precision.inside(self.block_name(i))

    def block_dtypes(self, i: int) -> dict[str, torch.dtype]:
        """The dtypes in which the checkpoint stores a block's tensors, by their names inside the
        block.
        """
        return self.inventory.block_dtypes(i)

    def outer_tensors(self) -> dict[str, Tensor]:
        """The tensors outside the blocks as an artifact stores them: by name, in the checkpoint's
        dtypes.
        """
        return self._arrangement.outside(self.inventory.outside(), self.frame, self.outer)

    def copied_tensors(self) -> dict[str, Tensor | Raw]:
        """Tensors of the checkpoint that go out bit for bit as they are stored, read when they are
        written.
        """
        return self.inventory.copied_tensors()

    def copied(self) -> dict[str, str]:
        """Names of these tensors -> why they are not quantized."""
        return self.inventory.copied()

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
        return self.inventory.skipped_linears(self.tied)

    def _outer(self) -> dict[str, Tensor]:
        """Everything outside the blocks, ready to compute, tied names included."""
        if self._fixed is None:
            wide = self.inventory.precision.wide(self.compute)
            held = {
                name: t.to(self.device).to(as_computed(name, t, self.compute, wide))
                for name, t in self.outer_tensors().items()
            }
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
