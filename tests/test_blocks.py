"""A block as a value, on a toy layer: what a change leaves as it was, what is refused, and rewrites
that keep the function.
"""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from lowbit.errors import LowbitError
from lowbit.grid import Affine, InputQuantizer, Outliers, PerToken
from lowbit.grid.names import parse_grid
from lowbit.model.block import Block, first
from lowbit.model.context import Context
from lowbit.model.graph import Described, Frame, Graph, Site, Source
from lowbit.model.order import check_order, order_block, order_outer, reorder
from lowbit.model.ranks import Ranks
from lowbit.model.rewrite import fold, fold_values, repeated

H, F = 8, 16


class Layer(nn.Module):
    """A gated layer: x + down(up(n) * gate(n) + offset), n the normalised x."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.up, self.gate, self.down = nn.Linear(H, F), nn.Linear(H, F), nn.Linear(F, H)

    def forward(self, x):
        n = self.norm(x)
        return (x + self.down(self.up(n) * self.gate(n).sigmoid()),)


GRAPH = Graph(
    sites=(
        Site(("up", "gate"), Source("norm", "norm"), "up", residual=True),
        Site(("down",), Source("up", "linear"), "down"),
    ),
    writers=("down",),
    inner=("down",),
)
NAMES = ("up", "gate", "down")


def block(grid="W4g4", stored=torch.float32, rows=6, **context):
    generator = torch.Generator().manual_seed(0)
    module = Layer()
    weights = {
        n: torch.randn(p.shape, generator=generator) * 0.5 for n, p in module.named_parameters()
    }
    weights["norm.weight"] = weights["norm.weight"].abs() + 0.5
    x = torch.randn(rows, 5, H, generator=generator)
    held = Context(
        name="model.layers.3",
        module=module.to("meta"),
        graph=GRAPH,
        kwargs={},
        compute=torch.float32,
        stored=stored,
        grids=dict.fromkeys(NAMES, parse_grid(grid)),
        x=x,
        xq=x,
        target=x,
        tuned_rows=4,
        seed=0,
        **context,
    )
    return Block(held, weights)


FIELDS = ("weights", "input_quantizers", "params", "coded", "whole", "notes")
CHANGES = {
    "with_weights": lambda b: b.with_weights({"up.weight": torch.zeros(F, H)}),
    "with_params": lambda b: b.with_params({"up": b.range_of("up")}),
    "clipped": lambda b: b.clipped(
        {"up": b.weight("up").clamp(-0.1, 0.1)}, {"up": b.range_of("up")}
    ),
    "with_codes": lambda b: b.with_codes({"up": b.nearest("up")}),
    "with_input_quantizers": lambda b: b.with_input_quantizers(
        {"up": InputQuantizer(grid=PerToken(4))}
    ),
    "with_notes": lambda b: b.with_notes(loss=1.0),
    "remarked": lambda b: b.remarked("a sentence"),
    "within": lambda b: b.within(seed=9),
    "computing": lambda b: b.computing(torch.float64),
    "exact": lambda b: b.exact(),
    "as_seen": lambda b: b.with_codes({"up": b.nearest("up")}).as_seen("quantized"),
    "fold": lambda b: fold(b, GRAPH.sites[0], torch.full((H,), 2.0)),
    "reorder": lambda b: reorder(b, GRAPH.sites[1], torch.arange(F).flip(0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_another_block(name):
    one = block()
    before = {f: dict(getattr(one, f)) for f in FIELDS}
    kept = {n: w.clone() for n, w in one.weights.items()}
    other = CHANGES[name](one)
    assert other is not one
    for field, held in before.items():
        now = getattr(one, field)
        assert set(now) == set(held) and all(now[k] is v for k, v in held.items()), field
    assert all(torch.equal(one.weights[n], w) for n, w in kept.items())
    assert one.seed == 0 and one.compute == torch.float32
    with pytest.raises(FrozenInstanceError):
        one.weights = {}


@pytest.mark.parametrize(
    "name, field, keys",
    [
        ("with_weights", "params", set()),
        ("with_params", "params", {"up"}),
        ("with_params", "whole", set()),
        ("clipped", "params", {"up"}),
        ("clipped", "whole", {"up"}),
        ("clipped", "coded", set()),
        ("with_codes", "coded", {"up"}),
        ("with_codes", "params", set()),
        ("with_input_quantizers", "input_quantizers", {"up"}),
        ("with_notes", "notes", {"loss"}),
        ("remarked", "notes", {"trouble"}),
    ],
)
def test_what_a_change_adds(name, field, keys):
    assert set(getattr(CHANGES[name](block()), field)) == keys


@pytest.mark.parametrize("state", ["with_params", "clipped", "with_codes"])
@pytest.mark.parametrize(
    "key, refused",
    [("up.weight", True), ("up.bias", False), ("down.weight", False), ("norm.weight", False)],
)
def test_a_decided_weight_cannot_be_changed(state, key, refused):
    decided = CHANGES[state](block())
    value = torch.zeros_like(decided.weights[key])
    if not refused:
        assert torch.equal(decided.with_weights({key: value}).weights[key], value)
        return
    said = "coded" if state == "with_codes" else "on a fixed range"
    words = f"'model.layers.3.up.weight' is already {said} and cannot be changed: in a recipe"
    with pytest.raises(LowbitError, match=words):
        decided.with_weights({key: value})


@pytest.mark.parametrize("grid", ["W4g4", "W2sym", "W2:column", "W3:row"])
def test_nearest_codes_are_on_the_fixed_range_if_there_is_one(grid):
    one = block(grid, torch.bfloat16)
    w, of = one.weight("up"), parse_grid(grid)
    plain = of.stored(of.fit(w), torch.bfloat16)
    assert one.nearest("up").params.differing(plain) is None
    assert torch.equal(one.nearest("up").codes, of.encode(w, plain))
    narrow = of.fit(w * 0.3)
    fixed = one.with_params({"up": narrow})
    held = of.stored(narrow, torch.bfloat16)
    assert fixed.range_of("up").differing(held) is None
    assert torch.equal(fixed.nearest("up").codes, of.encode(w, held))
    assert fixed.range_of("down").differing(one.range_of("down")) is None


@pytest.mark.parametrize(
    "grid, stored, size, words",
    [
        ("W4g4", torch.float16, 1e7, "'model.layers.3.up' cannot be stored on a W4g4: a number"),
        ("W2:column", torch.bfloat16, 1e6, "'model.layers.3.up' cannot be stored on a W2 codebook"),
        ("W4g4", torch.bfloat16, 1e7, None),
        ("W4g4", torch.bfloat16, float("nan"), "cannot be stored on a W4g4"),
    ],
)
def test_what_cannot_be_stored_is_named(grid, stored, size, words):
    one = block(grid, stored)
    one = one.with_weights({"up.weight": one.weight("up") * size})
    if words is None:
        assert bool(one.nearest("up").decode().isfinite().all())
        return
    with pytest.raises(LowbitError, match=words):
        one.nearest("up")
    one.nearest("down")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_decoded_weights_are_what_a_loader_sees(stored):
    one = block(stored=stored)
    q = replace(one.nearest("up"), outliers=Outliers(torch.tensor([3]), torch.tensor([0.1])))
    decoded = one.with_codes({"up": q}).decoded()
    expected = q.grid.decode(q.codes, q.params).to(stored).float()
    expected.view(-1)[3] = torch.tensor(0.1).to(stored).float()
    assert torch.equal(decoded["up.weight"], expected)
    assert all(decoded[n] is w for n, w in one.weights.items() if n != "up.weight")


@pytest.mark.parametrize(
    "own, stored, value, kept",
    [
        (None, torch.bfloat16, 1.0, torch.bfloat16),
        (torch.float32, torch.bfloat16, 1 + 2.0**-20, torch.float32),  # as in the checkpoint
        (torch.float16, torch.bfloat16, 1.0, torch.float16),
        (torch.float16, torch.bfloat16, 1 + 2.0**-20, torch.float32),  # neither would hold it
        (torch.bfloat16, torch.float16, 1 + 2.0**-20, torch.float32),
        (torch.bfloat16, torch.float32, 1 + 2.0**-20, torch.float32),
        (torch.bfloat16, torch.float32, 1.5, torch.bfloat16),
    ],
)
def test_a_parameter_keeps_its_dtype_while_its_bits_fit(own, stored, value, kept):
    dtypes = {} if own is None else {"norm.bias": own}
    one = block(stored=stored, dtypes=dtypes)
    one = one.with_weights({"norm.bias": torch.full((H,), value)})
    assert one.kept("norm.bias").dtype == kept


@pytest.mark.parametrize("remarks", [(), ("one",), ("one", "two")])
def test_remarks_are_added_up(remarks):
    one = block().remarked("first").remarked(*remarks)
    assert one.notes["trouble"] == ["first", *remarks]


# --- running --------------------------------------------------------------------------------------


def by_hand(w, x):
    """The layer in float64."""
    w, x = {k: v.double() for k, v in w.items()}, x.double()
    mean, spread = x.mean(-1, True), x.var(-1, unbiased=False, keepdim=True)
    n = (x - mean) / (spread + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    up, gate = (n @ w[f"{k}.weight"].T + w[f"{k}.bias"] for k in ("up", "gate"))
    return x + (up * gate.sigmoid()) @ w["down.weight"].T + w["down.bias"]


@pytest.mark.parametrize("tokens", [1, 5, 12, 8192])
def test_a_stream_passes_in_parts_to_the_same_result(monkeypatch, tokens):
    monkeypatch.setattr("lowbit.model.block.TOKENS_PER_PASS", tokens)
    one = block()
    expected = by_hand(one.weights, one.x)
    torch.testing.assert_close(one.run(one.x).double(), expected, rtol=1e-4, atol=1e-5)
    out = torch.full_like(one.x, float("nan"))
    assert one.run(one.x, out=out) is out and torch.equal(out, one.run(one.x))
    zeros = {n: torch.zeros_like(w) for n, w in one.weights.items()}
    assert torch.equal(one.run(one.x, zeros), one.x)


@pytest.mark.parametrize("value", [torch.ones(2), (torch.ones(2), None), (torch.ones(2),)])
def test_hidden_states_come_first(value):
    assert torch.equal(first(value), torch.ones(2))


@pytest.mark.parametrize("most", [None, 1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_every_row_is_shown_once(rows, most):
    one, seen = block(), []
    one.observe(
        ["up", "down"], "float", rows, lambda name, call: seen.append((name, call.args[0])), most
    )
    found = {n: torch.cat([x for name, x in seen if name == n]) for n in ("up", "down")}
    assert len(found["up"]) == len(found["down"]) == rows
    assert max(len(x) for _, x in seen) <= (most or rows)
    w = {k: v.double() for k, v in one.weights.items()}
    inner = by_hand({**one.weights, "down.bias": torch.zeros(H)}, one.x) - one.x.double()
    shown = found["down"].double() @ w["down.weight"].T
    torch.testing.assert_close(shown, inner[:rows], rtol=1e-4, atol=1e-5)


# --- rewrites -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "site, stored, shifted",
    [
        (0, torch.float32, False),
        (0, torch.float32, True),
        (0, torch.bfloat16, False),  # the gain is rounded, and the readers take what it became
        (1, torch.float32, False),
    ],
)
def test_a_folded_factor_keeps_the_function(site, stored, shifted):
    one, size = block(stored=stored), (H, F)[site]
    one = one.with_weights({n: w.to(stored).float() for n, w in one.weights.items()})
    if stored == torch.bfloat16:  # a bias is rounded as it is stored, and nothing makes up for it
        one = one.with_weights({"norm.bias": torch.zeros(H)})
    factor = torch.rand(size, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
    shift = torch.linspace(-1, 1, size) if shifted else None
    other = fold(one, GRAPH.sites[site], factor, shift)
    expected = by_hand(one.weights, one.x)
    torch.testing.assert_close(by_hand(other.weights, one.x), expected, rtol=1e-4, atol=1e-4)
    for name in GRAPH.sites[site].reads:
        ratio = other.weight(name) / one.weight(name)
        torch.testing.assert_close(ratio, factor.expand_as(ratio), rtol=1e-2, atol=0)
    gain = other.weights["norm.weight"]
    assert torch.equal(gain.to(stored).float(), gain)


@pytest.mark.parametrize("gain", [0.0, 1e-42])
def test_a_dead_channel_takes_no_factor(gain):
    one = block(stored=torch.float16)
    weight = one.weights["norm.weight"].clone()
    weight[2] = gain
    one = one.with_weights({"norm.weight": weight, "norm.bias": torch.zeros(H)})
    other = fold(one, GRAPH.sites[0], torch.full((H,), 4.0))
    assert torch.equal(other.weight("up")[:, 2], one.weight("up")[:, 2])
    assert float(other.weights["norm.weight"][2]) == float(weight[2])
    torch.testing.assert_close(
        other.weight("up")[:, 1], 4 * one.weight("up")[:, 1], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_channels_inside_a_block_change_places(seed):
    one = block()
    order = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    other = reorder(one, GRAPH.sites[1], order)
    torch.testing.assert_close(by_hand(other.weights, one.x), by_hand(one.weights, one.x))
    assert torch.equal(other.weight("down"), one.weight("down")[:, order])
    for name in ("up", "gate"):  # what multiplies element by element moves along
        assert torch.equal(other.weight(name), one.weight(name)[order])
        assert torch.equal(other.weights[f"{name}.bias"], one.weights[f"{name}.bias"][order])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_channels_of_the_residual_stream_change_places(seed):
    one = block()
    order = torch.randperm(H, generator=torch.Generator().manual_seed(seed))
    other = order_block(one.weights, GRAPH, order)
    expected = by_hand(one.weights, one.x)[..., order]
    torch.testing.assert_close(by_hand(other, one.x[..., order]), expected)
    assert set(other) == set(one.weights)
    outer = {
        "e.weight": torch.randn(20, H),
        "n.weight": torch.rand(H),
        "h.weight": torch.randn(9, H),
    }
    moved = order_outer({**outer, "rest": torch.ones(3)}, ("e.weight",), "n", "h.weight", order)
    y = torch.randn(4, H)
    logits = (y * outer["n.weight"]) @ outer["h.weight"].T
    again = (y[:, order] * moved["n.weight"]) @ moved["h.weight"].T
    torch.testing.assert_close(again, logits)
    assert torch.equal(moved["e.weight"], outer["e.weight"][:, order])
    assert torch.equal(moved["rest"], torch.ones(3))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"writers": ()}, "the residual channels of this 'toy' model cannot be put in another"),
        ({"open": True}, "Use --set crossquant.fold=channel"),
        ({"sites": GRAPH.sites[1:]}, "normalised after each addition"),
        ({}, None),
    ],
)
def test_which_families_have_one_order(change, words):
    frame = Frame("model", "model.layers", open=change.get("open", False))
    graph = replace(GRAPH, **{k: v for k, v in change.items() if k != "open"})
    if words is None:
        check_order(Described(frame, (graph,), (0, 0)), "toy")
        return
    for kinds in ((graph,), (GRAPH, graph), (graph, GRAPH)):  # it must hold in every block
        with pytest.raises(LowbitError, match=words):
            check_order(Described(frame, kinds, tuple(range(len(kinds)))), "toy")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda b: fold(b, Site(("up",), None, "up"), torch.ones(H)), "no source to fold"),
        (lambda b: reorder(b, Site(("up",), None, "up"), torch.arange(H)), "no source whose"),
        (lambda b: fold_values(b, torch.ones(H)), "cannot take a factor"),
    ],
)
def test_where_nothing_can_be_rewritten(make, words):
    with pytest.raises(ValueError, match=words):
        make(block())


@pytest.mark.parametrize(
    "values, width, times, expected",
    [
        ([1, 2, 3, 4], 2, 1, [1, 2, 3, 4]),
        ([1, 2, 3, 4], 2, 2, [1, 2, 1, 2, 3, 4, 3, 4]),
        ([1, 2, 3, 4], 4, 2, [1, 2, 3, 4, 1, 2, 3, 4]),
        ([1, 2], 1, 3, [1, 1, 1, 2, 2, 2]),
    ],
)
def test_a_head_that_is_shared_is_repeated(values, width, times, expected):
    assert repeated(torch.tensor(values), width, times).tolist() == expected


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 6, 10])
def test_every_row_token_and_share_is_of_one_rank(size, rows):
    ranks = [Ranks(rank=r, size=size) for r in range(size)]
    assert sorted(i for r in ranks for i in r.mine(rows)) == list(range(rows))
    assert [r.count(rows) for r in ranks] == [len(r.mine(rows)) for r in ranks]
    shares = [range(rows)[r.share(rows)] for r in ranks]
    assert [i for share in shares for i in share] == list(range(rows))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert [r.first for r in ranks] == [True] + [False] * (size - 1)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_tokens_by_their_numbers_in_what_a_rank_holds(size, length):
    rows = 7
    numbers = torch.randperm(rows * length, generator=torch.Generator().manual_seed(0))[:5]
    whole = torch.arange(rows * length).reshape(rows, length)
    found = []
    for r in (Ranks(rank=i, size=size) for i in range(size)):
        held = whole[list(r.mine(rows))].flatten()
        found += held[r.tokens(numbers, length)].tolist()
    assert sorted(found) == sorted(numbers.tolist())


def test_grids_are_by_linear():
    one = block().within(grids={"up": Affine(2), "gate": Affine(4, 4), "down": Affine(8)})
    assert [one.nearest(n).grid.bits for n in NAMES] == [2, 4, 8]
    assert [int(one.nearest(n).codes.max()) for n in NAMES] == [3, 15, 255]
