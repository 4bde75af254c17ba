"""Which runtime will load what a run would make, in which format, and from which version on: one
file per runtime, no work done.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import LowbitError, unknown
from . import llama_cpp, mlx, sglang, transformers, vllm
from .base import Planned as Planned
from .base import Verdict as Verdict

TARGETS: dict[str, Callable[[Planned], Verdict]] = {
    "transformers": transformers.judge,
    "vllm": vllm.judge,
    "sglang": sglang.judge,
    "llama.cpp": llama_cpp.judge,
    "mlx": mlx.judge,
}
_PARALLEL = ("vllm", "sglang")


def verdicts(planned: Planned) -> tuple[Verdict, ...]:
    """What every runtime says; the number of devices counts for those that share linears among
    them.
    """
    return tuple(judge(planned) for judge in TARGETS.values())


def check_target(name: str, tensor_parallel: int = 1) -> str:
    """The name of a runtime as `TARGETS` has it.

    Raises:
        LowbitError: there is no such runtime, or it does not share linears among devices.
    """
    target = name.lower()
    if target not in TARGETS:
        raise unknown("target", name, TARGETS)
    if tensor_parallel > 1 and target not in _PARALLEL:
        raise LowbitError(
            f"--tensor-parallel is about vLLM and SGLang; leave it out for '{target}'."
        )
    return target


def demand(verdict: Verdict) -> None:
    """Refuse what the runtime will not load.

    Raises:
        LowbitError: naming up to two things that do not fit, and what to do.
    """
    if not verdict.accepts:
        raise LowbitError(f"{verdict.runtime} will not load this: {' '.join(verdict.reasons[:2])}")
