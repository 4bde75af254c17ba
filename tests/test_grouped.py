"""Experts all at once against one by one: the same numbers, taken where they can be."""

from __future__ import annotations

import families
import pytest
import torch
from helpers import opened, save_tiny
from torch import nn

from lowbit.errors import LowbitError
from lowbit.grid.names import parse_scheme
from lowbit.methods import _soft
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._rounding import Adam
from lowbit.methods._rounding.hardening import quantiles
from lowbit.methods._soft import SoftBlock
from lowbit.methods.tesseraq import TesseraQ
from lowbit.model import experts as experts_module
from lowbit.model.grouped import chosen, stacked
from lowbit.model.hooks import quantized_inputs
from lowbit.model.stream import ModelStream
from lowbit.recipe.presets import load_recipe

# What is special about the experts of each.
FAMILIES = {
    "qwen3_moe": "gate and up beside each other",
    "gpt_oss": "interleaved, biased, a gate of their own",
    "nemotron_h": "no gate",
    "longcat_flash": "choices that are no experts",
    "llama4_text": "called with the rows of all experts",
    "granitemoe": "a dense mixture's own names",
}
QUICK = TesseraQ(schedule="exponential-4-3", iters=2, batch=2)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Family -> a block of it with experts, float32, opened once."""
    made = {}

    def of(family, **more):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            config = families.config_of(family, vocab_size=300, **more)
            source = ModelStream(save_tiny(folder / "m", config), compute=torch.float32)
            described = source.described
            kind = next(k for k, g in enumerate(described.kinds) if g.mixtures)
            ids = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(1))
            recipe = load_recipe("rtn", scheme=parse_scheme("W3A16g8"))
            made[family] = opened(source, recipe, ids, described.of_layers.index(kind))
        return made[family]

    return of


@pytest.fixture
def products(monkeypatch):
    """How many grouped products were made, as a list of their experts."""
    seen = []
    real = experts_module.grouped_linear

    def counted(x, linears, ends):
        seen.append(len(linears))
        return real(x, linears, ends)

    monkeypatch.setattr(experts_module, "grouped_linear", counted)
    return seen


def step(block, monkeypatch, way, compute=torch.float32):
    """Loss and gradients of one step."""
    monkeypatch.setenv("LOWBIT_EXPERTS", way)
    block = block.computing(compute)
    soft, job = SoftBlock(block), Reconstruction(block, 4)
    with torch.no_grad():
        weights = soft.weights()
    loss, gradients = job.gradients(weights, soft.keys, job.draw())
    return [loss, *gradients]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_the_loop(blocks, family, monkeypatch, products):
    block = blocks(family)
    loop = step(block, monkeypatch, "loop")
    assert not products
    grouped = step(block, monkeypatch, "grouped")
    parts = 2 if family == "nemotron_h" else 3
    assert len(products) == parts and set(products) == {families.SIZES["num_experts"]}
    size = max(float(t.abs().max()) for t in loop[1:])
    for one, other in zip(loop, grouped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * size)
    for one, other in zip(grouped, step(block, monkeypatch, "grouped"), strict=True):
        assert torch.equal(one, other)


def test_steps_in_bfloat16(blocks, monkeypatch, products):
    block = blocks("qwen3_moe")
    loop, grouped = (step(block, monkeypatch, w, torch.bfloat16) for w in ("loop", "grouped"))
    assert len(products) == 3
    for one, other in zip(loop, grouped, strict=True):
        error = (one.float() - other.float()).norm()
        assert error <= 2e-2 * one.float().norm()


def test_tesseraq_ends_where_the_loop_does(blocks, monkeypatch):
    block, found = blocks("qwen3_moe"), []
    for way in ("loop", "grouped", "grouped"):
        monkeypatch.setenv("LOWBIT_EXPERTS", way)
        found.append(QUICK(block))
    loop, grouped, again = (b.notes["tesseraq"] for b in found)
    assert grouped["before"] == loop["before"] > grouped["after"]
    assert grouped["after"] == pytest.approx(loop["after"], rel=1e-2)
    assert again == grouped
    for name, q in found[1].coded.items():
        assert q.same_as(found[2].coded[name]) is None


def linears(count, rows=8, columns=16, **options):
    made = []
    for _ in range(count):
        expert = nn.Module()
        expert.up_proj = nn.Linear(columns, rows, **options)
        expert.down_proj = nn.Linear(rows, columns, **options)
        made.append(expert)
    return made


WIDE = dict(rows=512, columns=256)


@pytest.mark.parametrize(
    ("made", "asked", "way"),
    [
        (lambda: linears(32), None, "grouped"),
        (lambda: linears(31), None, "loop"),
        (lambda: linears(32, **WIDE), None, "loop"),
        (lambda: linears(32), "loop", "loop"),
        (lambda: linears(2, **WIDE), "grouped", "grouped"),
        (lambda: linears(32, dtype=torch.float64), "grouped", "loop"),
        (lambda: linears(32, rows=6), "grouped", "loop"),
        (lambda: [m.requires_grad_(False) for m in linears(32)], "grouped", "loop"),
        (lambda: linears(32, device="meta"), None, "grouped"),
    ],
)
def test_which_way_is_taken(made, asked, way, monkeypatch):
    monkeypatch.delenv("LOWBIT_EXPERTS", raising=False)
    if asked is not None:
        monkeypatch.setenv("LOWBIT_EXPERTS", asked)
    assert chosen(made()) == way
    with torch.no_grad():
        assert chosen(made()) == "loop"


def test_a_way_that_is_none(monkeypatch):
    monkeypatch.setenv("LOWBIT_EXPERTS", "grouped_mm")
    said = "unknown way to compute experts in LOWBIT_EXPERTS 'grouped_mm': did you mean 'grouped'"
    with pytest.raises(LowbitError, match=said):
        chosen(linears(1))


def test_quantized_inputs_are_seen_one_by_one(monkeypatch):
    monkeypatch.setenv("LOWBIT_EXPERTS", "grouped")
    made = linears(2)
    whole = nn.ModuleList(made)
    with quantized_inputs(whole, {"1.down_proj": lambda x: x}):
        assert chosen(made) == "loop"
    assert chosen(made) == "grouped"


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("apart", [8, 12])
def test_stacked_weights_are_not_copied(start, apart):
    flat = torch.arange(100.0)
    views = [flat[start + i * apart :][:8].view(2, 4).requires_grad_() for i in range(3)]
    made = stacked(views)
    assert made.data_ptr() == views[0].data_ptr() and torch.equal(made, torch.stack(views))
    found = torch.autograd.grad((made * made).sum(), views)
    assert all(torch.equal(g, 2 * v) for g, v in zip(found, views, strict=True))


@pytest.mark.parametrize("case", ["apart", "uneven", "not aligned", "turned"])
def test_stacked_weights_that_are_copied(case):
    flat = torch.arange(100.0)
    views = {
        "apart": [torch.ones(2, 4), torch.ones(2, 4)],
        "uneven": [flat[i : i + 8].view(2, 4) for i in (0, 8, 24)],
        "not aligned": [flat[i : i + 8].view(2, 4) for i in (0, 9)],
        "turned": [flat[i : i + 8].view(4, 2).T for i in (0, 8)],
    }[case]
    made = stacked(views)
    assert torch.equal(made, torch.stack(views)) and made.data_ptr() != views[0].data_ptr()


# --- linears of a bucket together -----------------------------------------------------------------


def test_linears_together_move_as_one_by_one(blocks, monkeypatch):
    block, found = blocks("qwen3_moe"), []
    for most in ((0, 0), (1 << 13, 1 << 14)):
        monkeypatch.setitem(_soft._TOGETHER, "cpu", most)
        soft = SoftBlock(block)
        soft.start()
        g = torch.Generator().manual_seed(0)
        gradients = [torch.randn(block.weight(n).shape, generator=g) for n in soft.names]
        for number in (1, 2):
            soft.weights()
            soft.descend(gradients, Adam(1e-1, number), 1e-4)
            soft.harden(0.7)
        found.append((len(soft._runs), soft.snapshot()))
    (apart, one), (joined, other) = found
    assert apart == len(soft.names) and joined < apart / 3
    for pair, again in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, again, strict=True))


@pytest.mark.parametrize("q", [0.0, 0.05, 0.333, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 1001])
def test_quantiles_of_rows(n, q):
    values = torch.rand(5, n, generator=torch.Generator().manual_seed(n)) / 2
    values[:, n // 3 :] = 0.5
    values[3] = 0.25
    assert torch.equal(quantiles(values, q, by_rank=True), quantiles(values, q, by_rank=False))
