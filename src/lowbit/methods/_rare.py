"""Experts that few calibration tokens reach: second moments with a prior.

A matrix of second moments of fewer tokens than it has rows says nothing of some directions. What an
expert reads is what all experts of its mixture read, so that their moments are the prior:

    (sum of the expert's own x x^T + m E[x x^T]) / (n + m),    m = (inputs - n) / 10, for n tokens

A full count of missing tokens (m = inputs - n), and the same moment in every direction as a prior
for what an expert computes between its linears, made a small trained mixture worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..model.graph import Graph, Site
from ..model.statistics import Statistic

_WEIGHT = 0.1


def of_all(found: Mapping[str, Statistic], linears: Sequence[str]) -> Statistic:
    """The sum over some linears' tokens, one that reaches several of them several times."""
    shared = found[linears[0]].value.clone().zero_()
    for name in linears:
        shared += found[name].value
    return Statistic((shared,), sum(found[n].tokens for n in linears))


def second_moments(
    graph: Graph, found: Mapping[str, Statistic], everyone: Callable[[Site], Statistic]
) -> dict[str, Tensor]:
    """Mean of x x^T for each linear, with a prior for experts of too few tokens.

    Args:
        found: linear -> sum of x x^T, (inputs, inputs), and its tokens; of some experts or all.
        everyone: the same over all readers of a site, those included that are not in ``found``.
            Asked for only where an expert has too few tokens.

    Returns:
        linear -> (inputs, inputs); zeros for a linear that no token reaches and that nothing is
            known of.
    """
    out = {n: s.value / max(1, s.tokens) for n, s in found.items()}
    for site in graph.sites:
        names = [names[0] for names in site.readings if names[0] in found]
        if site.through is None or not names:
            continue
        rare = [n for n in names if found[n].tokens < len(found[n].value)]
        shared = everyone(site) if rare else None
        for name in rare:
            own = found[name]
            missing = _WEIGHT * (len(own.value) - own.tokens)
            if shared is not None and shared.tokens:
                prior = missing * shared.value / shared.tokens
                out[name] = (own.value + prior) / (own.tokens + missing)
    return out
