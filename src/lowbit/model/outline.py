"""What a model is without its data: shapes and graphs, known from config.json alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..grid import Rotation
from .beside import Item
from .declared import check_declared, quantized_by
from .experts import replace_fused
from .forms import remark_on, unknown_in
from .graph import Described, Frame, Graph
from .skeleton import build_skeleton
from .tracing import described
from .tracing.blocks import signature
from .wrapper import is_wrapper, text_config, whole_model

# How configs name the number of experts that a token chooses.
_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


@dataclass(frozen=True)
class Kind:
    """Blocks of one graph and of the same shapes.

    Attributes:
        linears: linear that is quantized -> (out, in). biased: those with a bias.
        rest: parameters of a block outside these linears. unknown: names of those of a form that
            is not known, which stay as they are.
    """

    graph: Graph
    linears: Mapping[str, tuple[int, int]]
    biased: frozenset[str]
    rest: int
    unknown: tuple[str, ...] = ()

    def shares(self, config: Any) -> dict[str, float]:
        """Linear of an expert -> the share of tokens that reaches it on the average; nothing where
        the config does not say how many experts a token chooses.
        """
        chosen = next(
            (c for k in _CHOSEN if isinstance(c := getattr(config, k, None), int) and c > 0), None
        )
        if chosen is None:
            return {}
        found: dict[str, float] = {}
        for mixture in {s.through for s in self.graph.sites if s.through is not None}:
            inside = [n for n in self.linears if n.startswith(f"{mixture}.")]
            experts = {n.removeprefix(f"{mixture}.").partition(".")[0] for n in inside}
            found |= dict.fromkeys(inside, min(1.0, chosen / len(experts)))
        return found

    @classmethod
    def of(cls, graph: Graph, block: nn.Module, path: str) -> Kind:
        """The kind of a block, which may be on the meta device.

        Args:
            path: of the block, for errors.

        Raises:
            LowbitError: most of it is of a form that is not known.
        """
        linears: dict[str, tuple[int, int]] = {}
        for name in graph.linears:
            rows, columns = block.get_parameter(f"{name}.weight").shape
            linears[name] = (rows, columns)
        inside = sum(p.numel() for p in block.parameters())
        return cls(
            graph,
            linears,
            frozenset(n for n in linears if block.get_submodule(n).bias is not None),
            inside - sum(a * b for a, b in linears.values()),
            unknown_in(block, graph.linears, path),
        )


@dataclass(frozen=True)
class Outline:
    """Shapes of a model, and what stages will have made of it.

    Attributes:
        config: of transformers. frame: what lies around the blocks.
        kinds: of blocks. of_layers: of each block, the index of its kind.
        outside: parameters outside the blocks, a tied head not counted. tied_head: parameters of
            that head; 0 without one.
        around: parameters of a larger model around the text model (towers, projectors), which are
            copied as they are; 0 without one, or where its class cannot be built.
        centred: its norms take the mean off (LayerNorm).
        items: what goes through the model beside the residual stream.
        rotated: the residual stream is in another basis; the head is no longer tied then.
        online: full linear name -> rotation of its input while the finished model runs.
        kv: keys and values will be quantized. key_rotation: of queries and keys then.
        quantized_by: how config.json says that the weights are quantized; None if it does not.
    """

    config: Any
    frame: Frame
    kinds: tuple[Kind, ...]
    of_layers: tuple[int, ...]
    outside: int
    tied_head: int
    centred: bool
    around: int = 0
    items: tuple[Item, ...] = ()
    rotated: bool = False
    online: Mapping[str, Rotation] = field(default_factory=dict)
    kv: bool = False
    key_rotation: Rotation | None = None
    quantized_by: str | None = None

    @classmethod
    def of(cls, config: Any) -> Outline:
        """The outline of a transformers config, of a wrapper that of its text model.

        Raises:
            LowbitError: unsupported family, or a config that describes no model, or one without a
                linear that can be quantized, or one whose weights `quantize` would refuse whatever
                they are.
        """
        whole, name = config, getattr(config, "name_or_path", "") or config.model_type
        said = whole.to_dict()
        check_declared(said, name)
        config = text_config(whole, name)
        found = described(config)
        found.check(name)
        model: Any = build_skeleton(copy.deepcopy(config), name)
        around = _around(whole, model)
        blocks = list(model.get_submodule(found.frame.layers).children())
        everything = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        outside = everything - sum(p.numel() for block in blocks for p in block.parameters())
        kinds: list[Kind] = []
        of_layers: list[int] = []
        seen: dict[Any, int] = {}  # blocks with many experts take long to take apart
        for i, block in enumerate(blocks):
            alike = found.of_layers[i], signature(block)
            if alike not in seen:
                replace_fused(block)
                kind = Kind.of(found.graph(i), block, found.block_name(i))
                if kind not in kinds:
                    kinds.append(kind)
                seen[alike] = kinds.index(kind)
            of_layers.append(seen[alike])
        # Meta tensors carry no data to tie: count the head out by the word of the whole's config.
        head = model.get_output_embeddings().weight
        tied = bool(getattr(whole, "tie_word_embeddings", False))
        if tied and head is not model.get_input_embeddings().weight:
            outside -= head.numel()
        return cls(
            config=config,
            frame=found.frame,
            kinds=tuple(kinds),
            of_layers=tuple(of_layers),
            outside=outside,
            tied_head=head.numel() if tied else 0,
            centred=found.frame.centred,
            around=around,
            items=found.items,
            quantized_by=quantized_by(said),
        )

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.of_layers)

    @cached_property
    def described(self) -> Described:
        """The graphs, one a kind."""
        graphs = tuple(kind.graph for kind in self.kinds)
        return Described(self.frame, graphs, self.of_layers, self.items)

    def kind(self, i: int) -> Kind:
        """The kind of block i."""
        return self.kinds[self.of_layers[i]]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know before a run."""
        unknown = remark_on(
            [
                f"{self.described.block_name(i)}.{name}"
                for i in range(self.blocks)
                for name in self.kind(i).unknown
            ]
        )
        if self.quantized_by is None:
            return unknown
        return (
            *unknown,
            f"config.json speaks of quantized weights ({self.quantized_by}): quantize reads them "
            "where they are floats, FP8 or MXFP4, and refuses others",
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full linear name -> (out, in), of all blocks."""
        return {
            f"{self.described.block_name(i)}.{n}": shape
            for i in range(self.blocks)
            for n, shape in self.kind(i).linears.items()
        }

    @property
    def mixtures(self) -> bool:
        """Whether experts are quantized."""
        return any(
            n.startswith(f"{m}.") for k in self.kinds for m in k.graph.mixtures for n in k.linears
        )

    @property
    def biased(self) -> frozenset[str]:
        """Full names of the linears with a bias."""
        return frozenset(
            f"{self.described.block_name(i)}.{n}"
            for i in range(self.blocks)
            for n in self.kind(i).biased
        )

    @property
    def rest(self) -> int:
        """Parameters of all blocks outside their linears."""
        return sum(self.kind(i).rest for i in range(self.blocks))

    @property
    def stored_outside(self) -> int:
        """Parameters outside the blocks as an artifact stores them."""
        return self.outside + (self.tied_head if self.rotated else 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the checkpoint, as the config says; bfloat16 if it does not."""
        said = getattr(self.config, "dtype", None)
        return said if isinstance(said, torch.dtype) else torch.bfloat16


def _around(config: Any, text: nn.Module) -> int:
    """Parameters of a model outside its text model, as far as its class can be built.

    Args:
        config: of the whole. text: the text model with its head, on the meta device.
    """
    whole = whole_model(config) if is_wrapper(config) else None
    return 0 if whole is None else _named(whole) - _named(text)


def _named(model: nn.Module) -> int:
    """Parameters of a model, those with two names twice: tied heads count in either model."""
    return sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
