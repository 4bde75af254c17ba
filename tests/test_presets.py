"""Recipes by name and joined by "+", and TesseraQ on top of every base."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers as T
from helpers import apply_methods, begin, save_tiny, staged

from lowbit.errors import LowbitError
from lowbit.grid import PerToken
from lowbit.grid.names import parse_scheme
from lowbit.methods import AWQ, GPTQ, RTN, OmniQuant, QuaRot, SmoothQuant, TesseraQ
from lowbit.methods._soft import SoftBlock
from lowbit.methods.omniquant import Clips
from lowbit.methods.tesseraq import soft_shares
from lowbit.model.calibration import Calibration
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.plan import make_plan
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe, recipe_names

QUICK = ["tesseraq.schedule=exponential-4-6", "tesseraq.iters=8", "tesseraq.lr=3e-2"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_is_written_back(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_published_settings():
    paper = load_recipe("tesseraq-paper")
    assert paper.methods[1] == TesseraQ(
        "handcrafted-20", 250, 1e-3, 4, True, 1, "block", precision="auto"
    )
    assert (paper.calibration.source, paper.calibration.samples, paper.calibration.length) == (
        "wikitext2",
        512,
        2048,
    )
    assert load_recipe("gptq-paper").methods == (GPTQ(true_sequential=False),)
    assert load_recipe("omniquant").methods == (OmniQuant(),)
    assert load_recipe("smoothquant").methods == (SmoothQuant(0.85),)


# --- published rows -------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs"
SHAPES = {  # hidden, inner, blocks, heads, heads of keys and values, vocabulary
    "Llama-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-13B": (5120, 13824, 40, 40, 40, 32000),
    "Llama-30B": (6656, 17920, 60, 52, 52, 32000),
    "Llama-65B": (8192, 22016, 80, 64, 64, 32000),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000),
    "Llama-2-70B": (8192, 28672, 80, 64, 8, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256),
}


def published():
    """(paper, setting, model) -> options, of the tables in docs/published.md."""
    found = {}
    for section in (DOCS / "published.md").read_text().split("\n## ")[1:]:
        for setting, models, options in re.findall(
            r"^\| (.+?) \| (.+?) \| `(.+?)` \|$", section, re.M
        ):
            found.update(
                {(section.split()[0], setting, model): options for model in models.split(", ")}
            )
    return found


def parsed(options):
    """(recipe, calibration) as `lowbit quantize` takes these options."""
    words = shlex.split(options)
    given = list(zip(words[::2], words[1::2], strict=True))
    one = dict(given)
    assert set(one) <= {"--scheme", "--recipe", "--calib", "--samples", "--set"}
    recipe = load_recipe(
        one["--recipe"],
        scheme=parse_scheme(one["--scheme"]),
        settings=[v for k, v in given if k == "--set"],
    )
    own = recipe.calibration
    return recipe, (
        one.get("--calib", own.source),
        int(one.get("--samples", own.samples)),
        own.length,
    )


@pytest.mark.parametrize(("paper", "setting", "model"), published())
def test_every_published_row_loads_and_plans(paper, setting, model):
    hidden, inner, blocks, heads, shared, vocab = SHAPES[model]
    recipe, (_, samples, length) = parsed(published()[paper, setting, model])
    config = T.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=vocab,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    plan = make_plan(config, recipe, samples, length)
    # What the setting calls itself, scales besides.
    assert abs(plan.bits_per_weight - float(re.search(r"[\d.]+", setting).group())) < 0.5


SMALL, LARGE = ("Llama-2-7B", "Llama-2-13B"), ("Llama-2-70B",)
TESSERAQ = [  # settings, models, scheme's weights, text, rows, batch, step size, phases, methods: the authors' configurations
    *itertools.product(("W2",), SMALL, [("wikitext2", 512, 4, 1e-3, 20, (OmniQuant, TesseraQ))]),
    *itertools.product(("W2",), LARGE, [("wikitext2", 256, 2, 5e-4, 20, (OmniQuant, TesseraQ))]),
    *itertools.product(
        ("W2g128", "W2g64", "W3", "W3g128", "W4"),
        SMALL,
        [("wikitext2", 512, 4, 1e-3, 20, (AWQ, TesseraQ))],
    ),
    *itertools.product(
        ("W2g128", "W2g64", "W3", "W3g128", "W4"),
        LARGE,
        [("wikitext2", 256, 2, 5e-4, 20, (AWQ, TesseraQ))],
    ),
    *itertools.product(
        ("W2g128", "W3g128"), ("Llama-3.1-8B",), [("c4", 512, 4, 1e-3, 20, (AWQ, TesseraQ))]
    ),
    *itertools.product(
        ("W2g128", "W3g128"), ("Llama-3.1-70B",), [("c4", 256, 2, 5e-4, 20, (AWQ, TesseraQ))]
    ),
    *itertools.product(
        ("W2g128", "W3g128"),
        ("Llama-3.2-1B", "Llama-3.2-3B"),
        [("wikitext2", 512, 4, 1e-3, 20, (AWQ, TesseraQ))],
    ),
    *itertools.product(
        ("W4g128",),
        ("Llama-3.2-1B", "Llama-3.2-3B"),
        [("wikitext2", 512, 4, 1e-3, 10, (AWQ, TesseraQ))],
    ),
    *itertools.product(
        ("W4A4",), ("Llama-2-7B", "Llama-3.1-8B"), [("c4", 512, 4, 1e-3, 20, (AWQ, TesseraQ))]
    ),
    *itertools.product(
        ("W6A6", "W8A8"), ("Llama-2-7B",), [("c4", 512, 4, 1e-3, 10, (AWQ, TesseraQ))]
    ),
    *itertools.product(
        ("W4A4, rotated", "W3A3, rotated"),
        ("Llama-3.1-8B",),
        [("c4", 512, 4, 1e-3, 20, (QuaRot, AWQ, TesseraQ))],
    ),
]


@pytest.mark.parametrize(("setting", "model", "expected"), TESSERAQ)
def test_every_row_of_tesseraq_has_the_authors_settings(setting, model, expected):
    recipe, (source, samples, length) = parsed(published()["TesseraQ", setting, model])
    tuning = recipe.methods[-1]
    kinds = tuple(type(m) for m in recipe.methods)
    assert (
        source,
        samples,
        tuning.batch,
        tuning.lr,
        len(soft_shares(tuning.schedule)),
        kinds,
    ) == expected
    assert (length, tuning.iters, tuning.objective, tuning.precision) == (
        2048,
        250,
        "block",
        "auto",
    )
    weights, bits, activations = re.fullmatch(
        r"(W(\d)(?:g\d+)?)(A\d)?", setting.split(",")[0]
    ).groups()
    grid = recipe.grid
    assert (
        f"W{grid.bits}" + (f"g{grid.group_size}" if grid.group_size else "") == weights
        and not grid.symmetric
    )
    assert (
        recipe.activations == (PerToken(int(bits)) if activations else None) and recipe.kv is None
    )


def test_composed_recipes_are_what_their_names_say():
    for file, parts in (
        ("tesseraq-paper-w2", "omniquant+tesseraq-paper"),
        ("crossquant-w4a8", "rtn+crossquant"),
        ("claq-official", "claq-fused"),
    ):
        whole = load_recipe(file)
        joined = load_recipe(
            parts, scheme=whole.scheme, settings=["claq.reserve=official"] if "claq" in file else []
        )
        assert (whole.methods, whole.grid, whole.activations, whole.calibration) == (
            joined.methods,
            joined.grid,
            joined.activations,
            joined.calibration,
        )
    assert [type(m) for m in load_recipe("awq+crossquant-w4a8").methods] == [AWQ]
    assert str(load_recipe("awq+crossquant-w4a8").scheme) == "W4A8g128sym"


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("claq")])
def test_claq_calibrates_as_published(name):
    assert load_recipe(name).calibration == Calibration("c4", 128, 2048)


@pytest.mark.parametrize("name", [n for n in recipe_names() if "paper" in n and "tesseraq" in n])
def test_paper_presets_step_in_16_bits_where_they_are_multiplied(name):
    assert load_recipe(name).methods[-1].precision == "auto"


def test_readme_names_every_recipe():
    text = (DOCS.parent / "README.md").read_text()
    assert [n for n in recipe_names() if f"`{n}`" not in text] == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("smoothquant+gptq", (SmoothQuant, GPTQ)),
        ("omniquant+tesseraq", (OmniQuant, TesseraQ)),
        ("awq+tesseraq", (AWQ, TesseraQ)),
        ("gptq+tesseraq", (GPTQ, TesseraQ)),
        ("quarot+gptq", (QuaRot, GPTQ)),
        ("quarot+tesseraq", (QuaRot, AWQ, TesseraQ)),
        ("quarot+omniquant+tesseraq-best", (QuaRot, OmniQuant, TesseraQ)),
        ("rtn+tesseraq", (RTN, TesseraQ)),
    ],
)
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
    recipe = load_recipe(
        "quarot+gptq", scheme=parse_scheme("W4A4KV4"), settings=["gptq.damping=0.05"]
    )
    assert (
        recipe.activations.symmetric and recipe.activations.clip == 0.9 and recipe.kv.clip == 0.95
    )
    assert recipe.methods[1].damping == 0.05 and recipe.methods[1].clip == "mse"
    assert load_recipe("awq+tesseraq-best").calibration.samples == 512


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("awq+tesserak", "tesseraq"),
        ("gptq+awq", "'awq' after 'gptq'"),
        ("awq+quarot", "come first"),
        ("awq+awq", "twice"),
    ],
)
def test_bad_joins_are_explained(name, words):
    with pytest.raises(LowbitError, match=words):
        load_recipe(name)


@pytest.mark.parametrize(
    "base", ["rtn", "awq", "gptq", "omniquant", "quarot", "smoothquant", "awq+gptq", "quarot+gptq"]
)
@pytest.mark.parametrize("scheme", ["W2A16g16", "W3A8"])
def test_tesseraq_improves_every_base(tmp_path, base, scheme):
    stream = ModelStream(save_tiny(tmp_path, "llama-mha", torch.float32))
    ids = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for name in (base, f"{base}+tesseraq"):
        settings = [
            *(QUICK if "tesseraq" in name else []),
            *(["omniquant.epochs=4"] if "omniquant" in name else []),
        ]
        recipe = load_recipe(name, scheme=parse_scheme(scheme), settings=settings)
        seen = staged(stream, recipe).source
        x = seen.embed(ids)
        block = apply_methods(
            begin(seen, 0, recipe, Streams(x, x, 8), seen.block_kwargs(24)[0], 0), recipe
        )
        losses.append(block.notes["loss_after"])
    assert losses[1] < 0.95 * losses[0]


def test_a_transform_after_a_clip_is_refused():
    with pytest.raises(LowbitError, match="comes before what fixes their ranges"):
        load_recipe("awq+smoothquant", scheme=parse_scheme("W4A16"))


@pytest.mark.parametrize("joined", ["awq+omniquant", "omniquant+awq"])
def test_ranges_are_fixed_once(joined):
    with pytest.raises(LowbitError, match="both fix the ranges of weights.*Leave one of the two"):
        load_recipe(joined, scheme=parse_scheme("W4A16"))
    if joined == "awq+omniquant":
        free = load_recipe(joined, scheme=parse_scheme("W4A16"), settings=["awq.clip=none"])
        assert [type(m).__name__ for m in free.methods[:2]] == ["AWQ", "OmniQuant"]


def test_a_joined_recipe_has_the_scheme_of_its_parts():
    assert str(load_recipe("smoothquant+gptq").scheme) == "W8A8sym"
    assert str(load_recipe("quarot+gptq").scheme) == "W4A4KV4sym"
    assert str(load_recipe("awq+gptq").scheme) == "W4A16g128"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: load_recipe(
                "awq", scheme=parse_scheme("W4A16"), settings=["activations.clip=0.5"]
            ),
            "has no effect",
        ),
        (lambda: load_recipe("rtn+gptq"), "would do nothing"),
        (lambda: load_recipe("x.toml+gptq"), "cannot be joined"),
        (
            lambda: Clips(Path("/nowhere.safetensors")).planned(None),
            "no such file",
        ),
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
    moved = torch.cat(
        [(tuned.coded[n].codes.int() - q.codes.int()).flatten() for n, q in solved.coded.items()]
    )
    assert int(moved.abs().max()) == 1
    assert 0.02 < float((moved != 0).float().mean()) < 0.9


@pytest.mark.parametrize("name", ["crossquant", "llm-int8", "awq+crossquant"])
def test_recipes_about_activations_want_them_quantized(name):
    assert load_recipe(name, scheme=parse_scheme("W8A8")).activations is not None
    with pytest.raises(
        LowbitError,
        match="is about quantized activations, and scheme W4A16 leaves them in floating point",
    ):
        load_recipe(name, scheme=parse_scheme("W4A16"))
