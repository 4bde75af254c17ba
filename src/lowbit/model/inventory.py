"""Every tensor of a checkpoint, accounted for: which parameter is read from it, and under which
name it goes out, quantized or copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowbitError
from .checkpoint import FLOATS
from .experts import replace_fused
from .forms import check_forms
from .graph import Described
from .intake import check_floats, dtype_of_most
from .modules import ModuleNames
from .naming import Names
from .opened import Opened
from .outer import Outer, outer_of
from .precision import Precision
from .raw import Raw
from .shell import Shell
from .skeleton import build_skeleton, fast_attention
from .wrapper import whole_model
from .written import Written


@dataclass(frozen=True)
class Inventory:
    """A model's skeleton and where its checkpoint holds it.

    Attributes:
        opened: the checkpoint. described: the graphs of its blocks.
        shell: the skeleton, its blocks taken out.
        names: where each parameter lies. outer: those outside the blocks.
        written: the names that they have in an artifact.
        dtype: in which most weights of quantizable linears are stored.
        precision: what stays in float32 where it computes in 16 bits.
        remarks: what a person should know.
    """

    opened: Opened
    described: Described
    shell: Shell
    names: Names
    outer: Outer
    written: Written
    dtype: torch.dtype
    precision: Precision
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, opened: Opened, described: Described) -> Inventory:
        """Find everything that a model's class asks for.

        Raises:
            LowbitError: something is missing, of another shape, quantized in a way that is not
                read, or of a form that is not known. Raised before any tensor data is read.
        """
        skeleton = _built(opened)
        whole = whole_model(opened.whole_config) if opened.wrapped else None
        modules = ModuleNames(skeleton if whole is None else whole)
        precision = Precision.of(
            [skeleton] if whole is None else [skeleton, whole], partial(_built, opened)
        )
        replace_fused(skeleton)
        names = _found(opened, skeleton)
        shell = Shell(skeleton, described.frame)
        unknown = check_forms(
            {
                described.block_name(i): (block, described.graph(i).linears)
                for i, block in enumerate(shell.blocks)
            }
        )
        leftover = check_floats(
            opened.checkpoint,
            opened.stored,
            [p.tensor for n in _floats(described, shell) for p in names.places.get(n, ())],
            _prefixes(described, shell, names),
        )
        own = {n: names.places[n][0].tensor for n in shell.stored if n in names.places}
        tied = _is_tied(opened, skeleton, names)
        outer = outer_of(opened.checkpoint, skeleton, own, opened.stored, tied)
        weights = (f"{n}.weight" for n in linear_shapes(described, shell.blocks))
        return cls(
            opened,
            described,
            shell,
            names,
            outer,
            Written.of(names, modules, described, shell.stored_in, outer),
            dtype_of_most(opened.stored, (p.tensor for n in weights for p in names.places[n])),
            precision,
            (*unknown, *leftover, *outer.remarks, *opened.remarks),
        )

    def block(self, i: int) -> dict[str, Tensor]:
        """Read the tensors of block i: by their names inside the block, in their stored dtypes.

        Raises:
            LowbitError: see ``Checkpoint.read``.
        """
        prefix = self.described.block_name(i) + "."
        names = [prefix + n for n in self.shell.stored_in[i] if prefix + n in self.names.places]
        read = self.names.read(self.opened.checkpoint, names)
        return {k.removeprefix(prefix): v for k, v in read.items()}

    def block_dtypes(self, i: int) -> dict[str, torch.dtype]:
        """The dtypes in which these tensors are stored."""
        prefix = self.described.block_name(i) + "."
        found = {}
        for name in self.shell.stored_in[i]:
            places = self.names.places.get(prefix + name)
            kind = self.opened.stored[places[0].tensor].kind if places else ""
            if kind in FLOATS:
                found[name] = FLOATS[kind]
        return found

    def outside(self) -> dict[str, Tensor]:
        """Read the tensors outside the blocks: by full name, in their stored dtypes."""
        names = self.outer.names
        read = self.opened.checkpoint.read(names.values())
        return {name: read[source] for name, source in names.items()}

    def copied_tensors(self) -> dict[str, Tensor | Raw]:
        """Tensors of the checkpoint that go out bit for bit as they are stored, read when they are
        written.
        """
        return self.opened.checkpoint.as_stored(self.copied())

    def copied(self) -> dict[str, str]:
        """Names of these tensors -> why they are not quantized."""
        outside = "not a parameter of the model's class in transformers, "
        if self.opened.wrapped:
            outside = "outside the text model, "
        how = self.opened.checkpoint.copied
        unread = {n: outside + how(n) for n in sorted(self.names.unread)}
        of_parts = dict.fromkeys(self.written.copied, "none of its parts is quantized, copied")
        return {n: why for n, why in (unread | of_parts).items() if n not in self.outer.left_out}

    def skipped_linears(self, tied: bool) -> dict[str, str]:
        """Full name -> the reason why a linear is not quantized: those outside the blocks, then
        those of blocks whose graphs do not hold them.

        Args:
            tied: the head and the embedding are one matrix.
        """
        kept = "kept in the model's dtype"
        of_head = f"output head, {kept}" + (" (tied to the embedding)" if tied else "")
        elsewhere = f"outside the decoder blocks, {kept}"
        skeleton = self.shell.skeleton
        head = skeleton.get_output_embeddings()
        outside = {
            name: of_head if module is head else elsewhere
            for name, module in skeleton.named_modules()
            if isinstance(module, nn.Linear)
        }
        inside = {}
        for i, block in enumerate(self.shell.blocks):
            graph = self.described.graph(i)
            held, reasons = set(graph.linears), dict(graph.kept)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and name not in held:
                    why = reasons.get(name, "not in the block's graph")
                    full = f"{self.described.block_name(i)}.{name}"
                    inside[full] = f"{why}: kept in its own dtype"
        return outside | inside


def linear_shapes(described: Described, blocks: Sequence[nn.Module]) -> dict[str, tuple[int, int]]:
    """Full name -> (out, in) of every quantizable linear."""
    out = {}
    for i, block in enumerate(blocks):
        for name in described.graph(i).linears:
            rows, columns = block.get_parameter(f"{name}.weight").shape
            out[f"{described.block_name(i)}.{name}"] = (rows, columns)
    return out


def _built(opened: Opened, dtype: torch.dtype | None = None) -> Any:
    """The skeleton of a model as transformers makes it.

    Args:
        dtype: of its parameters; None for what the config says.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return build_skeleton(opened.config, opened.name, **options, **fast_attention(opened.config))


def _found(opened: Opened, skeleton: Any) -> Names:
    """Where the checkpoint holds what the skeleton asks for.

    Raises:
        LowbitError: something is missing; or the weights are another quantizer's.
    """
    try:
        return Names.of(skeleton, opened.whole_config, opened.stored, opened.name)
    except LowbitError:
        known = [n for n in skeleton.state_dict() if n in opened.stored]
        check_floats(opened.checkpoint, opened.stored, known, [""])
        raise


def _floats(described: Described, shell: Shell) -> set[str]:
    """What of the skeleton is floats."""
    parts: list[tuple[str, Any]] = [("", shell.skeleton)]
    parts += [(f"{described.block_name(i)}.", block) for i, block in enumerate(shell.blocks)]
    return {
        prefix + n
        for prefix, module in parts
        for n, t in module.state_dict().items()
        if t.is_floating_point()
    }


def _prefixes(described: Described, shell: Shell, names: Names) -> list[str]:
    """What the names of each block's tensors begin with in the checkpoint."""
    found = set()
    for full in _of_blocks(described, shell):
        for place in names.places.get(full, ()):
            head, middle, tail = full.partition(f"{described.frame.layers}.")
            number, _, inside = tail.partition(".")
            if not head and middle and place.tensor.endswith(f".{number}.{inside}"):
                found.add(place.tensor.removesuffix(inside))
    return sorted(found)


def _of_blocks(described: Described, shell: Shell) -> Iterator[str]:
    """Full names of everything that blocks store."""
    for i, stored in enumerate(shell.stored_in):
        yield from (f"{described.block_name(i)}.{name}" for name in stored)


def _is_tied(opened: Opened, skeleton: Any, names: Names) -> bool:
    """What the configs say of the head. A wrapper's head that is stored is not tied, whichever of
    its configs says so.
    """
    if not opened.wrapped:
        return opened.says_tied
    parts = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    own = [f"{n}.weight" for p in parts for n, m in skeleton.named_modules() if m is p]
    one, other = (names.places[n] for n in own)
    return one == other
