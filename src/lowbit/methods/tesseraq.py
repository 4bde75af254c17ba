"""TesseraQ (arXiv 2410.19103): progressive adaptive rounding with dequantization-scale tuning,
block by block.

Soft weights. Every weight lies between its two neighbouring levels; ranges are fixed before.

    w(nu, v) = ((c + h(nu)) - zero) * scale * 2 h(v)        h(x) = clamp(1.2 sigmoid(x) - 0.1, 0, 1)

with c the code below it, nu a variable of the weight that starts where w is the weight itself, and
v one of the group that starts at 0, where 2 h(v) = 1 (dequantization-scale tuning).

Progressive adaptive rounding. Phase k = 1 ... K first hardens, in each linear, all but a share P_k
of the weights, those whose h(nu) is farthest from 1/2: nu goes to + or - infinity for good. Then
Adam makes ``iters`` steps from fresh moments on the soft nu and all v, on

    || f(x; w) - f_q(xq; w(nu, v)) ||^2

f is the block, x the float stream, xq that of the quantized prefix. What is soft at the end is
rounded by the sign of nu. Shipped are c + [nu > 0], the zero point and scale * 2 h(v).

Beyond the paper, as options: further ``rounds`` between a code and either neighbour, the KL
divergence of the next token as ``objective`` of the last block, steps on the scales alone
(``refit``), other ``schedule``s, and ``precision`` of the steps.

Helpers: `_soft` (soft weights of a block, hardening), `_buckets` (those that lie in one matrix, on
any ordered grid), `_rounding` (h and Adam, compiled), `_reconstruct` (losses and their gradients).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..arithmetic import multiplies_bfloat16
from ..errors import LowbitError, unknown
from ..grid import AnyGrid, LinearGrid, OrderedGrid
from ..grid.triton_kernels import tried
from ..model.block import Block
from ..model.context import tokens_at_a_time
from ._reconstruct import JUDGED_ROWS, JUDGED_TOKENS, Objective, Reconstruction
from ._rounding import Adam, version_on
from ._soft import SoftBlock
from .cost import Cost, Shapes, Work
from .entry import Decisive

Precision = Literal["auto", "float32", "bfloat16"]

_PAPER_20 = (
    0.80,
    0.65,
    0.50,
    0.43,
    0.38,
    0.34,
    0.30,
    0.27,
    0.24,
    0.21,
    0.18,
    0.15,
    0.12,
    0.10,
    0.08,
    0.06,
    0.04,
    0.02,
    0.01,
    0.005,
)
_PAPER_10 = (0.75, 0.50, 0.375, 0.25, 0.125, 0.09, 0.06, 0.04, 0.02, 0.005)
_SCALE_DECAY = 1e-4  # L2 inside Adam on the scale variables, fixed in the published code
_RETRIES = 3
_PHASES = 10_000  # at most: each hardens some weights of a block for good


def soft_shares(schedule: str) -> tuple[float, ...]:
    """The share of weights still soft after each phase's hardening.

    Args:
        schedule: "handcrafted-20" or "handcrafted-10" as published, or "exponential-T-K" for exp(-T
            k / K), k = 1 ... K, K at most 10000.

    Raises:
        LowbitError: no such schedule.
    """
    if schedule == "handcrafted-20":
        return _PAPER_20
    if schedule == "handcrafted-10":
        return _PAPER_10
    parts = schedule.split("-")
    try:
        if (
            parts[0] == "exponential"
            and len(parts) == 3
            and 0 < float(parts[1]) < math.inf
            and 0 < int(parts[2]) <= _PHASES
        ):
            return tuple(
                math.exp(-float(parts[1]) * k / int(parts[2])) for k in range(1, int(parts[2]) + 1)
            )
    except ValueError:
        pass
    raise LowbitError(
        f"unknown schedule '{schedule}': use handcrafted-20, handcrafted-10 or exponential-T-K "
        "(for example exponential-4-20; "
        f"K at most {_PHASES})."
    )


@dataclass(frozen=True)
class TesseraQ:
    """The knobs of TesseraQ. The defaults are the preset `tesseraq`'s, in float32; the published
    ones are the preset `tesseraq-paper`.

    Attributes:
        schedule: hardening schedule, see `soft_shares`.
        iters: Adam steps per phase.
        lr: step size of rounding and scale variables alike. lr * iters, the distance a variable can
            travel in a phase, is what matters; 0.25 as published.
        batch: rows per step.
        tune_scale: dequantization-scale tuning.
        rounds: every further one runs the phases again, each weight between its code and the
            neighbour toward which the loss falls: so it may leave floor and ceiling behind.
        objective: "logits" tunes the last block on the KL divergence of the next-token distribution
            instead of on its hidden state, as published ("block").
        refit: steps on the scales alone after the last weight is frozen.
        precision: of the steps' forward and backward passes on blocks that compute in float32 or
            float16: "float32", "bfloat16", or "auto", which is bfloat16 where the processor
            multiplies it. Variables, gradients' sums, losses that decide and everything else stay.
        logits_tokens: how many tokens of a step that divergence is taken of, drawn anew for each
            step; 0 means all. Two products with the whole vocabulary are made of every one of them.
    """

    schedule: str = "exponential-5-50"
    iters: int = 12
    lr: float = 2e-2
    batch: int = 4
    tune_scale: bool = True
    rounds: int = 1
    objective: Objective = "logits"
    refit: int = 0
    precision: Precision = "float32"
    logits_tokens: int = 0

    def __post_init__(self) -> None:
        soft_shares(self.schedule)
        least = min(self.iters, self.batch, self.rounds)
        if least < 1 or not self.lr > 0 or min(self.refit, self.logits_tokens) < 0:
            raise LowbitError(
                "tesseraq needs iters >= 1, batch >= 1, lr > 0, rounds >= 1, logits_tokens >= 0 "
                "and refit >= 0."
            )
        if self.precision not in get_args(Precision):
            raise unknown("precision for tesseraq", self.precision, get_args(Precision))

    def in_bfloat16(self, device: torch.device) -> bool:
        """Whether steps of a float32 block are made in bfloat16 on a device."""
        return self.precision == "bfloat16" or (
            self.precision == "auto" and multiplies_bfloat16(device)
        )

    @property
    def steps(self) -> int:
        """Optimizer steps per block."""
        return len(soft_shares(self.schedule)) * self.iters * self.rounds + self.refit

    def __call__(self, block: Block) -> Block:
        stepped = self._stepped(block)
        soft = SoftBlock(stepped)
        job = Reconstruction(stepped, self.batch, self.objective, self.logits_tokens)
        judge = Reconstruction(block, self.batch, self.objective)
        before = judge.loss(soft.hard_weights())
        trouble: list[str] = []
        for round_ in range(self.rounds):
            if round_ or soft.from_codes:
                self._restart(soft, job, round_)
            shares = soft_shares(self.schedule)
            for phase, share in enumerate(shares, 1):
                block.announce(
                    f"tesseraq: round {round_ + 1}, phase {phase} of {len(shares)}, {share:.1%} "
                    "still soft"
                )
                soft.harden(share)
                if not self._phase(soft, job, trouble):
                    break
            soft.harden_all()
        if self.refit:
            block.announce(f"tesseraq: {self.refit} steps on the scales alone")
            self._refit(soft, job, trouble)
        after = judge.loss(soft.hard_weights())
        if not after < before:  # also when it is NaN: rather the start than something worse
            trouble.append(
                f"tuning ended at loss {after:.4g}, above the {before:.4g} it started from; kept "
                "the start"
            )
            soft = SoftBlock(block)
            after = before
        trouble += job.remarks + judge.remarks
        notes = {
            "objective": job.objective,
            "steps": str(stepped.compute),
            "before": before,
            "after": after,
        }
        return block.with_codes(soft.codes()).with_notes(tesseraq=notes).remarked(*trouble)

    def _stepped(self, block: Block) -> Block:
        """The block with the precision of its steps. None is made in float16, where gradients
        vanish.
        """
        if block.compute in (torch.float16, torch.float32) and self.in_bfloat16(block.device):
            return block.computing(torch.bfloat16)
        return block.computing(torch.float32) if block.compute == torch.float16 else block

    def _phase(self, soft: SoftBlock, job: Reconstruction, trouble: list[str]) -> bool:
        """Adam from fresh state. On a non-finite result: back to the phase's start with half the
        step size.
        """
        saved = soft.snapshot()
        lr = self.lr
        for _ in range(_RETRIES):
            if soft.finite(self._descend(soft, job, lr)):
                return True
            soft.restore(saved)
            lr /= 2
            trouble.append(f"non-finite loss; the phase was repeated with lr {lr:g}")
        trouble.append("still not finite: the remaining weights were rounded as they stood")
        return False

    def _descend(self, soft: SoftBlock, job: Reconstruction, lr: float) -> Tensor:
        soft.start()
        adam, decay = Adam(lr), _SCALE_DECAY if self.tune_scale else None
        total = torch.zeros((), device=soft.block.device)
        for _ in range(self.iters):
            adam = adam.next()
            # Stays on the device: no step waits for the host.
            total += self._step(soft, job, adam, decay)
        return total

    def _step(
        self, soft: SoftBlock, job: Reconstruction, adam: Adam, decay: float | None
    ) -> Tensor:
        with torch.no_grad():
            weights = soft.weights()
        loss, gradients = job.gradients(weights, soft.keys, job.draw())
        soft.descend(gradients, adam, decay)
        return loss

    def _refit(self, soft: SoftBlock, job: Reconstruction, trouble: list[str]) -> None:
        """The scales alone, all codes frozen, with a step size that falls to zero."""
        saved = soft.snapshot()
        soft.start()
        adam = Adam(self.lr / 4)
        for step in range(self.refit):
            adam = adam.next(self.lr / 4 * (1 - step / self.refit))
            self._step(soft, job, adam, 0.0)
        if not soft.finite():
            soft.restore(saved)
            trouble.append("non-finite loss while refitting scales; kept those before it")

    def _restart(self, soft: SoftBlock, job: Reconstruction, round_: int) -> None:
        """Prepare another round: first derivatives at the hard codes, second ones by random probes
        (Gauss-Newton).
        """
        hard = soft.hard_weights()
        gradient = {k: torch.zeros_like(hard[k]) for k in soft.keys}
        curvature = {k: torch.zeros_like(hard[k]) for k in soft.keys}
        generator = torch.Generator(soft.block.device).manual_seed(soft.block.seed + round_)
        for at in range(0, soft.block.tuned_rows, job.batch):
            rows = torch.arange(at, min(at + job.batch, soft.block.tuned_rows))
            for key, first, second in zip(
                soft.keys, *job.derivatives(hard, soft.keys, rows, generator), strict=True
            ):
                gradient[key] += first
                curvature[key] += second.pow(2)
        soft.aim(gradient, curvature)


# Bytes that pass memory for every weight, temporaries included: in a step, the weights made and
# their variables moved; in a phase, distances, bins, histogram, masks, none of which are written by
# Triton's kernels.
_STEP, _HARDEN, _HARDEN_FUSED = 36, 80, 24
_BINNED = 1 << 16  # counts of a linear's distances that are added over processes
# For every logit of a step: the softmax of both models in float32, the divergence, its gradient.
_LOGITS = 44


def cost(method: TesseraQ, shapes: Shapes) -> Cost:
    """Per weight: nu and its two moments, a code and the way to the other, a snapshot; where levels
    are looked up, both codes as indices and both levels. Of these a process has its part; soft
    weights and their gradients it has all. Then the readout of the last block, five times the
    logits that are made together.
    """
    layer, rows, batch = shapes.layer, shapes.rows, method.batch
    # Where there are several machines, each makes the same steps.
    near = rows.near
    held = (18 if isinstance(shapes.grid, LinearGrid) else 48) * layer.weights
    own = math.ceil(near.part(held))
    # Of several processes the gradients are laid side by side in float32 before they are added.
    apart = 0 if near.alone else 4 * layer.weights
    read = 0
    if method.objective == "logits":
        together = min(tokens_at_a_time(layer.vocab), rows.tokens(JUDGED_TOKENS))
        read = 5 * 4 * layer.vocab * together
    stepping = shapes.training(batch) + read
    return Cost(
        held=own + 2 * rows.compute * layer.weights + apart + stepping,
        least=own + 2 * 2 * layer.weights + apart,  # soft weights and gradients in 16 bits
        batch=batch,
        last=_logits_work(method, shapes) if method.objective == "logits" else Work(),
        parts=_parts(method, shapes),
    )


def _parts(method: TesseraQ, shapes: Shapes) -> dict[str, Work]:
    layer, rows, near = shapes.layer, shapes.rows, shapes.rows.near
    # None are made in float16.
    half = shapes.compute == torch.bfloat16 or method.in_bfloat16(shapes.device)
    # Forward, and twice that back.
    steps = shapes.forward(near.mine(method.batch), half) * (3 * method.steps)
    drawn = 2.0 * min(method.batch, rows.count) * rows.length * layer.passed * rows.stored
    phases = len(soft_shares(method.schedule)) * method.rounds
    made, gradients = 2.0 if half else rows.compute, 4.0  # bytes of a weight
    exchanged = near.gathered((made + gradients) * layer.weights) + rows.summed(drawn)
    if not near.alone:  # gradients side by side
        exchanged += Work(moved=(made + gradients) * layer.weights)
    binned = near.summed(8.0 * _BINNED * len(layer.linears))
    moved = Work(moved=near.part(layer.weights))
    hardened = _HARDEN_FUSED if tried(shapes.device) else _HARDEN
    return {
        "steps": steps,
        "exchange of steps": exchanged * method.steps,
        "soft weights": moved * (_STEP * method.steps),
        "hardening": moved * (hardened * phases) + binned * phases,
        "judging": shapes.forward(2 * shapes.learned(JUDGED_ROWS)),
    }


def _logits_work(method: TesseraQ, shapes: Shapes) -> Work:
    """What tuning the last block on its logits adds: two products with the head forward, one back,
    and passes over the logits.
    """
    each = shapes.rows.length
    if method.logits_tokens:
        each = min(each, max(1, method.logits_tokens // method.batch))
    tokens = shapes.rows.near.mine(method.batch) * each * method.steps
    logits = float(tokens) * shapes.layer.vocab
    # The readout has the precision of forward passes, whatever that of the steps.
    return shapes.products(6.0 * logits * shapes.layer.hidden) + Work(moved=_LOGITS * logits)


def check(method: TesseraQ, grid: AnyGrid) -> None:
    """Refuse a grid whose codes have no neighbours."""
    if not isinstance(grid, OrderedGrid):
        raise LowbitError(
            f"tesseraq rounds between neighbouring codes, and those of {grid} have no order: "
            "choose another recipe or scheme."
        )


def decides(method: TesseraQ, device: torch.device) -> Decisive:
    """The precision of the steps, which may follow from the processor; the version of soft
    rounding.
    """
    return Decisive(
        bfloat16_steps=method.in_bfloat16(device), gradients=True, rounding=version_on(device)
    )
