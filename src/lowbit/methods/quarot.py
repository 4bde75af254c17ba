"""QuaRot (arXiv 2404.00456): Hadamard rotations that spread outlier channels, so that activations
and caches quantize well. For an orthogonal Q and linears W1, W2 around an activation x,

    W2 x = (W2 Q^T)(Q x)          Q a Hadamard matrix, scaled; randomly signed for the residual

Where Q can be folded into what makes x (section 4, stages 1a-1d):

    residual      the whole stream, with embedding and head; norms are reduced to normalisation,
                  their gains folded into the linears behind them. It is the model's, hence the
                  stage `Rotate` and `model.residual`
    heads         each head's values, between the value and the output projection
    online        the input of the MLP's last linear, and across heads that of attention's output:
                  nothing that makes them is linear, so the model rotates them while it runs
    keys          queries and keys, behind the position encoding: done where the cache is
                  quantized, see `lowbit.grid.KVGrid`

Published and kept: the order of the stages, Hadamard matrices of sizes that are no powers of two by
Kronecker products. Helpers: `grid.rotation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, InputQuantizer, KVGrid, Rotation
from ..model.block import Block
from ..model.graph import Described, Graph, Heads
from ..model.model import Model
from ..model.outline import Kind, Outline
from ..model.residual import basis_of
from ..model.rewrite import checked


@dataclass(frozen=True)
class QuaRot:
    """Which rotations are made. Comes first in a recipe.

    Attributes:
        residual: of the residual stream, folded into the weights around it (with the norms' gains).
        heads: of each head's values, folded into the linears before and after attention.
        online: of the activations that enter the MLP's last linear and, across heads, attention's
            output linear, while the model runs. Plain loaders cannot do that; without it, and with
            16-bit activations, they load the artifact.
        across_heads: whether ``online`` includes the one before attention's output linear.
        keys: of queries and keys after position encoding, where keys are quantized.
    """

    residual: bool = True
    heads: bool = True
    online: bool = True
    across_heads: bool = True
    keys: bool = True

    def __post_init__(self) -> None:
        if not (self.residual or self.heads or self.online):
            raise LowbitError(
                "quarot with residual, heads and online all false rotates nothing: leave it out of "
                "the methods."
            )

    def __call__(self, block: Block) -> Block:
        heads, given = block.graph.heads, block
        if heads is not None and self.heads:
            block = self._rotate_values(block, heads)
        elif heads is not None and self.online and self.across_heads:
            block = _without_norm(block, heads)
        widths = {n: block.weight(n).shape[1] for n in block.graph.linears}
        for linear, rotation in self.online_rotations(block.graph, widths).items():
            block = _online(block, linear, rotation)
        if self.keys and block.kv is not None and heads is not None:
            block = replace(block, kv=KVGrid(block.kv.grid, _of_head(heads)))
        return checked(given, block)

    def online_rotations(self, graph: Graph, widths: Mapping[str, int]) -> dict[str, Rotation]:
        """The inputs of a block that are rotated while the model runs.

        Args:
            widths: linear of a block -> inputs.

        Raises:
            LowbitError: a size that cannot be rotated.
        """
        if not self.online:
            return {}
        found: dict[str, Rotation] = {}
        heads = graph.heads
        if self.across_heads and heads is not None and heads.count > 1:
            found[heads.output] = Rotation.across_heads(heads.count, heads.width)
        for name in graph.inner:
            found[name] = Rotation.hadamard(widths[name], f"the number of inputs of '{name}'")
        return found

    def _rotate_values(self, block: Block, heads: Heads) -> Block:
        block, inner = _without_norm(block, heads), _of_head(heads)
        rows = slice(*heads.values.rows) if heads.values.rows else slice(None)
        key, bias = f"{heads.values.module}.weight", f"{heads.values.module}.bias"
        out = f"{heads.output}.weight"
        weight = block.weights[key].clone()
        weight[rows] = _each_head(weight[rows].double().T, inner).T.to(weight.dtype)
        changes = {key: weight}
        if bias in block.weights:
            shift = block.weights[bias].clone()
            turned = _each_head(shift[rows].double(), inner)
            shift[rows] = turned.to(block.stored).to(shift.dtype)
            changes[bias] = shift
        changes[out] = _each_head(block.weights[out].double(), inner).to(weight.dtype)
        return block.with_weights(changes)


@dataclass(frozen=True)
class Rotate:
    """The stage: the residual stream in another basis, and what the finished model rotates."""

    method: QuaRot

    def planned(self, outline: Outline) -> Outline:
        method, described = self.method, outline.described
        self._check(outline)

        def widths(i: int) -> dict[str, int]:
            return {n: width for n, (_, width) in outline.kind(i).linears.items()}

        return replace(
            outline,
            rotated=outline.rotated or method.residual,
            online=self._rotations(described, widths),
            key_rotation=_of_keys(described) if method.keys and outline.kv else None,
        )

    def _check(self, outline: Outline) -> None:
        """Refuse sizes that cannot be rotated, with the option that leaves the rotation out."""
        config, described = outline.config, outline.described
        if self.method.residual:
            basis_of(described, config.hidden_size, outline.centred, config.model_type, seed=0)
        for kind in outline.kinds:
            for on, size, what, option in self._wanted(kind, outline.kv):
                if on:
                    try:
                        Rotation.hadamard(size, what)
                    except LowbitError as e:
                        raise LowbitError(
                            f"{str(e).rstrip('.')}: --set quarot.{option}=false leaves that "
                            "rotation out."
                        ) from e

    def _wanted(self, kind: Kind, kv: bool) -> list[tuple[bool, int, str, str]]:
        """The rotations of a kind of block: whether each is made, its size, of what, its option."""
        method, heads = self.method, kind.graph.heads
        wanted = [
            (method.online, kind.linears[name][1], f"the number of inputs of '{name}'", "online")
            for name in kind.graph.inner
        ]
        if heads is not None:
            across, width = method.online and method.across_heads, "the width of a head"
            wanted += [
                (across, heads.count, "the number of attention heads", "across_heads"),
                (method.heads, heads.width, width, "heads"),
                (method.keys and kv, heads.width, width, "keys"),
            ]
        return wanted

    def _rotations(
        self, described: Described, widths: Callable[[int], Mapping[str, int]]
    ) -> dict[str, Rotation]:
        """Full linear name -> rotation of its input while the model runs.

        Args:
            widths: block -> linear inside it -> inputs.
        """
        found: dict[str, Rotation] = {}
        made: dict[tuple[int, tuple[tuple[str, int], ...]], dict[str, Rotation]] = {}
        for i, kind in enumerate(described.of_layers):
            own = widths(i)
            key = (kind, tuple(own.items()))
            if key not in made:
                made[key] = self.method.online_rotations(described.graph(i), own)
            found |= {f"{described.block_name(i)}.{n}": r for n, r in made[key].items()}
        return found

    def __call__(self, model: Model) -> Model:
        source = model.source.rotated(model.seed) if self.method.residual else model.source
        keys = self.method.keys and model.kv is not None

        def widths(i: int) -> dict[str, int]:
            block = source.block_module(i)
            return {n: block.get_parameter(f"{n}.weight").shape[1] for n in source.graph(i).linears}

        return replace(
            model,
            source=source,
            online=self._rotations(source.described, widths),
            key_rotation=_of_keys(source.described) if keys else None,
        )


def _of_keys(described: Described) -> Rotation | None:
    """The rotation of queries and keys, one for all blocks that have them; None without.

    Raises:
        LowbitError: their heads differ.
    """
    widths = {
        None if graph.heads is None else graph.heads.width
        for graph in described.kinds
        if graph.attention is not None
    }
    if len(widths) > 1:
        raise LowbitError(
            "the heads of this model's blocks differ, and one rotation of keys would have to fit "
            "all of them: --set quarot.keys=false leaves that rotation out."
        )
    width = next(iter(widths), None)
    return None if width is None else Rotation.hadamard(width, "the width of a head")


def _of_head(heads: Heads) -> Rotation:
    return Rotation.hadamard(heads.width, "the width of a head")


def _without_norm(block: Block, heads: Heads) -> Block:
    """The block with the gain of a norm between attention and its output folded away."""
    if heads.norm is None:
        return block
    return block.with_weights(_norm_into(block, heads.norm, heads.output))


def _each_head(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head of (..., heads * width)."""
    return rotation(x.reshape(*x.shape[:-1], -1, rotation.size)).flatten(-2)


def _norm_into(block: Block, norm: str, linear: str) -> dict[str, Tensor]:
    """Move a norm's gain into the linear that reads it, so that rotations pass through the norm."""
    key, source = f"{norm}.weight", block.graph.site_of(linear).source
    offset = source.offset if source is not None and source.module == norm else 0.0
    gain = block.weights[key].double() + offset
    weight = block.weight(linear)
    return {
        key: (gain * 0 + 1 - offset).to(block.weights[key].dtype),
        f"{linear}.weight": (weight.double() * gain).to(weight.dtype),
    }


def _online(block: Block, linear: str, rotation: Rotation) -> Block:
    """Rotate a linear's input while the model runs and its weight once."""
    weight = block.weight(linear)
    block = block.with_weights({f"{linear}.weight": rotation(weight.double()).to(weight.dtype)})
    return block.with_input_quantizers(
        {linear: replace(block.input_quantizers.get(linear, InputQuantizer()), rotation=rotation)}
    )


def before(method: QuaRot, grid: AnyGrid) -> Rotate:
    """The stage that rotates what is the model's."""
    return Rotate(method)
