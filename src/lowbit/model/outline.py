"""What a model is without its data: shapes and wiring, known from config.json alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..grid import Rotation
from .skeleton import build_skeleton
from .wiring import Wiring, wiring_of


@dataclass(frozen=True)
class Outline:
    """Shapes of a model, and what stages will have made of it.

    Attributes:
        config: of transformers. wiring: of its blocks.
        linears: linear of one block -> (out, in). biased: those with a bias.
        rest: parameters of a block outside its linears.
        outside: parameters outside the blocks, a tied head not counted. tied_head: parameters of
            that head; 0 without one.
        centred: its norms take the mean off (LayerNorm).
        rotated: the residual stream is in another basis; the head is no longer tied then.
        online: linear -> rotation of its input while the finished model runs.
        kv: keys and values will be quantized. key_rotation: of queries and keys then.
    """

    config: Any
    wiring: Wiring
    linears: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    rest: int
    outside: int
    tied_head: int
    centred: bool
    rotated: bool = False
    online: Mapping[str, Rotation] = field(default_factory=dict)
    kv: bool = False
    key_rotation: Rotation | None = None

    @classmethod
    def of(cls, config: Any) -> Outline:
        """The outline of a transformers config.

        Raises:
            LowbitError: unsupported family, or a config that describes no model.
        """
        small = copy.deepcopy(config)
        small.num_hidden_layers = 1
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:1]
        wiring = wiring_of(small)
        name = getattr(config, "name_or_path", "") or config.model_type
        model: Any = build_skeleton(small, name)
        block = model.get_submodule(wiring.layers)[0]
        linears = {n: tuple(block.get_parameter(f"{n}.weight").shape) for n in wiring.linears}
        inside = sum(p.numel() for p in block.parameters())
        # Meta tensors carry no data to tie: count the head out by the config's word.
        head = model.get_output_embeddings().weight
        tied = bool(getattr(config, "tie_word_embeddings", False))
        everything = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        outside = everything - inside
        if tied and head is not model.get_input_embeddings().weight:
            outside -= head.numel()
        return cls(
            config=config,
            wiring=wiring_of(config),
            linears=linears,
            biased=frozenset(n for n in wiring.linears if block.get_submodule(n).bias is not None),
            rest=inside - sum(a * b for a, b in linears.values()),
            outside=outside,
            tied_head=head.numel() if tied else 0,
            centred=any(isinstance(m, nn.LayerNorm) for m in block.modules()),
        )

    @property
    def blocks(self) -> int:
        """How many there are."""
        count: int = self.config.num_hidden_layers
        return count

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full linear name -> (out, in), of all blocks."""
        layers = self.wiring.layers
        return {
            f"{layers}.{i}.{n}": shape
            for i in range(self.blocks)
            for n, shape in self.linears.items()
        }

    @property
    def stored_outside(self) -> int:
        """Parameters outside the blocks as an artifact stores them."""
        return self.outside + (self.tied_head if self.rotated else 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the checkpoint, as the config says; bfloat16 if it does not."""
        said = getattr(self.config, "dtype", None)
        return said if isinstance(said, torch.dtype) else torch.bfloat16
