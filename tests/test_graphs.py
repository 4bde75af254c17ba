"""Blocks with graphs of their own: what is not in a graph stays as it is, what is adds up; parameters
that read an activation beside linears are made up for.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers as T
from helpers import LLAMA, run, save_tiny, staged
from safetensors import safe_open
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.formats import native
from lowbit.grid import Affine, KVGrid, PerToken
from lowbit.grid.names import parse_grid, parse_scheme
from lowbit.methods import METHODS
from lowbit.methods._learned import Learned, shiftable
from lowbit.model.block import Block
from lowbit.model.context import Context
from lowbit.model.graph import Described, Frame, Graph, Site, Source
from lowbit.model.model import Streams
from lowbit.model.order import order_block, reorder
from lowbit.model.outline import Outline
from lowbit.model.residual import Basis, rotate_block
from lowbit.model.rewrite import fold
from lowbit.model.stream import ModelStream
from lowbit.model.tracing import described
from lowbit.plan import make_plan, read_config
from lowbit.plan.speed import Speed
from lowbit.plan.targets import TARGETS
from lowbit.recipe import Recipe, load_recipe
from lowbit.run.patterns import patterns

H, F, V = 64, 96, 300
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = tuple(f"self_attn.{n}_proj" for n in "qkvo")
KEPT = "not in the block's graph: kept in its own dtype"

OTHERS = {  # the graph of odd blocks, made of the usual one; the linears that it leaves out
    "no MLP": (lambda g: replace(g, sites=g.sites[:2], writers=(), inner=()), MLP),
    "no attention": (
        lambda g: Graph(g.sites[2:], writers=(), inner=g.inner, attention=None),
        ATTENTION,
    ),
    "bare": (
        lambda g: Graph(tuple(replace(s, residual=False, source=None) for s in g.sites)),
        (),
    ),
    "empty": (lambda g: Graph(()), ATTENTION + MLP),
}
QUICK = {
    "tesseraq": dict(schedule="exponential-4-3", iters=3, batch=4),
    "omniquant": dict(epochs=1),
    "awq": dict(exponents=4, shrinks=3),
}


@pytest.fixture
def kinds(monkeypatch):
    """Call it to give odd blocks another graph than even ones."""

    def use(name):
        def of(config):
            one = described(config)
            other = OTHERS[name][0](one.kinds[0])
            of_layers = tuple(i % 2 for i in range(len(one.of_layers)))
            return Described(one.frame, (one.kinds[0], other), of_layers)

        for module in ("stream", "outline"):
            monkeypatch.setattr(f"lowbit.model.{module}.described", of)
        return OTHERS[name][1]

    return use


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = T.LlamaConfig(**{**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 4})
    return save_tiny(tmp_path_factory.mktemp("m"), config)


def left_out(names):
    return {f"model.layers.{i}.{n}" for i in (1, 3) for n in names}


# --- plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_adds_up_over_kinds(model, kinds, name):
    config, recipe = read_config(str(model)), load_recipe("awq", scheme=parse_scheme("W4A16g32"))
    plain, missing = make_plan(config, recipe, 8, 32), kinds(name)
    made = make_plan(config, recipe, 8, 32)
    assert set(plain.outline.shapes) - set(made.outline.shapes) == left_out(missing)
    assert made.outline.of_layers == (0, 1, 0, 1)
    assert made.parameters == plain.parameters
    sizes = {n: a * b for n, (a, b) in plain.outline.shapes.items()}
    lost = sum(sizes[n] for n in left_out(missing))
    assert made.quantized == plain.quantized - lost
    packed = {n: a * b // 2 + a * (b // 32) * 2.5 for n, (a, b) in plain.outline.shapes.items()}
    change = sum(packed[n] - 2 * sizes[n] for n in left_out(missing))
    assert plain.artifact - made.artifact == pytest.approx(change, abs=0.02 * abs(change))
    assert made.memory == plain.memory  # blocks of the first kind are the larger ones
    speed = Speed(1e9, 1e9, 1e9)
    if name != "bare":  # the other kind takes less of a run, but for the last block
        assert made.seconds(speed) < plain.seconds(speed)
    assert {v.runtime.lower() for v in made.runtimes} == set(TARGETS)
    two = make_plan(config, recipe, 8, 32, tensor_parallel=2)
    assert two.verdict("vllm").notes or two.verdict("vllm").reasons


def test_shapes_that_differ_make_kinds_of_their_own(monkeypatch):
    """Also where the graph is one."""
    from lowbit.model import outline

    build = outline.build_skeleton

    def uneven(config, name, **options):
        skeleton = build(config, name, **options)
        with torch.device("meta"):
            mlp = skeleton.model.layers[2].mlp
            mlp.gate_proj, mlp.up_proj = (nn.Linear(H, 2 * F, bias=False) for _ in range(2))
            mlp.down_proj = nn.Linear(2 * F, H, bias=False)
        return skeleton

    monkeypatch.setattr(outline, "build_skeleton", uneven)
    config = T.LlamaConfig(**{**LLAMA, "num_hidden_layers": 4})
    found = Outline.of(config)
    assert found.of_layers == (0, 0, 1, 0) and found.kinds[0].graph == found.kinds[1].graph
    assert found.shapes["model.layers.2.mlp.down_proj"] == (H, 2 * F)
    assert found.shapes["model.layers.3.mlp.down_proj"] == (H, F)
    rotated = make_plan(config, load_recipe("quarot", scheme=parse_scheme("W4A4"))).outline
    sizes = [rotated.online[f"model.layers.{i}.mlp.down_proj"].size for i in range(4)]
    assert sizes == [F, F, 2 * F, F]
    even = make_plan(config, load_recipe("rtn", scheme=parse_scheme("W4A16g32")))
    largest = even.shapes_of[1]
    assert even.shapes is largest and even.memory.least == 9 * largest.layer.weights + 4 * 2 * H


def test_a_model_without_a_linear_in_a_graph_is_refused(model, monkeypatch):
    one = described(read_config(str(model)))
    empty = Described(one.frame, (Graph(()),), (0,) * 4)
    monkeypatch.setattr("lowbit.model.outline.described", lambda config: empty)
    monkeypatch.setattr("lowbit.model.stream.described", lambda config: empty)
    words = "no block of .* has a linear that can be quantized"
    with pytest.raises(LowbitError, match=words):
        make_plan(read_config(str(model)), load_recipe("rtn", scheme=parse_scheme("W4A16g32")))
    with pytest.raises(LowbitError, match=words):
        ModelStream(model)


@pytest.mark.parametrize(
    "scheme, recipe, settings, words",
    [
        ("W4A16g32", "quarot", (), "residual stream of this 'llama' model cannot be rotated"),
        (
            "W4A8g32sym",
            "crossquant-deploy",
            ("crossquant.fold=group",),
            "residual channels of this 'llama' model cannot be put in another order",
        ),
    ],
)
@pytest.mark.parametrize("name", ["no MLP", "bare"])
def test_what_takes_every_block_is_refused_where_one_cannot(
    model, kinds, name, scheme, recipe, settings, words
):
    kinds(name)
    made = load_recipe(recipe, scheme=parse_scheme(scheme), settings=settings)
    with pytest.raises(LowbitError, match=words):
        make_plan(read_config(str(model)), made, 8, 32)


def test_keys_and_values_need_a_block_that_has_them(model, monkeypatch):
    one = described(read_config(str(model)))
    without = replace(one, kinds=(replace(one.kinds[0], attention=None),))
    monkeypatch.setattr("lowbit.model.outline.described", lambda config: without)
    with pytest.raises(LowbitError, match="leave KV8 out of the scheme"):
        make_plan(read_config(str(model)), load_recipe("rtn", scheme=parse_scheme("W4A16KV8g32")))


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_blocks_of_two_kinds(model, kinds, name, method):
    missing, options = kinds(name), QUICK.get(method, {})
    if method == "quarot":
        options = dict(residual=False)
    grid = parse_grid("W2:column" if method == "claq" else "W3g16")
    recipe = Recipe(
        grid, (METHODS[method].kind(**options),), activations=PerToken(8), kv=PerToken(8)
    )
    stream = ModelStream(model)
    ids = torch.randint(3, 280, (4, 12), generator=torch.Generator().manual_seed(0))
    prepared = staged(stream, recipe, ids)
    x = stream.embed(ids)
    done = []
    for _ in run(prepared, Streams(x, x, 4), done.append):
        pass
    own = set(ATTENTION + MLP)
    for i, block in enumerate(done):
        assert set(block.coded) == (own - set(missing) if i % 2 else own)
        assert all(bool(torch.isfinite(w).all()) for w in block.weights.values())
        kept = stream.block_weights(i)
        for linear in own - set(block.coded):
            assert torch.equal(block.weight(linear), kept[f"{linear}.weight"])
        assert set(prepared.input_quantizers(i)) == set(block.coded)
        stores = stream.graph(i).attention is not None
        assert (block.kv is not None) == (prepared.kv_grid(i) is not None) == stores


ARTIFACTS = [
    ("no MLP", "W4A16g32", "rtn", ()),
    ("no MLP", "W4A16g32sym", "rtn", ()),  # packed modules while it runs: AutoModel's names count
    ("no MLP", "W4A16g32", "awq", ("awq.exponents=4", "awq.shrinks=3")),
    ("no MLP", "W4A16g32", "gptq", ()),
    (
        "no MLP",
        "W3A16g32",
        "tesseraq-fast",
        ("tesseraq.schedule=exponential-4-3", "tesseraq.iters=3", "awq.exponents=4"),
    ),
    ("no MLP", "W4A8KV8", "quarot", ("quarot.residual=false",)),
    ("no attention", "W4A8KV8", "rtn", ()),
    ("bare", "W4A16g32", "gptq", ()),
    ("empty", "W4A8", "rtn", ()),
]


@pytest.mark.parametrize("name, scheme, recipe, settings", ARTIFACTS)
def test_an_artifact_keeps_what_no_graph_holds(
    model, kinds, tmp_path, name, scheme, recipe, settings
):
    missing, out = left_out(kinds(name)), tmp_path / "out"
    done = lowbit.quantize(
        str(model),
        scheme,
        recipe,
        out=out,
        calib=str(model / "text.txt"),
        samples=4,
        length=16,
        settings=settings,
        device="cpu",
    )
    assert done.verification.loader == "passed"
    skipped = {e["name"]: e["skipped"] for e in done.report["linears"] if "skipped" in e}
    assert {n for n, why in skipped.items() if why == KEPT} == missing
    assert len(done.report["linears"]) - len(skipped) == 4 * 7 - len(missing)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(model / "model.safetensors", "pt") as source:
        for linear in missing:
            key = f"{linear}.weight"
            with safe_open(out / index[key], "pt") as made:
                assert torch.equal(made.get_tensor(key), source.get_tensor(key))
    whole = T.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    trunk = T.AutoModel.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(3, 280, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(trunk(ids, use_cache=False).last_hidden_state, expected)


# --- what config.json says of blocks --------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, others, found",
    [
        ([(0, "a.x"), (1, "a.x")], ["m.layers.0.b"], ["*.a.x"]),
        ([(0, "a.x"), (10, "a.x")], ["m.layers.1.a.x"], ["*layers.0.a.x", "*layers.10.a.x"]),
        ([(0, "x")], ["m.layers.1.a.x"], ["*layers.0.x"]),  # an end of another name
        ([(0, "x"), (1, "y")], [], ["*.x", "*.y"]),
        ([], ["m.layers.0.x"], []),
    ],
)
def test_patterns_match_what_is_meant(parts, others, found):
    layers = Described(Frame("m", "m.layers"), (Graph(()),), (0,) * 11)
    assert patterns(layers, parts, others) == found


def test_attention_under_two_names_is_a_config_that_older_readers_refuse():
    kv = KVGrid(PerToken(8), None)
    own = native.describe({}, [], torch.bfloat16, {}, (kv, ["*.self_attn", "*.mixer"]), {})
    assert own["version"] == 6 and native.kv_of(own)[1] == ("*.self_attn", "*.mixer")
    native.check(own)


def test_heads_that_differ_share_no_rotation_of_keys(model, monkeypatch):
    one = described(read_config(str(model)))
    wide = replace(one.kinds[0], heads=replace(one.kinds[0].heads, count=2, width=32))
    two = Described(one.frame, (one.kinds[0], wide), (0, 1, 0, 1))
    monkeypatch.setattr("lowbit.model.outline.described", lambda config: two)
    config = read_config(str(model))
    with pytest.raises(LowbitError, match="--set quarot.keys=false"):
        make_plan(config, load_recipe("quarot", scheme=parse_scheme("W4A4KV4")))
    off = load_recipe("quarot", scheme=parse_scheme("W4A4KV4"), settings=("quarot.keys=false",))
    assert make_plan(config, off).outline.key_rotation is None


# --- beside ---------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(H, F, bias=False) for _ in range(2))
        self.down = nn.Linear(F, H, bias=False)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


class Routed(nn.Module):
    """x + two experts weighted by a router that reads what they read."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(H, eps=1e-6)
        self.router = nn.Parameter(torch.zeros(2, H))
        self.one, self.two = Expert(), Expert()

    def forward(self, x):
        n = self.norm(x)
        share = (n @ self.router.T).softmax(-1)
        return x + share[..., :1] * self.one(n) + share[..., 1:] * self.two(n)


READS = ("one.gate", "one.up", "two.gate", "two.up")
ROUTED = Graph(
    sites=(
        Site(READS, Source("norm", "norm"), "", residual=True, beside=("router",)),
        Site(("one.down",), Source("one.up", "linear"), "one.down"),
        Site(("two.down",), Source("two.up", "linear"), "two.down"),
    ),
    writers=("one.down", "two.down"),
    inner=("one.down", "two.down"),
)


def routed(own=torch.float32, stored=torch.bfloat16):
    """A block whose router the checkpoint stores in another dtype than the rest."""
    generator = torch.Generator().manual_seed(0)
    module = Routed()
    weights = {
        n: (torch.randn(p.shape, generator=generator) * 0.3).to(own if n == "router" else stored)
        for n, p in module.named_parameters()
    }
    weights["norm.weight"] = weights["norm.weight"].abs() + 0.5
    x = torch.randn(4, 5, H, generator=generator)
    context = Context(
        name="model.layers.0",
        module=module.to("meta"),
        graph=ROUTED,
        kwargs={},
        compute=torch.float32,
        stored=stored,
        dtypes={"router": own},
        grids=dict.fromkeys(ROUTED.linears, Affine(4, 16)),
        x=x,
        xq=x,
        target=x,
        tuned_rows=4,
        seed=0,
    )
    return Block(context, {n: w.float() for n, w in weights.items()})


FACTOR = torch.rand(H, generator=torch.Generator().manual_seed(1)) * 3 + 0.2


@pytest.mark.parametrize(
    "own, kept, within",
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float16, torch.float32, 1e-4),
    ],
)
def test_a_fold_makes_up_for_it_in_a_router(own, kept, within):
    block = routed(own)
    assert torch.equal(block.kept("router").float(), block.weights["router"])
    folded = fold(block, ROUTED.sites[0], FACTOR)
    gain = block.weights["norm.weight"] / folded.weights["norm.weight"]
    ratio = folded.weights["router"] / block.weights["router"]
    torch.testing.assert_close(ratio, gain.expand_as(ratio), rtol=1e-2, atol=0)
    torch.testing.assert_close(
        folded.forward(block.x), block.forward(block.x), rtol=within, atol=within
    )
    stored = folded.kept("router")
    assert stored.dtype == kept and torch.equal(stored.float(), folded.weights["router"])


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_rotation_and_an_order_make_up_for_it_in_a_router(own):
    block = routed(own, torch.float32)
    x, y = block.x, block.forward(block.x)
    order = torch.randperm(H, generator=torch.Generator().manual_seed(2))
    ordered = replace(block, weights=order_block(block.weights, ROUTED, order))
    torch.testing.assert_close(ordered.forward(x[..., order]), y[..., order])
    basis = Basis.random(H, False, 0)
    turned = replace(
        block, weights=rotate_block(block.weights, ROUTED, basis, torch.float32, {"router": own})
    )
    found = turned.forward(basis.rotate(x).float())
    torch.testing.assert_close(found, basis.rotate(y).float(), rtol=1e-4, atol=1e-4)


def test_a_rotated_router_is_as_it_will_be_stored():
    block, basis = routed(torch.bfloat16), Basis.random(H, False, 0)
    dtypes = {"router": torch.bfloat16}
    turned = rotate_block(block.weights, ROUTED, basis, torch.bfloat16, dtypes)
    block = replace(block, weights=turned)
    assert not torch.equal(turned["router"], routed(torch.bfloat16).weights["router"])
    assert torch.equal(block.kept("router").float(), turned["router"])


@pytest.mark.parametrize("site", [1, 2])
def test_channels_of_one_expert_change_places_and_no_other_moves(site):
    block, order = routed(), torch.randperm(F, generator=torch.Generator().manual_seed(3))
    one, other = (("one", "two"), ("two", "one"))[site - 1]
    moved = reorder(block, ROUTED.sites[site], order)
    torch.testing.assert_close(moved.forward(block.x), block.forward(block.x))
    for name in ("gate", "up"):
        assert torch.equal(moved.weight(f"{one}.{name}"), block.weight(f"{one}.{name}")[order])
        assert moved.weight(f"{other}.{name}") is block.weight(f"{other}.{name}")


def test_channels_that_a_router_reads_change_places_in_it():
    block, order = routed(), torch.randperm(H, generator=torch.Generator().manual_seed(4))
    moved = reorder(block, ROUTED.sites[0], order)
    assert torch.equal(moved.weights["router"], block.weights["router"][:, order])


def test_a_learned_factor_makes_up_for_it_and_no_shift_is_taken():
    block, (site, *_) = routed(), ROUTED.sites
    biased = replace(
        block,
        weights={
            **block.weights,
            **{f"{n}.bias": torch.zeros(len(block.weight(n))) for n in READS},
            "norm.bias": torch.zeros(H),
        },
    )
    assert not shiftable(biased, site) and shiftable(biased, replace(site, beside=()))
    learned = Learned(block, (site,), 0.5)
    changed = learned._transformed()
    assert not torch.equal(changed["router"], block.weights["router"])
    again = replace(block, weights={n: w.detach() for n, w in changed.items()})
    torch.testing.assert_close(again.forward(block.x), block.forward(block.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "site, moves",
    [
        (Site(("a.out",), Source("a.norm", "norm"), "a.out"), False),  # not inside an MLP
        (Site(("m.down",), Source("m.norm", "norm"), "m.down"), True),  # BitNet's
        (Site(("m.down",), Source("m.up", "linear"), "m.down"), True),
        (Site(("m.down",), Source("n.up", "linear"), "m.down"), False),
        (Site(("m.down",), None, "m.down"), False),
    ],
)
def test_which_channels_inside_a_block_may_change_places(site, moves):
    graph = Graph((Site(("m.up", "m.gate"), None, "m"), site), inner=("m.down",))
    assert graph.movable(site) == moves
