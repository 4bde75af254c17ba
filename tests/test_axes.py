"""The two axes of the library against each other: every method of the table on every kind of grid,
and every method against what all of them promise.
"""

from dataclasses import replace

import pytest
import torch
import transformers as T
from helpers import LLAMA, apply_methods, opened, planned, save_tiny, staged

from lowbit.errors import LowbitError
from lowbit.grid import (
    GRIDS,
    Affine,
    Codebook,
    ColumnGrid,
    KQuant,
    OrderedGrid,
    PerToken,
    RangedGrid,
)
from lowbit.grid.names import parse_grid
from lowbit.methods import METHODS, ROLES, RTN
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

IDS = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))
QUICK = {  # the same code in fewer steps
    "tesseraq": dict(schedule="exponential-4-3", iters=3, batch=4),
    "omniquant": dict(epochs=1),
    "awq": dict(exponents=4, shrinks=3),
    "claq": dict(outlier_bits=0.14),
}
GRIDS_TRIED = [
    "W3g16",
    "W4sym",
    "W1g32",
    "W8",
    "W2:column",
    "W3g4:column",
    "W2:row",
    "W3:tensor",
    "gguf:q2_k",
    "gguf:q6_k",
    "mxfp4",
]


def ranged(grid):
    return isinstance(grid, RangedGrid)


REFUSED = {  # method -> what it needs of a grid, words of the refusal
    "claq": (
        lambda g: ranged(g) or (isinstance(g, ColumnGrid) and g.scales_with_inputs),
        "codebook per column",
    ),
    "omniquant": (ranged, "learns ranges of uniform grids"),
    "tesseraq": (lambda g: isinstance(g, OrderedGrid), "have no order"),
}


def method(name):
    return METHODS[name].kind(**QUICK.get(name, {}))


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    config = T.LlamaConfig(
        **{**LLAMA, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    )
    return ModelStream(save_tiny(tmp_path_factory.mktemp("m"), config, torch.float32))


def made(stream, recipe):
    """The first block of a model, quantized by a recipe."""
    model = staged(stream, recipe, IDS[:8])
    block = opened(model.source, replace(recipe, methods=model.methods), IDS)
    return block, apply_methods(block, replace(recipe, methods=model.methods))


def test_every_kind_of_grid_is_tried():
    assert {type(parse_grid(name)) for name in GRIDS_TRIED} == set(GRIDS)


@pytest.mark.parametrize("grid", GRIDS_TRIED)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_ends_on_the_grid_or_refuses_in_words(stream, name, grid):
    grid = parse_grid(grid)
    takes, words = REFUSED.get(name, (lambda _: True, ""))
    if not takes(grid):
        with pytest.raises(LowbitError, match=words):
            Recipe(grid, (method(name),))
        return
    recipe = Recipe(grid, (method(name),))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    planned(stream, recipe)
    block, done = made(stream, recipe)
    assert set(done.coded) == set(block.graph.linears)
    for linear, q in done.coded.items():
        assert q.grid == grid
        assert q.codes.dtype == torch.uint8
        assert q.codes.shape == block.weight(linear).shape
        held = grid.stored(q.params, block.stored)
        assert q.params.differing(held) is None
        assert bool(torch.isfinite(q.decode()).all())
    before, after = done.notes["loss_before"], done.notes["loss_after"]
    assert after == after  # a number
    if METHODS[name].role in ("learner", "solver"):
        assert after <= before * (1.05 if grid.bits > 1 else 2)  # ranges fit nearest rounding


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_deterministic(stream, name):
    grid = Codebook(2) if name == "claq" else Affine(3, 16)
    recipe = Recipe(grid, (method(name),))
    (_, one), (_, two) = made(stream, recipe), made(stream, recipe)
    assert all(q.same_as(two.coded[n]) is None for n, q in one.coded.items())


@pytest.mark.parametrize("name", [n for n, e in METHODS.items() if e.role in ROLES[:3]])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_comes_before_codes_keeps_the_function(tmp_path, name, family):
    """Transforms and clips: with weights as they leave them, the block computes what it did, but
    for what a clip cuts.
    """
    stream = ModelStream(save_tiny(tmp_path, family, torch.float32))
    recipe = Recipe(Affine(8), (method(name),), activations=PerToken(8))
    model = staged(stream, recipe, IDS[:8])
    block = opened(model.source, recipe, IDS)
    done = method(name)(block)
    assert not done.coded
    spread = float(block.target[:4].std())
    y, expected = done.exact().forward(block.x[:4]), block.exact().forward(block.x[:4])
    assert float((y - expected).abs().max()) < (0.2 if done.params else 2e-3) * spread


@pytest.mark.parametrize("name", METHODS)
def test_what_is_coded_already_stays(stream, name):
    """A method that finds all linears coded leaves their codes, or says that it came too late;
    a learner may move them.
    """
    grid = Codebook(2) if name == "claq" else Affine(3, 16)
    _, coded = made(stream, Recipe(grid, (RTN(),)))
    if METHODS[name].role == "learner":
        assert set(method(name)(coded).coded) == set(coded.coded)
        return
    try:
        done = method(name)(coded)
    except LowbitError as e:
        assert "coded" in str(e) or "nothing to learn" in str(e)
        return
    assert all(q.same_as(done.coded[n]) is None for n, q in coded.coded.items())


@pytest.mark.parametrize("name", METHODS)
def test_what_no_code_stands_for_is_as_it_will_be_stored(tmp_path, name):
    """Biases and norms that a method changes: else a resumed run would go on from other numbers."""
    stream = ModelStream(save_tiny(tmp_path, "opt"))  # in bfloat16, computed in float32
    _, done = made(stream, Recipe(Codebook(2) if name == "claq" else Affine(4), (method(name),)))
    for key, w in done.weights.items():
        if key.removesuffix(".weight") not in done.coded:
            assert torch.equal(done.kept(key).to(w.dtype), w), key


def test_the_role_of_a_method_is_its_place():
    for name, entry in METHODS.items():
        for other, late in METHODS.items():
            if ROLES.index(late.role) > ROLES.index(entry.role):
                with pytest.raises(LowbitError):
                    Recipe(Affine(4), (method(other), method(name)))
                Recipe(Affine(4), (method(name), method(other)))


@pytest.mark.parametrize("grid", GRIDS_TRIED)
def test_the_name_of_a_grid_reads_back(grid):
    made = parse_grid(grid)
    assert parse_grid(made.name) == made
    for activations, kv in ((None, None), (PerToken(8), None), (PerToken(4), PerToken(6))):
        recipe = Recipe(made, (RTN(),), activations=activations, kv=kv)
        assert Recipe.from_toml(recipe.to_toml()) == recipe
    mixed = Recipe(Affine(4, 16), (RTN(),), (("*.down_proj", made), ("*.q_proj", KQuant("q4_k"))))
    assert Recipe.from_toml(mixed.to_toml()) == mixed
