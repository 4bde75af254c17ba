"""Experts in blocks: who sees which tokens, what is folded beside the router, who gets a prior."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
import transformers as T
from helpers import apply_methods, model_of, opened, run, save_tiny, staged
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid.names import parse_scheme
from lowbit.methods import _hessian
from lowbit.methods._hessian import input_hessians
from lowbit.methods._rare import of_all, second_moments
from lowbit.model import block as block_module
from lowbit.model import tracing
from lowbit.model.block import Block
from lowbit.model.graph import Graph, Site
from lowbit.model.rewrite import fold
from lowbit.model.statistics import Statistic
from lowbit.model.stream import ModelStream
from lowbit.plan import make_plan
from lowbit.recipe.presets import load_recipe

MIXTURE = "mlp.experts"
EXPERTS = 5


def ids_of(rows, length=24):
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(
        tmp_path_factory.mktemp("moe") / "m", families.config_of("qwen3_moe", vocab_size=300)
    )


@pytest.fixture(scope="module")
def source(folder):
    return ModelStream(folder, compute=torch.float64)


def block_of(source, rows=8, i=0):
    recipe = load_recipe("rtn", scheme=parse_scheme("W4A16g8"))
    return opened(source, recipe, ids_of(rows), i)


def sent(block):
    """(tokens, k) the experts that each token is sent to, by the router's own definition."""
    seen = []
    handle = block.module.get_submodule(MIXTURE).register_forward_pre_hook(
        lambda _, args: seen.append((args[0], args[1]))
    )
    try:
        block.forward(block.x.double())
    finally:
        handle.remove()
    return seen[0]


def test_levels_and_readings(source):
    graph = source.graph(0)
    site = graph.site_of(f"{MIXTURE}.0.up_proj")
    assert site.through == site.reader == MIXTURE
    assert site.probe == "mlp" and site.beside == ("mlp.gate.weight",)
    each = [tuple(f"{MIXTURE}.{i}.{n}" for n in ("up_proj", "gate_proj")) for i in range(EXPERTS)]
    assert list(site.readings) == each
    assert [len(level) for level in graph.levels] == [1, 1, EXPERTS, EXPERTS]
    assert {n for names in graph.readings for n in names} == set(graph.linears)


def test_an_experts_hessian_is_of_the_tokens_sent_to_it(source):
    block = block_of(source, rows=64)
    x, chosen = sent(block)
    names = [f"{MIXTURE}.{i}.up_proj" for i in range(EXPERTS)]
    found = input_hessians(block, names, len(block.x))
    for i, name in enumerate(names):
        own = x[(chosen == i).any(1)]
        assert len(own) >= x.shape[1], "of fewer tokens it would have a prior"
        torch.testing.assert_close(found[name], 2 / len(own) * own.T @ own, rtol=1e-6, atol=1e-9)


def test_tokens_of_each_expert_are_reported(source):
    block = block_of(source)
    _, chosen = sent(block)
    counts = block.notes["tokens_per_expert"][MIXTURE]
    assert counts == [int((chosen == i).sum()) for i in range(EXPERTS)]
    assert sum(counts) == block.x.shape[0] * block.x.shape[1] * chosen.shape[1]


def reached(block, mixture, rows):
    """Tokens of the first rows that each expert's own linear is called with."""
    experts = block.module.get_submodule(mixture)
    counts = [0] * experts.form.count
    handles = []

    def told(number):
        def hook(_, args):
            counts[number] += args[0].shape[:-1].numel()

        return hook

    for i in range(len(counts)):
        up = experts.get_submodule(f"{i}.up_proj")
        handles.append(up.register_forward_pre_hook(told(i)))
    with torch.no_grad():
        block.forward(block.x[:rows].to(block.compute))
    for handle in handles:
        handle.remove()
    return counts


# What is special about how their experts are called.
CALLED = {
    "qwen3_moe": "with choices",
    "llama4_text": "with the rows of all experts",
    "longcat_flash": "with choices that are no experts",
    "gpt_oss": "with choices of biased experts",
}


@pytest.mark.parametrize("family", CALLED)
@pytest.mark.parametrize("fails", [0, 2])
def test_counted_are_tokens_of_rows_that_teach_once(tmp_path, monkeypatch, family, fails):
    """Neither those of held-out rows nor those of a pass that ran out of memory."""
    config = families.config_of(family, vocab_size=300, num_hidden_layers=4)
    source = ModelStream(save_tiny(tmp_path / "m", config), compute=torch.float32)
    at = next(i for i in range(len(source)) if source.graph(i).mixtures)
    monkeypatch.setattr(block_module, "TOKENS_PER_PASS", 5 * 24)  # rows that teach end inside
    real, left = Block.passed, [fails]

    def passed(self, *args, **options):
        made = real(self, *args, **options)
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made

    monkeypatch.setattr(Block, "passed", passed)
    block = opened(source, load_recipe("rtn", scheme=parse_scheme("W4A16g8")), ids_of(12), at)
    monkeypatch.undo()
    assert block.tuned_rows == 8 < len(block.x)
    [(mixture, counts)] = block.notes["tokens_per_expert"].items()
    assert counts == reached(block, mixture, 8) != reached(block, mixture, 12)


def test_a_fold_keeps_the_routing_only_if_the_router_is_made_up_for(source):
    block = block_of(source)
    site = block.graph.site_of(f"{MIXTURE}.0.up_proj")
    rng = torch.Generator().manual_seed(0)
    factor = torch.rand(block.weight(site.reads[0]).shape[1], generator=rng).double() + 0.3
    before, x = block.forward(block.x.double()), block.x.double()
    folded = fold(block, site, factor)
    assert not torch.equal(folded.weights["mlp.gate.weight"], block.weights["mlp.gate.weight"])
    without = fold(block, replace(site, beside=()), factor)
    # The router is rounded to the dtype it is stored in, bfloat16: a token between two experts may
    # go to the other one.
    chosen = sent(block)[1]
    same, kept = ((sent(b)[1] == chosen).all(-1) for b in (folded, without))
    assert same.double().mean() > 0.98 and kept.double().mean() < 0.8
    error, lost = (
        (b.forward(x) - before).flatten(0, 1)[same].abs().max() for b in (folded, without)
    )
    assert error < 1e-3 and lost > 50 * error


def moments(tokens, width=4, seed=0):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).double()
    return Statistic((x.T @ x,), tokens)


def graph_of_experts(count):
    up, down = ([f"experts.{i}.{n}" for i in range(count)] for n in ("up", "down"))
    sites = [Site(tuple(up), None, "", through="experts")]
    return Graph((*sites, *(Site((n,), None, n) for n in down)), mixtures=("experts",))


def test_priors_of_rare_experts():
    """Of 9, 1 and 0 tokens over 4 inputs: enough, few, none."""
    graph = graph_of_experts(3)
    found = {f"experts.{i}.up": moments(n, seed=i) for i, n in enumerate((9, 1, 0))}
    pool = of_all(found, list(found))
    assert pool.tokens == 10
    means = second_moments(graph, found, lambda site: pool)
    everyone = sum(s.value for s in found.values()) / 10
    torch.testing.assert_close(means["experts.0.up"], found["experts.0.up"].value / 9)
    torch.testing.assert_close(
        means["experts.1.up"], (found["experts.1.up"].value + 0.3 * everyone) / 1.3
    )
    torch.testing.assert_close(means["experts.2.up"], everyone)
    for name in found:  # alone
        own = second_moments(graph, {name: found[name]}, lambda site: pool)
        assert torch.equal(own[name], means[name])
    found = {f"experts.{i}.down": moments(n, seed=i) for i, n in enumerate((9, 1, 0))}
    means = second_moments(graph, found, pytest.fail)
    for i, tokens in enumerate((9, 1, 1)):
        own = found[f"experts.{i}.down"].value / tokens
        torch.testing.assert_close(means[f"experts.{i}.down"], own)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "deepseek_v3"])
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("recipe", ["gptq", "claq"])
def test_codes_do_not_depend_on_how_many_experts_are_looked_at_together(
    tmp_path, monkeypatch, family, at_once, recipe
):
    """Of few tokens, which reach no expert of some parts at all."""
    config = families.config_of(family, vocab_size=300, num_experts_per_tok=1)
    source = ModelStream(save_tiny(tmp_path / "m", config), compute=torch.float32)
    scheme = parse_scheme("W3A16:column" if recipe == "claq" else "W3A16g8")
    loaded = load_recipe(recipe, scheme=scheme)
    at = next(i for i in range(len(source)) if source.graph(i).mixtures)
    block = opened(source, loaded, torch.tensor([[7] * 3 + [9] * 3] * 2), at)
    [counts] = block.notes["tokens_per_expert"].values()
    assert 0 in counts
    whole = apply_methods(block, loaded)
    passes = []
    real = Block.statistics
    monkeypatch.setattr(
        Block, "statistics", lambda *a, **k: (passes.append(k.get("pooled")), real(*a, **k))[1]
    )
    monkeypatch.setattr(_hessian, "_AT_ONCE", at_once * 8 * 64**2)
    cut = apply_methods(block, loaded)
    assert cut.notes.get("trouble") == whole.notes.get("trouble")
    for name, q in whole.coded.items():
        assert torch.equal(cut.coded[name].codes, q.codes), name
    assert passes.count(True) == 1, "made once, for all parts"


@pytest.mark.parametrize("recipe", ["rtn", "awq", "gptq", "claq", "smoothquant+gptq", "omniquant"])
def test_experts_that_no_token_reaches(folder, recipe):
    """One row of four tokens: most experts see nothing, and all are coded."""
    source = ModelStream(folder)
    settings = ["omniquant.epochs=1"] if recipe == "omniquant" else []
    if recipe == "claq":
        loaded = load_recipe("claq", scheme=parse_scheme("W3A16:column"))
    else:
        loaded = load_recipe(recipe, scheme=parse_scheme("W3A16g8"), settings=settings)
    ids = ids_of(1, 4)
    model, blocks = staged(source, loaded, ids), []
    for after in run(model, model.entered(ids), blocks.append):
        assert bool(torch.isfinite(after.xq.float()).all())
    assert [len(b.coded) for b in blocks] == [len(b.graph.linears) for b in blocks]
    assert any(0 in b.notes["tokens_per_expert"][MIXTURE] for b in blocks)


def test_learning_where_some_experts_see_no_token_of_a_batch(folder):
    source = ModelStream(folder)
    settings = ["tesseraq.iters=2", "tesseraq.batch=1"]
    loaded = load_recipe("tesseraq-fast", scheme=parse_scheme("W3A16g8"), settings=settings)
    ids = ids_of(4, 8)
    model = model_of(source, loaded, ids)
    losses = []
    for after in run(model, model.entered(ids)):
        losses.append(float((after.x.float() - after.xq.float()).square().mean()))
    nearest = load_recipe("rtn", scheme=parse_scheme("W3A16g8"))
    plain = [
        float((s.x.float() - s.xq.float()).square().mean())
        for s in run(model_of(source, nearest, ids), model.entered(ids))
    ]
    assert losses[0] < plain[0]


@pytest.mark.parametrize("recipe", ["awq", "smoothquant+rtn", "crossquant-deploy", "quarot+rtn"])
def test_what_folds_change_is_measured_in_every_block(folder, recipe):
    source = ModelStream(folder)
    loaded = load_recipe(recipe, scheme=parse_scheme("W4A8"))
    ids = ids_of(4, 12)
    model, blocks = staged(source, loaded, ids), []
    for _ in run(model, model.entered(ids), blocks.append):
        pass
    errors = [b.notes["fold_error"] for b in blocks]
    assert all(0 <= e < 2e-2 for e in errors) and any(errors)


@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v3",
        "ernie4_5_moe",
        "glm4_moe",
        "gpt_oss",
        "granitemoe",
        "hunyuan_v1_moe",
        "llama4_text",
        "mixtral",
        "nemotron_h",
        "olmoe",
        "qwen2_moe",
        "qwen3_5_moe_text",
        "qwen3_next",
    ],
)
def test_mixtures_of_other_families(family, tmp_path):
    """The first block of every kind: all its linears are coded, GPTQ better than to nearest."""
    source = ModelStream(save_tiny(tmp_path / "m", families.config_of(family)))
    described = source.described
    assert any(graph.mixtures for graph in described.kinds)
    nearest, solved = (load_recipe(n, scheme=parse_scheme("W3A16g8")) for n in ("rtn", "gptq"))
    for kind in range(len(described.kinds)):
        i = described.of_layers.index(kind)
        errors = []
        for recipe in (nearest, solved):
            block = apply_methods(opened(source, recipe, ids_of(8), i), recipe)
            assert set(block.coded) == set(block.graph.linears)
            now = replace(block, weights=block.decoded()).forward(block.x.float())
            errors.append(float((now - block.target.float()).square().mean()))
        assert errors[1] < errors[0]


@pytest.mark.parametrize("windows", [1, 20])
def test_mixtures_are_analyzed(folder, tmp_path, windows):
    """One window of four tokens leaves most experts without any."""
    options = ("--text", folder / "text.txt", "--length", 4, "--windows", windows)
    found = CliRunner().invoke(
        app, list(map(str, ("analyze", folder, *options, "-o", tmp_path / "a")))
    )
    assert found.exit_code == 0, found.output
    said = (tmp_path / "a" / "analysis.json").read_text()
    assert "mlp.experts." in said


def test_encoders_are_no_decoders():
    config = T.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    with pytest.raises(LowbitError, match="look at tokens to come"):
        tracing.described(config)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("scheme", "fits"), [("W4A16g8", False), ("W3A16g8sym", False), ("W4A16g8sym", True)]
)
def test_servers_take_experts_on_symmetric_grids(target, scheme, fits):
    recipe = load_recipe("rtn", scheme=parse_scheme(scheme))
    reasons = " ".join(make_plan(families.config_of("qwen3_moe"), recipe).verdict(target).reasons)
    assert ("takes experts of 4 or 8 bits on symmetric grids" in reasons) is not fits
