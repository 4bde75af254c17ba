"""OmniQuant (arXiv 2308.13137): learned clipping of the weights' ranges and learned equivalent
scaling of activations.

Not included: the learned scale between queries and keys and the quantized inputs of attention's
products, which the authors add where they quantize those.

Learnable weight clipping (LWC, section 3.2) shrinks both ends of every group's range by a sigmoid
of a logit. Learnable equivalent transformation (LET, section 3.3) divides a site's activation by a
learned factor per channel, after taking a learned shift off it where biases can carry it. Both are
trained on the block's output, then folded away; the codes are the nearest ones unless a solver
comes after.
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
from ..grid import Affine, AffineParams
from ..model.block import Block
from ..model.rewrite import fold
from ..model.wiring import Site
from ._batches import shared
from ._reconstruct import Reconstruction
from .awq import foldable
from .smoothquant import channel_ranges, smoothing

_START = 4.0  # of the logits: sigmoid 0.982
_LEAST_FACTOR = 1e-2
_LEAST_SCALE = 1e-5

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
        bits = min(block.grids[n].bits for n in block.wiring.linears)
        learned = _Learned(block, self._sites(block), self.alpha)
        if not learned.clips() and not learned.transforms():
            raise LowbitError(
                "omniquant has nothing to learn: all ranges are fixed by the methods before it, "
                "and activations stay in floating point. "
                "Leave it out, or put it first."
            )
        second = self.second_loss == "on" or (self.second_loss == "auto" and bits <= 2)
        judge = Reconstruction(block, self.batch)
        with torch.no_grad():
            before = judge.loss(learned.weights())
        remarks = self._train(block, learned, second, (self.epochs or (40 if bits <= 2 else 20)))
        with torch.no_grad():
            after = judge.loss(learned.weights())
        notes = {"omniquant": {"before": before, "after": after}}
        remarks += judge.remarks
        if not after < before:
            learned = _Learned(block, self._sites(block), self.alpha)
            remarks.append(
                f"omniquant ended at loss {after:.4g} from {before:.4g}; kept what it started from"
            )
        trouble = {"trouble": [*block.notes.get("trouble", []), *remarks]} if remarks else {}
        return learned.folded(block).noted(**notes, **trouble)

    def _sites(self, block: Block) -> tuple[Site, ...]:
        quantized = any(r.grid is not None for r in block.readings.values())
        if self.transform == "off" or (self.transform == "auto" and not quantized):
            return ()
        able = [s for s in block.wiring.sites if s.source is not None and foldable(block, s)]
        return tuple(
            s
            for s in able
            if s.source is not None and (s is not block.wiring.sites[-1] or s.source.kind == "norm")
        )

    def _train(self, block: Block, learned: _Learned, second: bool, epochs: int) -> list[str]:
        """Learn; what became of the batch where memory ran out."""
        groups: list[dict[str, Any]] = [
            {"params": learned.clips(), "lr": self.clip_lr},
            {"params": learned.transforms(), "lr": self.transform_lr},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        # Float16 loses gradients.
        job = Reconstruction(
            block.computing(torch.bfloat16) if block.compute == torch.float16 else block, self.batch
        )
        own = block.exact().run(block.xq) if second else None
        rows = torch.arange(block.tuned_rows)
        for epoch in range(epochs):
            block.announce(f"omniquant: epoch {epoch + 1} of {epochs}")
            for picked in torch.split(rows, self.batch):
                others = [] if own is None else shared(block.ranks, picked, (own,), block.device)

                def loss(
                    y: Tensor,
                    target: Tensor,
                    part: slice,
                    others: list[Tensor] = others,
                    rows: int = len(picked),
                ) -> Tensor:
                    wanted = [target, *(t[part].to(y.device, y.dtype) for t in others)]
                    return torch.stack([_part_of_mean((y - t).pow(2), rows) for t in wanted]).sum()

                job.backward(learned.weights, picked, loss, optimizer.zero_grad)
                block.ranks.sum_(
                    *(p.grad for g in groups for p in g["params"] if p.grad is not None)
                )
                optimizer.step()
        return job.remarks


def _part_of_mean(errors: Tensor, rows: int) -> Tensor:
    """What this rank's part (n, length, hidden) of a batch adds to the mean over all its ``rows``;
    n may be 0.
    """
    return errors.mean() * (len(errors) / rows) if len(errors) else errors.sum()


class _Learned:
    """The variables of one block, and its weights as they make them."""

    def __init__(self, block: Block, sites: tuple[Site, ...], alpha: float) -> None:
        self.block, self.sites = block, sites
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        for name in block.wiring.linears:
            if name not in block.coded and name not in block.params:
                rows, columns = block.weight(name).shape
                shape = (rows, columns // block.affine(name, "omniquant").group(columns))
                self.low[name], self.high[name] = (
                    torch.full(shape, _START, device=block.device).requires_grad_()
                    for _ in range(2)
                )
        self.factor: dict[str, Tensor] = {}
        self.shift: dict[str, Tensor] = {}
        ranges = channel_ranges(block, [s.reads[0] for s in sites], block.tuned_rows)
        for site in sites:
            key, (low, high) = site.reads[0], ranges[site.reads[0]]
            if shiftable(block, site):
                self.shift[key] = ((low + high) / 2).float().requires_grad_()
                low, high = low - (low + high) / 2, high - (low + high) / 2
            weights = torch.stack([block.weight(n).abs().amax(0) for n in site.reads]).amax(0)
            start = (
                smoothing(torch.maximum(-low, high), weights, alpha)
                .float()
                .clamp(min=_LEAST_FACTOR)
            )
            self.factor[key] = start.requires_grad_()

    def clips(self) -> list[Tensor]:
        return [*self.low.values(), *self.high.values()]

    def transforms(self) -> list[Tensor]:
        return [*self.factor.values(), *self.shift.values()]

    def _transformed(self) -> dict[str, Tensor]:
        """The block's parameters after the transformation; differentiable. The same rewriting as
        `fold`.
        """
        out = dict(self.block.weights)
        offset = self.block.wiring.norm_offset
        for site in self.sites:
            source, factor = site.source, self.factor[site.reads[0]].clamp(min=_LEAST_FACTOR)
            shift = self.shift.get(site.reads[0])
            assert source is not None
            key, bias = f"{source.module}.weight", f"{source.module}.bias"
            rows = slice(*source.rows) if source.rows else slice(None)
            if source.kind == "norm":
                out[key] = (out[key] + offset) / factor - offset
            else:
                scale = torch.ones(len(out[key]), device=factor.device).index_put(
                    (torch.arange(len(out[key]), device=factor.device)[rows],), factor
                )
                out[key] = out[key] / scale[:, None]
            if bias in out:
                taken = 0.0 if shift is None else shift
                part = (out[bias][rows] - taken) / factor
                out[bias] = (
                    part
                    if part.shape == out[bias].shape
                    else torch.cat([out[bias][: rows.start], part, out[bias][rows.stop :]])
                )
            for name in site.reads:
                if shift is not None:
                    out[f"{name}.bias"] = out[f"{name}.bias"] + out[f"{name}.weight"] @ shift
                out[f"{name}.weight"] = out[f"{name}.weight"] * factor
        return out

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters, linears on their grids; straight-through where something is
        rounded.
        """
        out = self._transformed()
        for name in self.block.wiring.linears:
            key, grid = f"{name}.weight", self.block.affine(name, "omniquant")
            if name in self.low:
                scale, zero = clipped_range(out[key], grid, self.low[name], self.high[name])
                scale = _straight(scale, scale.to(self.block.stored).to(scale.dtype))
            else:
                fixed = self.block.range_of(name)
                scale, zero = fixed.scale, fixed.zero_point
            g = grid.grouped(out[key])
            codes = (
                _straight(g / scale[..., None], (g / scale[..., None]).round()) + zero[..., None]
            ).clamp(0, grid.top)
            out[key] = ((codes - zero[..., None]) * scale[..., None]).flatten(1)
        return out

    @torch.no_grad()
    def folded(self, block: Block) -> Block:
        """The block with the transformation folded in and the learned ranges fixed."""
        for site in self.sites:
            shift = self.shift.get(site.reads[0])
            block = fold(block, site, self.factor[site.reads[0]].clamp(min=_LEAST_FACTOR), shift)
        params = {}
        for name, low in self.low.items():
            scale, zero = clipped_range(
                block.weight(name), block.affine(name, "omniquant"), low, self.high[name]
            )
            params[name] = AffineParams(scale, zero)
        return block.ranged(params)


def _straight(smooth: Tensor, rounded: Tensor) -> Tensor:
    return smooth + (rounded - smooth).detach()


def shiftable(block: Block, site: Site) -> bool:
    """Whether a shift can be taken off a site's activation: its source and all its readers have
    biases.
    """
    assert site.source is not None
    return all(f"{n}.bias" in block.weights for n in (site.source.module, *site.reads))


def clipped_range(weight: Tensor, grid: Affine, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, (out, groups) each, of the range [sigmoid(low) * min, sigmoid(high) *
    max]; differentiable.

    Args:
        weight: (out, in). low, high: (out, groups) logits.
    """
    g = grid.grouped(weight)
    bottom, top = (
        g.amin(-1).clamp(max=0) * torch.sigmoid(low),
        g.amax(-1).clamp(min=0) * torch.sigmoid(high),
    )
    if grid.symmetric:
        half = 2 ** (grid.bits - 1)
        scale = torch.maximum(-bottom, top).clamp(min=_LEAST_SCALE) / (half - 1)
        return scale, torch.full_like(scale, half)
    scale = (top - bottom).clamp(min=_LEAST_SCALE) / grid.top
    zero = -bottom / scale
    return scale, _straight(zero, zero.round()).clamp(0, grid.top)


def read_clips(block: Block, path: Path) -> Block:
    """The block with the ranges that the authors' clipping logits describe.

    Raises:
        LowbitError: no such file, or a tensor is missing or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    number = block.name.rsplit(".", 1)[1]
    params: dict[str, AffineParams] = {}
    try:
        with safe_open(path, framework="pt") as f:
            names = [k for k in f.keys() if k.startswith(f"{number}.")]  # noqa: SIM118
            held: Mapping[str, Tensor] = {k: f.get_tensor(k) for k in names}
    except (OSError, SafetensorError) as e:
        raise LowbitError(f"omniquant.clips: '{path}' cannot be read as safetensors: {e}") from e
    for name in block.wiring.linears:
        weight, grid = block.weight(name), block.affine(name, "omniquant")
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
        scale, zero = clipped_range(weight, grid, *logits)
        params[name] = AffineParams(scale, zero)
    return block.ranged(params)


def steps(epochs: int, rows: int, batch: int) -> int:
    """Optimizer steps per block."""
    return epochs * math.ceil(rows / batch)
