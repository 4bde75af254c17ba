"""What a site's inputs are to the column loop: their Hessian, inverted and factored; and the walk
from site to site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import LowbitError
from ..grid import QTensor
from ..grid.kmeans import NotFiniteError
from ..model.block import Block, Call
from ._columns import inverse_factor

_RETRIES = 3
_LEAST_RETRIED_DAMPING = 1e-2
# Bytes of calls kept for the next site, so that it need not run the block from its start.
_KEPT = 1 << 28


@dataclass(frozen=True)
class Kept:
    """What a submodule was called with on the calibration rows; of use as long as nothing before it
    changes.
    """

    part: str
    calls: list[Call]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a site, in the order in which their columns are coded.

    Attributes:
        factor: (in, in) float64 from `inverse_factor`, inputs in coding order.
        order: (in,) int64, the inputs in coding order.
        dead: (in,) bool, inputs in their own order that are always zero.
    """

    factor: Tensor
    order: Tensor
    dead: Tensor


SolveSite = Callable[[Block, Sequence[str], Inputs], Mapping[str, QTensor]]
NearestSite = Callable[[Block, str], QTensor]


def solve_sites(
    block: Block,
    method: str,
    rows: int,
    damping: float,
    act_order: bool,
    true_sequential: bool,
    solve: SolveSite,
    nearest: NearestSite,
) -> Block:
    """Code all linears that are not coded yet, site by site, each on the Hessian of its inputs.

    Args:
        method: its name, for remarks and errors.
        rows: calibration rows used, at most; 0 means all.
        true_sequential: collect the inputs of a site after the sites before it are coded; otherwise
            in one pass before any.
        solve: codes for linears that read the same inputs. nearest: for a linear that sees nothing
            but zeros.

    Raises:
        LowbitError: a Hessian is not finite, or not invertible with any damping tried; what was
            compensated for ran away.
    """
    rows = min(rows or block.tuned_rows, block.tuned_rows)
    free = [tuple(n for n in site.reads if n not in block.coded) for site in block.wiring.sites]
    steps = [[names] for names in free if names]
    parts = {
        names[0]: site.probe for names, site in zip(free, block.wiring.sites, strict=True) if names
    }
    kept: Kept | None = None
    if not true_sequential:
        steps = [[names for step in steps for names in step]] if steps else []
    trouble: list[str] = []
    for number, step in enumerate(steps, 1):
        after = steps[number] if number < len(steps) else []
        block.announce(f"{method}: inputs of {', '.join(name for names in step for name in names)}")
        fresh = None  # nothing to save at the first site: little runs before it
        if (
            after
            and after[0][0].startswith(f"{(part := parts[step[0][0]])}.")
            and step[0][0] not in block.wiring.sites[0].reads
        ):
            size = (
                rows
                * block.xq.shape[1]
                * block.weight(step[0][0]).shape[1]
                * block.compute.itemsize
            )
            fresh = Kept(part, []) if size <= _KEPT else None
        hessians = input_hessians(block, [names[0] for names in step], rows, kept, fresh)
        kept = fresh
        for names in step:
            block.announce(f"{method}: codes of {', '.join(names)}")
            inputs = factored(
                block, method, names[0], hessians.pop(names[0]), damping, act_order, trouble
            )
            try:
                found = (
                    {n: nearest(block, n) for n in names}
                    if inputs is None
                    else solve(block, names, inputs)
                )
                block = block.ranged({n: q.params for n, q in found.items()}).solved(found)
            except NotFiniteError as e:
                raise LowbitError(
                    f"'{block.name}.{names[0]}' and what reads the same inputs: {e}. Calibrate on "
                    f"more rows, or raise {method}.damping."
                ) from e
    return block.noted(trouble=[*block.notes.get("trouble", ()), *trouble]) if trouble else block


def factored(
    block: Block,
    method: str,
    first: str,
    hessian: Tensor,
    damping: float,
    act_order: bool,
    trouble: list[str],
) -> Inputs | None:
    """The (inputs, inputs) Hessian of a site made ready; None if its inputs are all zero, which is
    remarked.
    """
    label = f"{block.name}.{first}"
    if not bool(torch.isfinite(hessian).all()):
        raise LowbitError(
            f"the inputs of '{label}' are not finite on the calibration rows: nothing can be "
            "learned from them. "
            "See whether 'lowbit eval' finds the float model's perplexity finite."
        )
    if not bool(hessian.any()):
        trouble.append(
            f"{method}: '{label}' saw no input but zeros; rounded to nearest what reads it"
        )
        return None
    # An input that is always zero is tied to no other: any positive diagonal will do for it, and
    # the mean of the living ones leaves the damping, a share of the mean, what it is without the
    # dead.
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    living = torch.where(dead, diagonal.sum() / (~dead).sum(), diagonal)
    inputs = torch.arange(len(living), device=living.device)
    order = living.argsort(descending=True, stable=True) if act_order else inputs
    return Inputs(
        _factor(hessian[order][:, order], living[order], damping, method, label, trouble),
        order,
        dead,
    )


def _factor(
    hessian: Tensor, diagonal: Tensor, damping: float, method: str, label: str, trouble: list[str]
) -> Tensor:
    """`inverse_factor` of a Hessian (changed in place) with a damped diagonal, ten times as much as
    often as it takes.
    """
    asked = damping
    failed: list[float] = []
    while len(failed) <= _RETRIES:
        hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor = inverse_factor(hessian)
        if factor is not None:
            if failed:
                trouble.append(
                    f"{method}: the Hessian of '{label}' could not be inverted with damping "
                    f"{asked:g}; took {damping:g}"
                )
            return factor
        failed.append(damping)
        damping = max(10 * damping, _LEAST_RETRIED_DAMPING)
    raise LowbitError(
        f"the Hessian of '{label}' could not be inverted, not even with damping {failed[-1]:g}: "
        f"calibrate on more rows, or raise {method}.damping."
    )


@torch.no_grad()
def input_hessians(
    block: Block,
    linears: Sequence[str],
    rows: int,
    kept: Kept | None = None,
    fresh: Kept | None = None,
) -> dict[str, Tensor]:
    """(2/n) sum x x^T over the n tokens that reach each linear (GPTQ, section 2), in float64.

    The tokens come from the first ``rows`` rows of the quantized stream, through the block with its
    coded weights decoded, and count as they meet the weight.

    Args:
        kept: calls of a submodule that holds all the linears, if only it is to run.
        fresh: gets the calls of its submodule.

    Returns:
        linear -> (inputs, inputs) on the block's device; zeros for a linear that no token reaches.
    """
    sums: dict[str, Tensor] = {}
    for name in linears:
        width = block.weight(name).shape[1]
        sums[name] = torch.zeros(width, width, dtype=torch.float64, device=block.device)
    seen: dict[str, float] = dict.fromkeys(linears, 0)

    def visit(name: str, call: Call) -> None:
        if fresh is not None and name == fresh.part:
            fresh.calls.append(call)
            return
        x = block.entering(name, call.args[0]).flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sums[name] += x.T @ x
        seen[name] += len(x)

    decoded = replace(block, weights=block.decoded())
    if kept is not None:
        decoded.observe_inside(kept.part, kept.calls, linears, visit)
    else:
        decoded.observe([*linears, *([fresh.part] if fresh else [])], block.xq, rows, visit)
    block.ranks.sum_(*sums.values())
    seen = dict(zip(seen, block.ranks.total(*seen.values()), strict=True))
    return {name: total * (2 / max(1, seen[name])) for name, total in sums.items()}
