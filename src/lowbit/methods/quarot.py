"""QuaRot (arXiv 2404.00456): Hadamard rotations that spread outlier channels, so that activations
and caches quantize well.

The rotation of the residual stream is the model's (`ModelStream.rotated`), since embedding and head
take part in it; here are the rotations inside a block. Rotating queries and keys is done where the
cache is quantized, see `lowbit.grid.KVGrid`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import LowbitError
from ..grid import KVGrid, Reading, Rotation
from ..model.block import Block
from ..model.wiring import Heads, Wiring


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

    def check(self, wiring: Wiring, inner: int, kv: bool) -> None:
        """Refuse sizes that cannot be rotated, before any work.

        Args:
            inner: inputs of the block's last linear. kv: keys are quantized.

        Raises:
            LowbitError: naming the size, with the option that leaves its rotation out.
        """
        heads = wiring.heads
        wanted = [
            (self.online, inner, f"the number of inputs of '{wiring.sites[-1].reads[0]}'", "online")
        ]
        if heads is not None:
            wanted += [
                (
                    self.online and self.across_heads,
                    heads.count,
                    "the number of attention heads",
                    "across_heads",
                ),
                (self.heads, heads.width, "the width of a head", "heads"),
                (self.keys and kv, heads.width, "the width of a head", "keys"),
            ]
        for on, size, what, option in wanted:
            if on:
                try:
                    Rotation.hadamard(size, what)
                except LowbitError as e:
                    raise LowbitError(
                        f"{str(e).rstrip('.')}: --set quarot.{option}=false leaves that rotation "
                        "out."
                    ) from e

    def __call__(self, block: Block) -> Block:
        heads = block.wiring.heads
        if heads is not None and (self.heads or (self.online and self.across_heads)):
            block = self._rotate_values(block, heads)
        if self.online:
            last = block.wiring.sites[-1]
            size = block.weight(last.reads[0]).shape[1]
            block = _online(
                block,
                last.reads[0],
                Rotation.hadamard(size, f"the number of inputs of '{last.reads[0]}'"),
            )
        if self.keys and block.kv is not None and heads is not None:
            block = replace(
                block,
                kv=KVGrid(block.kv.grid, Rotation.hadamard(heads.width, "the width of a head")),
            )
        return block

    def _rotate_values(self, block: Block, heads: Heads) -> Block:
        if heads.norm is not None:
            block = block.with_weights(_norm_into(block, heads.norm, heads.output))
        if self.heads:
            inner = Rotation.hadamard(heads.width, "the width of a head")
            rows = slice(*heads.values.rows) if heads.values.rows else slice(None)
            key, bias, out = (
                f"{heads.values.module}.weight",
                f"{heads.values.module}.bias",
                f"{heads.output}.weight",
            )
            weight = block.weights[key].clone()
            weight[rows] = _each_head(weight[rows].double().T, inner).T.to(weight.dtype)
            changes = {key: weight}
            if bias in block.weights:
                shift = block.weights[bias].clone()
                shift[rows] = (
                    _each_head(shift[rows].double(), inner).to(block.stored).to(shift.dtype)
                )
                changes[bias] = shift
            changes[out] = _each_head(block.weights[out].double(), inner).to(weight.dtype)
            block = block.with_weights(changes)
        mixed = self.online and self.across_heads and heads.count > 1
        return (
            _online(block, heads.output, Rotation.across_heads(heads.count, heads.width))
            if mixed
            else block
        )


def _each_head(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every head of (..., heads * width)."""
    return rotation(x.reshape(*x.shape[:-1], -1, rotation.size)).flatten(-2)


def _norm_into(block: Block, norm: str, linear: str) -> dict[str, Tensor]:
    """Move a norm's gain into the linear that reads it, so that rotations pass through the norm."""
    key, offset = f"{norm}.weight", block.wiring.norm_offset
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
    return block.with_readings(
        {linear: replace(block.readings.get(linear, Reading()), rotation=rotation)}
    )
