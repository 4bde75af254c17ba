"""Statistics of inputs against what a pass really shows: both streams, rows, tokens, ranks."""

import pytest
import torch
from helpers import begin, save_tiny

from lowbit.grid import Affine, InputQuantizer, PerToken
from lowbit.methods import RTN
from lowbit.model.model import Streams
from lowbit.model.ranks import Ranks
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

IDS = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    stream = ModelStream(save_tiny(tmp_path_factory.mktemp("m"), "opt", torch.float32))
    x = stream.embed(IDS)
    streams = Streams(x, x + 0.05 * torch.randn_like(x), 8)
    return begin(stream, 0, Recipe(Affine(2, 16)), streams, stream.block_kwargs(24)[0], 0)


def reached(block, linear, x, weights):
    """(tokens, channels): what arrives at a linear when ``x`` passes with these weights."""
    found = []
    handle = block.module.get_submodule(linear).register_forward_pre_hook(
        lambda _, args: found.append(args[0].flatten(0, -2))
    )
    block.forward(x, weights)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"])
def test_the_quantized_stream_has_the_decoded_weights_of_what_is_coded(block, linear):
    coded = RTN()(block)
    expected = reached(coded, linear, coded.xq[:8], coded.decoded())
    plain = reached(coded, linear, coded.xq[:8], coded.weights)
    found = coded.statistics([linear], "quantized", lambda seen: seen.met.sum(0))[linear]
    assert found.tokens == len(expected) == 8 * 24
    torch.testing.assert_close(found.value, expected.sum(0), rtol=1e-4, atol=1e-4)
    if linear == "fc2":  # behind three coded linears
        assert not torch.allclose(found.value, plain.sum(0), rtol=1e-2)


def test_the_float_stream_is_the_float_models(block):
    coded = RTN()(block)
    expected = reached(coded, "fc2", coded.x[:8], coded.weights)
    found = coded.statistics(["fc2"], "float", lambda seen: seen.met.abs().amax(0), "max")["fc2"]
    torch.testing.assert_close(found.value, expected.abs().amax(0))


def test_inputs_are_met_as_their_grid_leaves_them(block):
    grid = PerToken(3)
    read = block.with_input_quantizers(
        dict.fromkeys(block.graph.linears, InputQuantizer(grid=grid))
    )
    name = "self_attn.q_proj"
    x = reached(block, name, read.xq[:8], block.weights)
    both = read.statistics(
        [name], "quantized", lambda s: torch.stack([s.met.double().sum(), s.exact.double().sum()])
    )[name].value
    assert float(both[0]) == pytest.approx(float(grid(x).double().sum()), rel=1e-4)
    assert float(both[1]) == pytest.approx(float(x.double().sum()), rel=1e-4)
    exact = read.statistics([name], "float", lambda s: (s.met - s.exact).abs().sum())[name]
    assert float(exact.value) == 0


def test_rows_and_tokens_are_chosen(block):
    name = "self_attn.q_proj"
    x = reached(block, name, block.xq[:8], block.weights)
    few = block.statistics([name], "quantized", lambda s: s.met.sum(0), rows=3)[name]
    assert few.tokens == 72
    torch.testing.assert_close(few.value, x[:72].sum(0), rtol=1e-4, atol=1e-4)
    tokens = torch.tensor([5, 30, 100, 191])
    some = block.statistics([name], "quantized", lambda s: s.met.sum(0), tokens=tokens)[name]
    assert some.tokens == 4
    torch.testing.assert_close(some.value, x[tokens].sum(0), rtol=1e-4, atol=1e-4)


def test_results_are_merged_as_asked(block, monkeypatch):
    """Batch by batch, or all at once."""
    name = "fc1"

    def top(seen):
        return seen.met.abs().topk(3, dim=0).values

    def merged(one, other):
        return torch.cat([one, other]).topk(3, dim=0).values

    whole = block.statistics([name], "float", top, merged)[name].value
    monkeypatch.setattr("lowbit.model.context.TOKENS_PER_PASS", 48)
    torch.testing.assert_close(block.statistics([name], "float", top, merged)[name].value, whole)


class Two(Ranks):
    """One of two ranks, told what the other one holds."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def sum_(self, *tensors):
        for t in tensors:
            t.add_(self.other.pop(0).to(t.dtype))

    def max_(self, *tensors):
        for t in tensors:
            torch.maximum(t, self.other.pop(0).to(t.dtype), out=t)

    def total(self, *numbers):
        return [n + float(self.other.pop(0)) for n in numbers]

    def stacked(self, t):
        return torch.stack([t, self.other.pop(0).to(t.dtype)])


@pytest.mark.parametrize("reduce", ["sum", "max", torch.minimum])
def test_ranks_hold_half_the_rows_each(block, reduce):
    name, half = "self_attn.q_proj", 4

    def of(seen):
        if reduce == "sum":
            return seen.met.double().sum(0)
        return seen.met.amax(0) if reduce == "max" else seen.met.amin(0)

    whole = block.statistics([name], "quantized", of, reduce)[name]
    parts = [block.within(x=block.x[r::2], xq=block.xq[r::2], tuned_rows=half) for r in range(2)]
    alone = [p.statistics([name], "quantized", of, reduce)[name] for p in parts]
    ranks = Two()
    object.__setattr__(ranks, "size", 2)
    object.__setattr__(ranks, "rank", 0)
    object.__setattr__(ranks, "other", [torch.tensor(float(alone[1].tokens)), alone[1].value])
    shared = parts[0].within(ranks=ranks, tuned_rows=8)
    found = shared.statistics([name], "quantized", of, reduce)[name]
    assert found.tokens == whole.tokens
    torch.testing.assert_close(found.value, whole.value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduce, value", [("sum", 0.0), ("max", float("-inf"))])
def test_a_linear_that_no_token_reaches_has_seen_nothing(block, reduce, value):
    none = torch.empty(0, dtype=torch.int64)
    found = block.statistics(["fc2"], "float", lambda s: s.met.sum(0), reduce, tokens=none)["fc2"]
    assert found.tokens == 0
    assert found.value.shape == (block.weight("fc2").shape[1],) and bool(
        (found.value == value).all()
    )


def test_several_statistics_and_calls_come_from_one_pass(block):
    def sums(seen):
        x = seen.arrived
        return x.abs().sum(0, dtype=torch.float64), x.T @ x

    calls = {"fc2": [], "self_attn": []}
    found = block.statistics(["fc1", "fc2"], "float", sums, rows=5, most=2, keep=calls)
    for name in ("fc1", "fc2"):
        x = reached(block, name, block.x[:5], block.weights)
        size, gram = found[name].values
        torch.testing.assert_close(size, x.abs().sum(0, dtype=torch.float64))
        torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4)
        assert found[name].tokens == 5 * 24
    assert len(calls["self_attn"]) == 3  # 2, 2 and 1 rows
    held = torch.cat([call.args[0].flatten(0, -2) for call in calls["fc2"]])
    torch.testing.assert_close(held, reached(block, "fc2", block.x[:5], block.weights))
