"""Recipes by name and joined by "+", and TesseraQ on top of every base."""

import pytest
import torch
from helpers import save_tiny

from lowbit.errors import LowbitError
from lowbit.loop import Streams, apply_methods, begin, prepared
from lowbit.methods import AWQ, GPTQ, RTN, OmniQuant, QuaRot, SmoothQuant, TesseraQ
from lowbit.methods._soft import SoftBlock
from lowbit.model.stream import ModelStream
from lowbit.presets import load_recipe, recipe_names
from lowbit.recipe import Recipe
from lowbit.scheme import parse_scheme

QUICK = ["tesseraq.schedule=exponential-4-6", "tesseraq.iters=8", "tesseraq.lr=3e-2"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_is_written_back(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_published_settings():
    paper = load_recipe("tesseraq-paper")
    assert paper.methods[1] == TesseraQ("handcrafted-20", 250, 1e-3, 4, True, 1, "block")
    assert (paper.calibration.source, paper.calibration.samples, paper.calibration.length) == ("wikitext2", 512, 2048)
    assert load_recipe("gptq-paper").methods == (GPTQ(true_sequential=False),)
    assert load_recipe("omniquant").methods == (OmniQuant(),)
    assert load_recipe("smoothquant").methods == (SmoothQuant(0.85),)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("smoothquant+gptq", (SmoothQuant, GPTQ)), ("omniquant+tesseraq", (OmniQuant, TesseraQ)), ("awq+tesseraq", (AWQ, TesseraQ)),
        ("gptq+tesseraq", (GPTQ, TesseraQ)), ("quarot+gptq", (QuaRot, GPTQ)), ("quarot+tesseraq", (QuaRot, AWQ, TesseraQ)),
        ("quarot+omniquant+tesseraq-best", (QuaRot, OmniQuant, TesseraQ)), ("rtn+tesseraq", (RTN, TesseraQ)),
    ],
)  # fmt: skip
def test_joined_names(name, kinds):
    recipe = load_recipe(name, scheme=parse_scheme("W3A16g32"))
    assert tuple(type(m) for m in recipe.methods) == kinds
    assert recipe.name == name


def test_short_names_are_one_scale_of_effort():
    fast, default, best = (load_recipe(n) for n in ("fast", "default", "best"))
    assert [r.name for r in (fast, default, best)] == ["tesseraq-fast", "tesseraq", "tesseraq-best"]
    steps = [r.methods[1].steps * r.methods[1].batch for r in (fast, default, best)]
    assert steps == [600, 2400, 9600] and default == load_recipe("tesseraq")
    assert load_recipe("omniquant+fast").methods == (OmniQuant(), fast.methods[1])
    with pytest.raises(LowbitError, match="did you mean 'fast'"):
        load_recipe("fats")


def test_parts_keep_their_options():
    recipe = load_recipe("quarot+gptq", scheme=parse_scheme("W4A4KV4"), settings=["gptq.damping=0.05"])
    assert recipe.activations.symmetric and recipe.activations.clip == 0.9 and recipe.kv.clip == 0.95
    assert recipe.methods[1].damping == 0.05 and recipe.methods[1].clip == "mse"
    assert load_recipe("awq+tesseraq-best").calibration.samples == 512


@pytest.mark.parametrize(
    ("name", "words"), [("awq+tesserak", "tesseraq"), ("gptq+awq", "'awq' after 'gptq'"), ("awq+quarot", "come first"), ("awq+awq", "twice")]
)
def test_bad_joins_are_explained(name, words):
    with pytest.raises(LowbitError, match=words):
        load_recipe(name)


@pytest.mark.parametrize("base", ["rtn", "awq", "gptq", "omniquant", "quarot", "smoothquant", "awq+gptq", "quarot+gptq"])
@pytest.mark.parametrize("scheme", ["W2A16g16", "W3A8"])
def test_tesseraq_improves_every_base(tmp_path, base, scheme):
    stream = ModelStream(save_tiny(tmp_path, "llama-mha", torch.float32))
    ids = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for name in (base, f"{base}+tesseraq"):
        settings = [*(QUICK if "tesseraq" in name else []), *(["omniquant.epochs=4"] if "omniquant" in name else [])]
        recipe = load_recipe(name, scheme=parse_scheme(scheme), settings=settings)
        seen = prepared(stream, recipe, 0)
        x = seen.embed(ids)
        block = apply_methods(begin(seen, 0, recipe, Streams(x, x, 8), seen.block_kwargs(24)[0], 0), recipe)
        losses.append(block.notes["loss_after"])
    assert losses[1] < 0.95 * losses[0]


def test_a_transform_after_a_clip_is_refused(tmp_path):
    stream = ModelStream(save_tiny(tmp_path, "llama-mha", torch.float32))
    x = stream.embed(torch.randint(3, 280, (4, 24), generator=torch.Generator().manual_seed(0)))
    for name, words in (("awq+smoothquant", "on a fixed range"), ("awq+omniquant", "nothing to learn")):
        recipe = load_recipe(name, scheme=parse_scheme("W4A16"))
        with pytest.raises(LowbitError, match=words):
            apply_methods(begin(stream, 0, recipe, Streams(x, x, 4), stream.block_kwargs(24)[0], 0), recipe)


def test_a_joined_recipe_has_the_scheme_of_its_parts():
    assert str(load_recipe("smoothquant+gptq").scheme) == "W8A8sym"
    assert str(load_recipe("quarot+gptq").scheme) == "W4A4KV4sym"
    assert str(load_recipe("awq+gptq").scheme) == "W4A16g128"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: load_recipe("awq", scheme=parse_scheme("W4A16"), settings=["activations.clip=0.5"]), "has no effect"),
        (lambda: load_recipe("rtn+gptq"), "would do nothing"),
        (lambda: load_recipe("x.toml+gptq"), "cannot be joined"),
        (lambda: prepared(None, load_recipe("omniquant", settings=["omniquant.clips=/nowhere.safetensors"]), 0), "no such file"),
    ],
)
def test_what_would_have_no_effect_is_refused(make, words):
    with pytest.raises(LowbitError, match=words):
        make()


def test_after_a_solver_tuning_starts_from_its_codes_and_moves_by_one(tmp_path):
    stream = ModelStream(save_tiny(tmp_path, "llama-mha", torch.float32))
    ids = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))
    recipe = load_recipe("gptq", scheme=parse_scheme("W3A16g16"))
    x = stream.embed(ids)
    solved = GPTQ()(begin(stream, 0, recipe, Streams(x, x, 8), stream.block_kwargs(24)[0], 0))
    start = SoftBlock(solved).codes()
    assert all(start[n].same_as(q) is None for n, q in solved.coded.items())
    tuned = TesseraQ(schedule="exponential-4-12", iters=12, lr=5e-2)(solved)
    moved = torch.cat([(tuned.coded[n].codes.int() - q.codes.int()).flatten() for n, q in solved.coded.items()])
    assert int(moved.abs().max()) == 1
    assert 0.02 < float((moved != 0).float().mean()) < 0.9


@pytest.mark.parametrize("name", ["crossquant", "llm-int8", "awq+crossquant"])
def test_recipes_about_activations_want_them_quantized(name):
    assert load_recipe(name, scheme=parse_scheme("W8A8")).activations is not None
    with pytest.raises(LowbitError, match="is about quantized activations, and scheme W4A16 leaves them in floating point"):
        load_recipe(name, scheme=parse_scheme("W4A16"))
