"""Experts that few calibration tokens reach: second moments with a prior.

A matrix of second moments of fewer tokens than it has rows says nothing of most directions, and a
solver that believes it fits those few tokens. What an expert reads is what all experts of its
mixture read, so that their moments are the prior:

    (sum of the expert's own x x^T + m E[x x^T]) / (n + m),    m = inputs - n, for n tokens

What an expert computes between its linears is its own. There the prior is the same second moment
in every direction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.graph import Graph
from ..model.statistics import Statistic


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
        if site.through is not None:
            tokens = sum(found[n].tokens for n in names)
            shared = sum((found[n].value for n in names), start=torch.zeros(())) / max(1, tokens)
            out.update(_towards(found, names, shared, tokens))
        elif any(site.reads[0].startswith(f"{m}.") for m in graph.mixtures):
            for name in names:
                size = out[name].diagonal().mean()
                plain = torch.eye(len(out[name]), dtype=size.dtype, device=size.device) * size
                out.update(_towards(found, [name], plain, found[name].tokens))
    return out


def _towards(
    found: Mapping[str, Statistic], names: list[str], prior: Tensor, tokens: int
) -> dict[str, Tensor]:
    """Means of those with fewer tokens than inputs, drawn towards a prior of so many tokens."""
    out = {}
    for name in names:
        own = found[name]
        missing = len(own.value) - own.tokens
        if missing > 0 and tokens:
            out[name] = (own.value + missing * prior) / len(own.value)
    return out
