"""OmniQuant (arXiv 2308.13137): learned clipping of the weights' ranges and learned equivalent
scaling of activations.

Learnable weight clipping (LWC, section 3.2) shrinks both ends of every group's range,

    [sigmoid(low) min(w), sigmoid(high) max(w)]

Learnable equivalent transformation (LET, section 3.3) divides a site's activation by a learned
factor s per channel, after taking a learned shift d off it where biases can carry it:

    x <- (x - d) / s,    W <- W diag(s),    b <- b + W d

Both are trained by AdamW on the block's output, then folded away; the codes are the nearest ones
unless a solver comes after. Rounding passes gradients straight through.

Not included: the learned scale between queries and keys and the quantized inputs of attention's
products, which the authors add where they quantize those.

Helpers: `_learned` (the variables, and the weights as they make them), `_reconstruct` (the loss),
`_equivalent` (where a factor can go, SmoothQuant's factor as the start).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import AnyGrid, Params, RangedGrid
from ..model.block import Block
from ..model.graph import Site
from ..model.model import Model
from ..model.outline import Outline
from ._equivalent import foldable
from ._learned import Learned, clipped_range, ranged
from ._reconstruct import Reconstruction
from .cost import Cost, Shapes
from .entry import Decisive

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class OmniQuant:
    """The knobs of OmniQuant; the defaults are the published ones.

    Attributes:
        epochs: passes over the calibration rows; 0 means 40 at 2 bits and 20 otherwise.
        clip_lr, transform_lr: AdamW step sizes of the clipping logits and of the transformation.
        transform: LET; "auto" learns it where activations are quantized.
        alpha: LET starts from max|x|**alpha / max|w|**(1 - alpha).
        second_loss: also pull toward the float block's output on the quantized stream; "auto" does
            so at 2 bits.
        batch: rows per step.
        clips: a safetensors copy of the authors' `omni_parameters`, with keys
            "BLOCK.LINEAR.weight_quantizer.upbound_factor" and "...lowbound_factor" holding logits:
            nothing is learned, these ranges are taken. "" learns them.
    """

    epochs: int = 0
    clip_lr: float = 1e-2
    transform_lr: float = 5e-3
    transform: Switch = "auto"
    alpha: float = 0.5
    second_loss: Switch = "auto"
    batch: int = 1
    clips: str = ""

    def __post_init__(self) -> None:
        if (
            self.epochs < 0
            or self.batch < 1
            or not self.clip_lr > 0
            or not self.transform_lr > 0
            or not 0 <= self.alpha <= 1
        ):
            raise LowbitError(
                "omniquant needs epochs >= 0, batch >= 1, clip_lr > 0, transform_lr > 0 and alpha "
                "in [0, 1]."
            )

    def __call__(self, block: Block) -> Block:
        if self.clips:
            return read_clips(block, Path(self.clips))
        bits = min(block.grids[n].bits for n in block.graph.linears)
        learned = Learned(block, self._sites(block), self.alpha)
        if not learned.clips() and not learned.transforms():
            raise LowbitError(
                "omniquant has nothing to learn: all ranges are fixed by the methods before it, "
                "and activations stay in floating point. "
                "Leave it out, or put it first."
            )
        second = self.looks_twice(bits)
        judge = Reconstruction(block, self.batch)
        with torch.no_grad():
            before = judge.loss(learned.weights())
        remarks = self._train(block, learned, second, self.passes(bits))
        with torch.no_grad():
            after = judge.loss(learned.weights())
        notes = {"omniquant": {"before": before, "after": after}}
        remarks += judge.remarks
        if not after < before:
            learned = Learned(block, self._sites(block), self.alpha)
            remarks.append(
                f"omniquant ended at loss {after:.4g} from {before:.4g}; kept what it started from"
            )
        return learned.folded(block).with_notes(**notes).remarked(*remarks)

    def passes(self, bits: int) -> int:
        """Epochs at so many bits."""
        return self.epochs or (40 if bits <= 2 else 20)

    def looks_twice(self, bits: int) -> bool:
        """Whether the second loss is used at so many bits."""
        return self.second_loss == "on" or (self.second_loss == "auto" and bits <= 2)

    def _sites(self, block: Block) -> tuple[Site, ...]:
        quantized = any(r.grid is not None for r in block.input_quantizers.values())
        if self.transform == "off" or (self.transform == "auto" and not quantized):
            return ()
        able = [s for s in block.graph.sites if s.source is not None and foldable(block, s)]
        return tuple(
            s
            for s in able
            if s.source is not None
            and (s.source.kind == "norm" or set(s.reads).isdisjoint(block.graph.inner))
        )

    def _train(self, block: Block, learned: Learned, second: bool, epochs: int) -> list[str]:
        """Learn; what became of the batch where memory ran out."""
        groups: list[dict[str, Any]] = [
            {"params": learned.clips(), "lr": self.clip_lr},
            {"params": learned.transforms(), "lr": self.transform_lr},
        ]
        leaves = [p for g in groups for p in g["params"]]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        # Float16 loses gradients.
        job = Reconstruction(
            block.computing(torch.bfloat16) if block.compute == torch.float16 else block, self.batch
        )
        own = block.exact().run(block.xq, given=block.context.given_q) if second else None
        rows = torch.arange(block.tuned_rows)
        for epoch in range(epochs):
            block.announce(f"omniquant: epoch {epoch + 1} of {epochs}")
            for picked in torch.split(rows, self.batch):
                others = [] if own is None else [job.share(picked, own)]

                def loss(
                    y: Tensor,
                    target: Tensor,
                    part: slice,
                    others: list[Tensor] = others,
                    rows: int = len(picked),
                ) -> Tensor:
                    wanted = [target, *(t[part].to(y.device, y.dtype) for t in others)]
                    return torch.stack([_part_of_mean((y - t).pow(2), rows) for t in wanted]).sum()

                job.backward(learned.weights, leaves, picked, loss)
                optimizer.step()
        return job.remarks


def _part_of_mean(errors: Tensor, rows: int) -> Tensor:
    """What a part (n, length, hidden) of a batch adds to the mean over all the batch's ``rows``;
    n may be 0.
    """
    return errors.mean() * (len(errors) / rows) if len(errors) else errors.sum()


def read_clips(block: Block, path: Path) -> Block:
    """The block with the ranges that the authors' clipping logits describe.

    Raises:
        LowbitError: no such file, or a tensor is missing or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    number = block.name.rsplit(".", 1)[1]
    params: dict[str, Params] = {}
    try:
        with safe_open(path, framework="pt") as f:
            names = [k for k in f.keys() if k.startswith(f"{number}.")]  # noqa: SIM118
            held: Mapping[str, Tensor] = {k: f.get_tensor(k) for k in names}
    except (OSError, SafetensorError) as e:
        raise LowbitError(f"omniquant.clips: '{path}' cannot be read as safetensors: {e}") from e
    for name in block.graph.linears:
        weight, grid = block.weight(name), ranged(block, name)
        groups = weight.shape[1] // grid.group(weight.shape[1])
        logits = []
        for end in ("lowbound_factor", "upbound_factor"):
            key = f"{number}.{name}.weight_quantizer.{end}"
            if key not in held:
                raise LowbitError(f"omniquant.clips: '{path}' has no tensor '{key}'.")
            if held[key].numel() != len(weight) * groups:
                raise LowbitError(
                    f"omniquant.clips: '{key}' has {held[key].numel()} values, {len(weight)} rows "
                    f"of {groups} groups need {len(weight) * groups}: "
                    "it was learned for another scheme or model."
                )
            logits.append(held[key].float().reshape(len(weight), groups).to(block.device))
        params[name] = clipped_range(weight, grid, *logits)
    return block.with_params(params)


_OPTIMIZER = 80 << 20  # what torch loads (its compiler) when an optimizer takes its first step


def cost(method: OmniQuant, shapes: Shapes) -> Cost:
    """Weights, their gradients and what the transformation makes of them; 4.5 forward passes a
    step.
    """
    if method.clips:
        return Cost(held=40 * shapes.layer.weights)
    bits, batch = shapes.grid.bits, method.batch
    steps = method.passes(bits) * math.ceil(shapes.tuned / batch)
    return Cost(
        held=40 * shapes.layer.weights + shapes.training(batch),
        least=2 * shapes.rows.compute * shapes.layer.weights,
        streams=int(method.looks_twice(bits)),
        libraries=_OPTIMIZER,
        batch=batch,
        work=shapes.forward(shapes.rows.mine(batch)) * (4.5 * steps),
    )


def check(method: OmniQuant, grid: AnyGrid) -> None:
    """Refuse a grid without ranges."""
    if not isinstance(grid, RangedGrid):
        raise LowbitError(
            f"omniquant learns ranges of uniform grids, and {grid} has none: choose another recipe "
            "or scheme."
        )


@dataclass(frozen=True)
class Clips:
    """The stage: a file of ranges that has to be there."""

    path: Path

    def planned(self, outline: Outline) -> Outline:
        if not self.path.is_file():
            raise LowbitError(f"omniquant.clips: no such file: '{self.path}'.")
        return outline

    def __call__(self, model: Model) -> Model:
        return model


def before(method: OmniQuant, grid: AnyGrid) -> Clips | None:
    """The stage that wants the file of `OmniQuant.clips`."""
    return Clips(Path(method.clips)) if method.clips else None


def decides(method: OmniQuant, device: torch.device) -> Decisive:
    """The file that decides the result, instead of steps."""
    return Decisive(files=(method.clips,) if method.clips else (), gradients=not method.clips)
