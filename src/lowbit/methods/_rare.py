"""Experts that few calibration tokens reach: second moments with a prior.

A matrix of second moments of fewer tokens than it has rows says nothing of some directions. What an
expert reads is what all experts of its mixture read, so that their moments are the prior:

    (sum of the expert's own x x^T + m E[x x^T]) / (n + m),    m = (inputs - n) / 10, for n tokens

A full count of missing tokens (m = inputs - n), and the same moment in every direction as a prior
for what an expert computes between its linears, made a small trained mixture worse.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..model.graph import Graph
from ..model.statistics import Statistic

_WEIGHT = 0.1


def second_moments(graph: Graph, found: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Mean of x x^T for each linear, with a prior for experts of too few tokens.

    Args:
        found: linear -> sum of x x^T, (inputs, inputs), and its tokens.

    Returns:
        linear -> (inputs, inputs); zeros for a linear that no token reaches and that nothing is
            known of.
    """
    out = {n: s.value / max(1, s.tokens) for n, s in found.items()}
    for site in graph.sites:
        names = [names[0] for names in site.readings if names[0] in found]
        if site.through is None or not names:
            continue
        tokens = sum(found[n].tokens for n in names)
        shared = out[names[0]].clone().zero_()
        for name in names:
            shared += found[name].value
        for name in names:
            own = found[name]
            missing = _WEIGHT * (len(own.value) - own.tokens)
            if missing > 0 and tokens:
                prior = missing * shared / tokens
                out[name] = (own.value + prior) / (own.tokens + missing)
    return out
