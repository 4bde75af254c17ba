"""Errors of single linears against their definition, also behind folds and clips."""

import pytest
import torch
from helpers import apply_methods, begin, save_tiny

from lowbit.grid import Affine, PerToken
from lowbit.methods import AWQ, RTN, QuaRot
from lowbit.model.linear_errors import linear_errors
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return ModelStream(save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32))


def finished(stream, recipe):
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    block = begin(stream, 0, recipe, Streams(x, x, 8), stream.block_kwargs(32)[0], 0)
    return apply_methods(block, recipe)


def test_the_first_linear_by_definition(stream):
    block = finished(stream, Recipe(Affine(2, 16)))
    seen = []
    block.observe(
        ["self_attn.q_proj"],
        "quantized",
        8,
        lambda _, call: seen.append(call.args[0].flatten(0, -2).double()),
    )
    x, w = torch.cat(seen)[:256], block.weight("self_attn.q_proj").double()
    delta = x @ (block.coded["self_attn.q_proj"].decode().double() - w).T
    expected = float(delta.square().sum() / (x @ w.T).square().sum())
    found = linear_errors(block)["self_attn.q_proj"]
    assert found.tuned == pytest.approx(expected, rel=1e-4)
    assert found.nearest == pytest.approx(expected, rel=1e-4)


def test_a_clip_is_judged_against_the_weight_before_it(stream):
    block = finished(stream, Recipe(Affine(2, 16), (AWQ(scales=False),)))
    errors = linear_errors(block)
    assert set(errors) == set(block.graph.linears)
    clipped = [n for n in block.whole if not torch.equal(block.whole[n], block.weight(n))]
    assert clipped
    for name in clipped:
        assert errors[name].tuned != pytest.approx(errors[name].nearest, rel=1e-6)
        assert errors[name].tuned < 1.05 * errors[name].nearest


@pytest.mark.parametrize("methods", [(AWQ(clip="none"),), (QuaRot(),), (QuaRot(), RTN())])
def test_transforms_leave_no_error_of_their_own(stream, methods):
    recipe = Recipe(Affine(8), methods)
    assert max(e.tuned for e in linear_errors(finished(stream, recipe)).values()) < 2e-3


def test_quantized_activations_count(stream):
    coarse = linear_errors(finished(stream, Recipe(Affine(8), activations=PerToken(3))))
    assert min(e.tuned for e in coarse.values()) > 1e-2
