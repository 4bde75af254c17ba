"""Parameters of more than two dimensions: few stay as they are, many are refused."""

import pytest
import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.model.forms import check_forms


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(32, 32, bias=False)
        self.conv = nn.Conv1d(64, 64, 4)  # known: it stays whatever its size
        self.gate = nn.Module()
        self.gate.weight = nn.Parameter(torch.zeros(2, width, width))


def blocks(width):
    return {f"layers.{i}": (Gated(width), ("proj",)) for i in range(2)}


def test_a_few_stay_and_are_named():
    (said,) = check_forms(blocks(7))  # 98 of 1024 numbers
    assert said.startswith("'layers.0.gate.weight' and 1 more of more than two dimensions stay")
    assert not check_forms({"layers.0": (nn.Sequential(nn.Linear(4, 4)), ("0",))})


@pytest.mark.parametrize("width", [8, 32])
def test_many_are_refused(width):
    with pytest.raises(
        LowbitError, match=r"'layers\.0\.gate\.weight' is a 3-D parameter of a form"
    ):
        check_forms(blocks(width))
