"""Searches that leave losers early against all errors added up."""

import math

import pytest
import torch

from lowbit.methods._race import least


def drawn(candidates, parts, apart, noise, seed):
    """Errors whose parts share what the tokens are like, as those of one site do."""
    g = torch.Generator().manual_seed(seed)
    easy = 1 + torch.rand(parts, generator=g)  # of each part
    size = 1 + apart * torch.arange(candidates)[torch.randperm(candidates, generator=g)]
    own = 1 + noise * torch.randn(candidates, parts, generator=g)
    return (easy * size[:, None] * own).abs()


class Asked:
    """The errors of a table, counted as they are asked for."""

    def __init__(self, table):
        self.table, self.parts = table, 0

    def __call__(self, candidates, parts):
        self.parts += len(candidates) * len(parts)
        return [[float(self.table[i, p]) for p in parts] for i in candidates]


@pytest.mark.parametrize("parts", [1, 2, 5, 32])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_certain_losers(parts, noise, seed):
    table = drawn(20, parts, 0.01, noise, seed)
    asked = Asked(table)
    assert least(20, parts, asked) == int(table.double().sum(1).argmin())
    assert asked.parts <= 20 * parts


@pytest.mark.parametrize("parts", [1, 2, 5, 8, 32])
@pytest.mark.parametrize("seed", range(20))
def test_likely_losers(parts, seed):
    """What is chosen is nearly as good as the best, at a part of the cost where there are many
    parts.
    """
    table = drawn(20, parts, 0.02, 0.02, seed)
    asked = Asked(table)
    found, totals = least(20, parts, asked, doubt=3.0), table.double().sum(1)
    assert totals[found] <= 1.01 * totals.min()
    assert asked.parts <= 20 * parts
    if parts == 32:
        assert asked.parts < 0.35 * 20 * parts


def test_what_cannot_be_told_apart_is_seen_whole():
    table = drawn(6, 32, 0.0, 0.3, 0)
    asked = Asked(table)
    assert least(6, 32, asked, doubt=10.0) == int(table.double().sum(1).argmin())
    assert asked.parts == 6 * 32


@pytest.mark.parametrize("doubt", [0.0, 3.0])
@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ([[1.0, 2.0], [1.0, 2.0]], 0),  # of equals the first
        ([[math.inf, 1.0], [5.0, 5.0]], 1),
        ([[1.0, math.inf], [5.0, 5.0]], 1),
        ([[math.inf, 1.0], [1.0, math.inf]], None),
        ([[0.0, 0.0], [0.0, 0.0]], 0),
    ],
)
def test_special_numbers(doubt, errors, found):
    table = torch.tensor(errors, dtype=torch.float64)
    assert least(len(errors), len(errors[0]), Asked(table), doubt) == found
