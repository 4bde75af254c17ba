"""A method and a grid added from outside, by the steps and with the code of docs/add-a-method.md and
docs/add-a-grid.md: nothing but the files and lines of these pages.
"""

import json
import re
import sys
import textwrap
import threading
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import test_axes
import test_layouts
import torch
import transformers as T
from helpers import apply_methods, opened, planned, save_tiny

import lowbit
from lowbit.artifact.files import read_shard
from lowbit.artifact.proof import verify
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats import LAYOUTS, native, packing
from lowbit.grid import GRIDS, Affine, GroupedGrid, PerToken
from lowbit.grid.names import parse_grid, parse_scheme
from lowbit.methods import AWQ, GPTQ, METHODS, RTN, TesseraQ
from lowbit.methods.cost import Cost, Work
from lowbit.methods.entry import Entry
from lowbit.model.model import Streams
from lowbit.model.ranks import Ranks
from lowbit.model.stream import ModelStream
from lowbit.plan import make_plan, read_config
from lowbit.plan.speed import run_work
from lowbit.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"
IDS = torch.randint(3, 280, (8, 24), generator=torch.Generator().manual_seed(0))
QUICK = dict(schedule="exponential-4-6", iters=8, lr=3e-2)


def blocks_of(page, language="python"):
    """The code of a page, block by block."""
    text = (DOCS / page).read_text()
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [textwrap.dedent(code) for code in found]


def module(name, code, monkeypatch):
    """A file of the library, as if it lay there."""
    made = module_from_spec(spec_from_loader(name, None))
    made.__package__ = name.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(code, name, "exec"), vars(made))
    return made


def row(line, **names):
    """Key and value of one line of a table."""
    ((key, value),) = eval(f"{{{line}}}", names).items()
    return key, value


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["add-a-method.md", "add-a-grid.md"])
def test_a_page_has_few_steps_and_names_what_there_is(page):
    text = (DOCS / page).read_text()
    steps = [int(n) for n in re.findall(r"^(\d+)\. ", text, re.M)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) <= 8
    root = DOCS.parent
    for path in re.findall(r"`([\w./<>]+(?:\.py|/))`", text):
        if "<" not in path:
            assert (root / path).exists() or (root / "src/lowbit" / path).exists(), path
    for code in blocks_of(page):
        assert max(map(len, code.splitlines())) <= 100


def test_the_pages_list_all_fields_and_all_capabilities():
    method, grid = ((DOCS / f"add-a-{what}.md").read_text() for what in ("method", "grid"))
    listed = re.findall(r"^ +\| `(\w+)` \|", method, re.M)
    assert listed == [f for f in Entry.__dataclass_fields__ if f not in ("kind", "role")]
    listed = re.findall(r"^ +\| `(\w+)` \|", grid, re.M)
    capabilities = sys.modules["lowbit.grid.base"].__doc__
    assert listed == re.findall(r"^    (\w*Grid) +\S", capabilities, re.M)


# --- a method -------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """The class of the page's method, in the table by the page's line."""
    code, line = blocks_of("add-a-method.md")
    made = module("lowbit.methods.biascorrection", code, monkeypatch)
    monkeypatch.setitem(METHODS, *row(line, Entry=Entry, biascorrection=made))
    return made.BiasCorrection


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("opt"), "opt", torch.float32)


def first_block(model, recipe, rows=IDS, **context):
    stream = ModelStream(model)
    if not context:
        return opened(stream, recipe, rows)
    x = stream.embed(rows)
    streams = Streams(x, x, len(IDS), **context)
    begun = planned(stream, recipe).model(stream, IDS, **context)
    return begun.begin(0, streams, stream.block_kwargs(rows.shape[1])[0])


def seen_by(layer, model, ids):
    """linear -> mean of its inputs when a plain transformers model runs."""
    found, hooks = {}, []
    for name, linear in layer.named_modules():
        if isinstance(linear, torch.nn.Linear):
            keep = lambda _, args, name=name: found.update({name: args[0].flatten(0, -2).mean(0)})  # noqa: E731
            hooks.append(linear.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_its_means_are_of_what_really_reaches_the_linears(toy, opt):
    """Biases against a plain transformers model that holds the decoded weights."""
    recipe = Recipe(Affine(2), (RTN(), toy()))
    done = apply_methods(first_block(opt, recipe), recipe)
    floating, quantized = (T.AutoModelForCausalLM.from_pretrained(opt) for _ in range(2))
    layer, plain = (m.model.decoder.layers[0] for m in (quantized, floating))
    expected = seen_by(plain, floating, IDS)
    with torch.no_grad():
        for name, q in done.coded.items():
            layer.get_submodule(name).weight.copy_(q.decode())
        before = seen_by(layer, quantized, IDS)
        for site in done.graph.sites:
            met = seen_by(layer, quantized, IDS)
            for name in site.reads:
                linear, weight = layer.get_submodule(name), plain.get_submodule(name).weight
                linear.bias += weight @ expected[name] - linear.weight @ met[name]
                torch.testing.assert_close(
                    done.weights[f"{name}.bias"], linear.bias, rtol=1e-4, atol=1e-5
                )
    # What a pass with float weights gives is off, so that the test can tell.
    wrong, right = expected["fc2"], before["fc2"]
    assert float((wrong - right).norm() / right.norm()) > 0.1


@pytest.mark.parametrize("before", [(), (RTN(),), (AWQ(exponents=4, shrinks=3),), (GPTQ(),)])
def test_it_helps_and_leaves_codes(toy, opt, before):
    """Also where no method of the recipe codes: then it finds what nearest rounding makes."""
    recipe = Recipe(Affine(3), (*before, toy()))
    plain = apply_methods(first_block(opt, recipe), replace(recipe, methods=before))
    done = apply_methods(first_block(opt, recipe), recipe)
    assert done.notes["loss_after"] < 0.9 * plain.notes["loss_after"]
    assert all(q.same_as(done.coded[n]) is None for n, q in plain.coded.items())


@pytest.mark.parametrize(
    "late, words",
    [(RTN(), "everything is coded"), (TesseraQ(), "a learner comes before a refiner")],
)
def test_its_role_is_behind_codes(toy, late, words):
    with pytest.raises(LowbitError, match=words):
        Recipe(Affine(4), (toy(), late))
    recipe = Recipe(Affine(4, 16), (late, toy(5)), activations=PerToken(8))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "[biascorrection]\nrows = 5" in recipe.to_toml()
    (preset,) = blocks_of("add-a-method.md", "toml")
    assert Recipe.from_toml(preset) == Recipe(Affine(4, 128), (RTN(), toy()), name="biascorrection")


def test_bad_options_of_it_are_refused(toy):
    with pytest.raises(LowbitError, match="biascorrection needs rows >= 0"):
        toy(-1)
    with pytest.raises(LowbitError, match="option of biascorrection in here 'row'.*rows"):
        Recipe.from_dict({"methods": ["biascorrection"], "biascorrection": {"row": 1}}, "here")


def test_a_plan_counts_it(toy, opt, monkeypatch):
    config, recipe = read_config(str(opt)), Recipe(Affine(4), (RTN(), toy()))
    made, plain = (make_plan(config, r, 8, 24) for r in (recipe, Recipe(Affine(4))))
    passes = made.shapes.forward(8 * (1 + len(made.outline.kinds[0].graph.sites)))
    found = (run_work(p.recipe, p.shapes_of, (0, 0)) for p in (made, plain))
    work, without = (sum(parts.values(), Work()) for parts in found)
    assert work == without + passes * 2
    assert set(made.memory.steps) == {*plain.memory.steps, "biascorrection"}

    def dear(method, shapes):
        return Cost(held=1 << 40, least=1 << 39, work=Work(single=1e15))

    monkeypatch.setitem(METHODS, "biascorrection", Entry(toy, "refiner", dear))
    made = make_plan(config, recipe, 8, 24)
    assert max(made.memory.steps, key=made.memory.steps.get) == "biascorrection"
    dearer = sum(run_work(recipe, made.shapes_of, (0, 0)).values(), Work())
    assert dearer.single == without.single + 2e15
    with pytest.raises(LowbitError, match="does not fit.*in 'biascorrection'"):
        made.memory.check(torch.device("cpu"), lambda _: 1 << 38)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_it_keeps_what_all_methods_promise(toy, tmp_path, name):
    stream = ModelStream(save_tiny(tmp_path / name, name, torch.float32))
    for grid in ("W3g16", "W2:column", "mxfp4"):
        test_axes.test_a_method_ends_on_the_grid_or_refuses_in_words(stream, "biascorrection", grid)
    test_axes.test_a_method_is_deterministic(stream, "biascorrection")
    test_axes.test_what_is_coded_already_stays(stream, "biascorrection")
    test_axes.test_what_no_code_stands_for_is_as_it_will_be_stored(tmp_path / "b", "biascorrection")
    test_axes.test_the_role_of_a_method_is_its_place()


class Pair(Ranks):
    """One of two ranks in threads of one process: sums are added over both."""

    def _reduce(self, tensors, operation):
        meeting, held = self.patient
        for t in tensors:
            held[self.rank] = t
            meeting.wait()
            total = held[0] + held[1]
            meeting.wait()
            t.copy_(total)


def test_ranks_share_its_means(toy, opt):
    recipe = Recipe(Affine(3), (toy(5),))
    alone = toy(5)(RTN()(first_block(opt, recipe)))
    talk, found = (threading.Barrier(2, timeout=60), [None, None]), {}
    blocks = [
        RTN()(first_block(opt, recipe, IDS[r::2], ranks=Pair(r, 2, patient=talk))) for r in range(2)
    ]

    def work(rank):
        found[rank] = toy(5)(blocks[rank]).weights

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    half = toy(3)(RTN()(first_block(opt, recipe, IDS[::2]))).weights
    for key in (f"{n}.bias" for n in alone.graph.linears):
        assert torch.equal(found[0][key], found[1][key])
        torch.testing.assert_close(found[0][key], alone.weights[key], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(half[key], alone.weights[key], rtol=1e-3, atol=1e-4)
    assert "rank" not in blocks_of("add-a-method.md")[0]


@pytest.fixture
def here(monkeypatch):
    """Verified without the loader, which is a process that knows nothing of this file."""
    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))


def quantized(model, recipe, out, **options):
    text = f"{model}/text.txt"
    options |= dict(calib=text, samples=8, length=32, device="cpu")
    return lowbit.quantize(str(model), recipe=recipe, out=out, **options)


def test_it_is_quantized_with_verified_and_resumed(toy, here, tmp_path):
    model = save_tiny(tmp_path / "m", "opt")
    recipe = Recipe(Affine(3), (RTN(), toy()))
    done = quantized(model, recipe, tmp_path / "out")
    assert done.report["recipe"]["methods"] == ["rtn", "biascorrection"]
    assert verify(tmp_path / "out", loader=False).linears == 12

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(model, recipe, tmp_path / "again", progress=stop)
    quantized(model, recipe, tmp_path / "again")
    for shard in done.report["shards"]:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "again" / shard).read_bytes()


# --- a grid ---------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch):
    """The class of the page's grid, in both tables by the page's lines."""
    code, kinds, layout, line = blocks_of("add-a-grid.md")
    made = module("lowbit.grid.log", code, monkeypatch)
    named = {kind.__name__: kind for kind in (*GRIDS, made.Log)}
    given = re.search(r"= (\(.*\))", kinds)[1]
    monkeypatch.setattr("lowbit.grid.names.GRIDS", eval(given, named))
    written = module("lowbit.formats.log", layout, monkeypatch)
    monkeypatch.setitem(LAYOUTS, *row(line, Log=made.Log, log=written))
    return made.Log


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_its_numbers_are_those_of_a_loop(log, bits):
    grid, w = log(bits), torch.randn(5, 16, generator=torch.Generator().manual_seed(bits))
    params = grid.stored(grid.fit(w), torch.bfloat16)
    levels = [0.0, *(s * 2.0**-k for k in range(2 ** (bits - 1) - 1) for s in (1, -1))]
    expected = torch.tensor(
        [
            [min((v * s for v in levels), key=lambda v: abs(v - x)) for x in row]
            for row, s in zip(w.tolist(), params.scale[:, 0].tolist(), strict=True)
        ]
    )
    codes = grid.encode(w, params)
    assert torch.equal(grid.decode(codes, params), expected)
    assert int(codes.max()) == 2**bits - 2
    around = grid.neighbours(w, params)
    low, high = (grid.decode(c, params) for c in around[:2])
    inside = w.abs() < params.scale
    between = low + around.fraction * (high - low)
    torch.testing.assert_close(between[inside], w[inside], rtol=1e-5, atol=1e-6)
    assert bool((around.low < around.high)[inside].all())
    up = grid.beside(codes, torch.ones_like(w), params)
    assert bool((grid.decode(up, params) >= expected).all())
    for column in (0, 7):
        one = grid.take(params, column).encode(w[:, column, None])
        assert torch.equal(one[:, 0], codes[:, column])


def test_its_layout_is_one_as_all(log):
    for kept in (False, True):
        test_layouts.test_a_layout_says_what_it_packs(log(3), kept)
    test_layouts.test_a_layout_is_read_from_what_configs_say(log(3))
    packed = packing.pack(test_layouts.on(log(3)), torch.bfloat16)
    del packed["weight_log"]
    with pytest.raises(LowbitError, match="'w' is not a packed log3 weight: 'weight_log'"):
        packing.unpack(packed, log(3), "w")


@pytest.mark.parametrize("text", ["log3", "log4+A8", "LOG2+A8KV4", "log3+KV8"])
def test_its_name_is_read_in_schemes_and_recipes(log, text):
    scheme = parse_scheme(text)
    assert isinstance(scheme.weights, log) and str(scheme).lower() == text.lower()
    recipe = Recipe(Affine(4), overrides=(("*.fc1", scheme.weights),)).with_scheme(scheme)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    test_axes.test_the_name_of_a_grid_reads_back(scheme.weights.name)
    with pytest.raises(LowbitError, match="log takes 2 to 4 bits, got 7"):
        parse_scheme("log7")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_it_or_refuses_in_words(log, name, opt):
    test_axes.test_a_method_ends_on_the_grid_or_refuses_in_words(ModelStream(opt), name, "log3")


def test_methods_get_better_on_it(log, opt):
    def loss(*methods):
        recipe = Recipe(log(3), methods)
        return apply_methods(first_block(opt, recipe), recipe).notes["loss_after"]

    learner = TesseraQ(**QUICK)
    rtn, gptq, learned, both = loss(RTN()), loss(GPTQ()), loss(learner), loss(GPTQ(), learner)
    assert max(gptq, learned) < 0.9 * rtn
    assert both < 0.9 * min(gptq, learned)


def test_a_plan_knows_it(log, opt):
    plan = make_plan(read_config(str(opt)), Recipe(log(3)), 8, 24)
    packed = sum(
        16 + rows * (4 * -(-width * 3 // 32) + 2) for rows, width in plan.outline.shapes.values()
    )
    assert plan.packed == packed
    assert plan.beyond == "powers of two"
    assert [v.runtime for v in plan.runtimes if v.accepts] == ["transformers"]
    assert "lowbit, for powers of two" in plan.verdict("transformers").notes[0]
    assert all("is on log3, " in v.reasons[-1] for v in plan.runtimes if not v.accepts)
    with pytest.raises(LowbitError, match="compressed-tensors cannot carry powers of two"):
        type(plan).of(plan.outline, plan.recipe, plan.setting, plain=True)


@pytest.mark.parametrize("methods", [(RTN(),), (GPTQ(),), (TesseraQ(**QUICK),)])
def test_it_is_quantized_to_and_verified(log, here, tmp_path, methods):
    model = save_tiny(tmp_path / "m")
    recipe = Recipe(log(3), methods, (("*.down_proj", Affine(4, 16)),))
    out = tmp_path / "out"
    done = quantized(model, recipe, out)
    assert done.report["format"] == native.NAME
    assert Recipe.from_toml((out / "recipe.toml").read_text()).grid == log(3)
    assert verify(out, loader=False).linears == 14
    name = "model.layers.0.mlp.up_proj"
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert native.grid_of(said, name) == log(3)
    shards = done.report["shards"].items()
    shard = next(s for s, r in shards if f"{name}.weight_log" in r["tensors"])
    codes = packing.unpack(packing.local_tensors(read_shard(out / shard), name), log(3), name).codes
    assert codes.unique().tolist() == list(range(7))
    proof = read_shard(out / "proof" / "logits.safetensors")
    loaded = T.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(proof["ids"]).logits[:, -proof["logits"].shape[1] :]
    torch.testing.assert_close(logits, proof["logits"], rtol=1e-4, atol=1e-4)


def test_where_it_is_not_known_its_artifacts_are_refused_in_words(log, here, tmp_path):
    """By a version of the library that has no line for it."""
    quantized(save_tiny(tmp_path / "m"), Recipe(log(3)), tmp_path / "out")
    del LAYOUTS[log]
    with pytest.raises(VerificationError, match=r"does not know \('log'\)"):
        verify(tmp_path / "out", loader=False)


def test_a_grid_with_less_can_do_less(log):
    assert not issubclass(log, GroupedGrid)
    with pytest.raises(LowbitError, match="omniquant learns ranges of uniform grids"):
        Recipe(log(3), (METHODS["omniquant"].kind(),))
    assert parse_grid("log3") == log(3)
