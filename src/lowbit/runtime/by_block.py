"""A model that computes windows of text with one block of it in memory at a time: a checkpoint of
floats, or an artifact as its loaders compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.files import REPORT
from ..grid import Affine
from ..model.block import Block
from ..model.context import TOKENS_PER_PASS
from ..model.passing import hidden_of
from ..model.stream import ModelStream
from .decoded import DecodedArtifact


class ByBlock:
    """The model.

    Args:
        model: local folder, hub id or GGUF file. device: that computes. dtype: of the arithmetic;
            None means float32 on a CPU and the model's own elsewhere.

    Raises:
        LowbitError: see `ModelStream`; or an artifact in another format than `quantize` writes.
    """

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._artifact = DecodedArtifact(model) if (Path(model) / REPORT).is_file() else None
        opened = model if self._artifact is None else self._artifact.opened()
        self.source = ModelStream(opened, device, dtype)

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return int(self.source.config.vocab_size)

    @property
    def width(self) -> int:
        """Numbers of a token that go from block to block."""
        return int(self.source.config.hidden_size * self.source.frame.streams)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.source)

    def together(self, length: int) -> int:
        """Windows of so many tokens in one pass of a block."""
        return max(1, TOKENS_PER_PASS // length)

    def hidden(self, windows: Tensor, progress: Callable[[], None]) -> Tensor:
        """What leaves the last block, (n, length, width) float32.

        Args:
            windows: (n, length) int64. progress: called after each block.
        """
        return hidden_of(self.source, windows, Affine(8), self._reading, progress)

    def _reading(self, block: Block, i: int) -> Block:
        """The block as the artifact reads inputs, keys and values."""
        artifact, source = self._artifact, self.source
        if artifact is None:
            return block
        prefix = source.block_name(i)
        spelled = {n: source.written.spellings(f"{prefix}.{n}")[0] for n in block.graph.linears}
        found = {n: artifact.input_quantizer(name) for n, name in spelled.items()}
        block = block.with_input_quantizers({n: q for n, q in found.items() if q is not None})
        return block if block.graph.attention is None else replace(block, kv=artifact.kv)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, length, width) -> (n, length, vocab) float32."""
        return self.source.head(hidden)
