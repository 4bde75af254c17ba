"""Sums over tokens in parts are the sums at once, and so are their gradients."""

import pytest
import torch
from helpers import opened, save_tiny

from lowbit.grid.names import parse_scheme
from lowbit.methods import TesseraQ
from lowbit.methods._tokens import summed
from lowbit.model import context
from lowbit.model.context import tokens_at_a_time
from lowbit.model.stream import ModelStream
from lowbit.recipe import load_recipe
from lowbit.run.quantize import quantize


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEAD = drawn(7, 5, seed=3)


def divergence(y, target):
    logits, expected = (t @ HEAD.T for t in (y, target))
    p = expected.log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1))).sum()


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 9, 5), (3, 4, 2, 5)], ids=str)
@pytest.mark.parametrize("most", [1, 5, 11, 12, 100])
def test_parts_are_the_whole(shape, most):
    seen = []

    def of(y, target):
        seen.append(y.shape[0] * y.shape[1])
        return divergence(y, target)

    weight, target = drawn(5, 5, seed=1).requires_grad_(), drawn(*shape, seed=2)
    found = summed(of, drawn(*shape) @ weight, (target,), most)
    (gradient,) = torch.autograd.grad(3 * found, weight)
    whole = divergence(drawn(*shape) @ weight, target)
    (wanted,) = torch.autograd.grad(3 * whole, weight)
    torch.testing.assert_close((found, gradient), (whole, wanted), rtol=1e-12, atol=1e-12)
    tokens = shape[0] * shape[1]
    assert sum(seen) == tokens and max(seen) <= max(most, 1)
    with torch.no_grad():
        torch.testing.assert_close(summed(of, drawn(*shape) @ weight, (target,), most), whole)


def test_how_many_tokens_go_together():
    assert tokens_at_a_time(262_144) == 128 and tokens_at_a_time(300) > 100_000
    assert tokens_at_a_time(1 << 30) == 1


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return ModelStream(save_tiny(tmp_path_factory.mktemp("m") / "m"), compute=torch.float64)


def test_tuning_on_logits_in_parts_ends_alike(stream, monkeypatch):
    recipe = load_recipe("rtn", scheme=parse_scheme("W2A16g16"))
    method = TesseraQ(schedule="exponential-4-3", iters=2, rounds=2)
    ids = torch.randint(3, 280, (6, 16), generator=torch.Generator().manual_seed(0))
    last = len(stream) - 1
    size, calls, vocab = context.LOGITS, [], stream.config.vocab_size

    def tuned():
        block = opened(stream, recipe, ids, last)
        readout = stream.readout()
        watched = lambda x: calls.append(x.shape[0] * x.shape[1]) or readout(x)  # noqa: E731
        return method(block.within(readout=watched))

    whole = tuned()
    assert whole.notes["tesseraq"]["objective"] == "logits" and max(calls) == 6 * 16
    calls.clear()
    monkeypatch.setattr(context, "LOGITS", 10 * vocab)
    parts = tuned()
    assert max(calls) <= 10 < size
    for name, one in whole.coded.items():
        assert torch.equal(one.codes, parts.coded[name].codes), name
    for key in ("before", "after"):
        # Logits are float32.
        assert parts.notes["tesseraq"][key] == pytest.approx(whole.notes["tesseraq"][key], rel=1e-6)


def test_quality_looks_at_parts_of_a_window(tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "m", dtype=torch.float32)
    recipe = load_recipe("rtn", scheme=parse_scheme("W3A16g16"))
    rows, sizes = model / "text.txt", []
    head = ModelStream.head

    def watched(self, x):
        if len(x) == 1:  # the proof's rows go together
            sizes.append(x.shape[1])
        return head(self, x)

    monkeypatch.setattr(ModelStream, "head", watched)
    found = []
    for most in (context.LOGITS, 10 * ModelStream(model).config.vocab_size):
        monkeypatch.setattr(context, "LOGITS", most)
        sizes.clear()
        made = quantize(
            model, recipe=recipe, out=tmp_path / str(most), calib=rows, samples=4, length=32
        )
        found.append((made.report["quality"], max(sizes)))
    (whole, largest), (parts, most) = found
    assert largest == 31 and 8 <= most <= 10
    for side, figures in whole.items():
        if side != "text":
            told = {k: v for k, v in figures.items() if v is not None}
            assert {k: parts[side][k] for k in told} == pytest.approx(told, rel=1e-5)
