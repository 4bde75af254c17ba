"""The divergence of next tokens and its gradient against the plain formula in float64, and how many
tokens of a step it is taken of.
"""

import pytest
import torch
from helpers import opened, save_tiny

from lowbit.errors import LowbitError
from lowbit.grid.names import parse_scheme
from lowbit.methods import TesseraQ
from lowbit.methods._divergence import divergence
from lowbit.methods._reconstruct import Reconstruction
from lowbit.model.stream import ModelStream
from lowbit.recipe import load_recipe

ROWS, LENGTH = 6, 16


def plain(logits, expected):
    p, q = (t.double().log_softmax(-1) for t in (expected, logits))
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])  # of logits: flat to one word alone
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient(dtype, scale):
    g = torch.Generator().manual_seed(0)
    logits, expected = (
        (scale * torch.randn(3, 5, 50, generator=g, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    kept = expected.clone()
    found = divergence(logits.requires_grad_(), expected)
    (gradient,) = torch.autograd.grad(2 * found, logits)
    wanted = plain(logits, expected)
    (of_plain,) = torch.autograd.grad(2 * wanted, logits)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert found.item() == pytest.approx(wanted.item(), rel=min(close, 1e-5))
    torch.testing.assert_close(gradient, of_plain.to(dtype), rtol=close, atol=close)
    assert torch.equal(expected, kept) and gradient.dtype == dtype
    with torch.no_grad():
        assert torch.equal(divergence(logits, expected), found)


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """The last block of a tiny model, slightly off."""
    stream = ModelStream(save_tiny(tmp_path_factory.mktemp("m") / "m"), compute=torch.float64)
    ids = torch.randint(3, 280, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    recipe = load_recipe("rtn", scheme=parse_scheme("W2A16g16"))
    return opened(stream, recipe, ids, len(stream) - 1)


def gradients(job, block, rows):
    keys = [f"{n}.weight" for n in block.graph.linears]
    shifted = {k: w + 0.02 if k in keys else w for k, w in block.weights.items()}
    return job.gradients(shifted, keys, rows)


@pytest.mark.parametrize("tokens", [1, 4, 8, 20])
def test_some_tokens_of_a_step_stand_for_all(last, tokens):
    rows = torch.arange(4)
    whole = gradients(Reconstruction(last, 4, "logits"), last, rows)
    sizes = []
    readout = last.context.readout
    watched = last.within(readout=lambda x: sizes.append(x.shape[0] * x.shape[1]) or readout(x))
    job = Reconstruction(watched, 4, "logits", tokens)
    sizes.clear()
    found = [gradients(job, last, rows) for _ in range(400)]
    assert set(sizes) == {4 * max(1, tokens // 4)}  # as many of every row
    assert len({f[0].item() for f in found}) > 300  # others for every step
    assert sum(f[0].item() for f in found) / 400 == pytest.approx(whole[0].item(), rel=0.1)
    for i, wanted in enumerate(whole[1]):
        mean = sum(f[1][i] for f in found) / 400
        assert (mean - wanted).norm() < 0.25 * wanted.norm()


@pytest.mark.parametrize("tokens", [0, 4 * LENGTH, 10_000])
def test_all_tokens(last, tokens):
    rows = torch.arange(4)
    whole = gradients(Reconstruction(last, 4, "logits"), last, rows)
    found = gradients(Reconstruction(last, 4, "logits", tokens), last, rows)
    assert torch.equal(found[0], whole[0]) and all(map(torch.equal, found[1], whole[1]))


def test_only_the_divergence_is_taken_of_some(last):
    rows = torch.arange(4)
    whole = gradients(Reconstruction(last, 4, "block"), last, rows)
    found = gradients(Reconstruction(last, 4, "block", 4), last, rows)
    assert torch.equal(found[0], whole[0])


def test_a_negative_number_is_refused():
    with pytest.raises(LowbitError, match="logits_tokens >= 0"):
        TesseraQ(logits_tokens=-1)
