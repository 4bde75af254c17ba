"""Recipes as values and as TOML: nothing is lost between the two, and what is wrong with a file is
said with its name, the key and what would be right.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import fields, replace

import pytest

from lowbit.errors import LowbitError
from lowbit.grid import MXFP4, Affine, Codebook, CrossQuant, KQuant, LLMInt8, PerToken
from lowbit.grid.names import Scheme, parse_scheme
from lowbit.methods import (
    AWQ,
    CLAQ,
    GPTQ,
    METHODS,
    RTN,
    OmniQuant,
    Polish,
    QuaRot,
    SmoothQuant,
    TesseraQ,
)
from lowbit.methods import CrossQuant as CrossQuantMethod
from lowbit.model.calibration import Calibration
from lowbit.recipe import Recipe, load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# --- nothing is lost ------------------------------------------------------------------------------

WEIGHTS = [
    Affine(1),
    Affine(2, 64),
    Affine(3, 128, symmetric=True),
    Affine(8, symmetric=True),
    Codebook(2),
    Codebook(3, group_size=4),
    Codebook(4, "row"),
    Codebook(2, "tensor"),
    KQuant("q2_k"),
    KQuant("q3_k"),
    KQuant("q4_k"),
    KQuant("q6_k"),
    MXFP4(),
]
ACTIVATIONS = [
    None,
    PerToken(4),
    PerToken(8, symmetric=True, clip=0.9, full_range=True),
    CrossQuant(4, 0.25, "sequence"),
    CrossQuant(8, 1.0),
    LLMInt8(),
    LLMInt8(6, 3.5),
]
CACHES = [None, PerToken(2), PerToken(4, clip=0.95)]
# Every option of every method away from its default.
OTHER = [
    RTN(),
    AWQ(False, "symmetric", 7, 3, 5, 64, "strided", 2.5),
    GPTQ(0.05, True, True, False, 64, "mse", 9),
    OmniQuant(3, 0.02, 1e-5, "on", 0.25, "off", 2, "a b/clips.safetensors"),
    Polish(tokens=1, batch=2, lr=0.1, norms=False, apart=3, checks=4, patience=5),
    QuaRot(residual=False, across_heads=False, keys=False),
    QuaRot(heads=False, online=False),
    SmoothQuant(0.5, 12),
    TesseraQ("exponential-4-20", 3, 1e-3, 2, False, 2, "block", 1, "auto", 9),
    CrossQuantMethod(0.3, True, "percentile", 99.0, False, 4, 8, "group", 3.5),
    CLAQ(0.2, 3, "greedy", "model", 0.5, 5.0, 0.1, "official", False, "refined", False, False, 0.1, 32, 6),
]  # fmt: skip


def test_the_table_of_methods_above_is_whole() -> None:
    assert {type(m) for m in OTHER} == {entry.kind for entry in METHODS.values()}
    for entry in METHODS.values():
        usual, own = entry.kind(), [m for m in OTHER if isinstance(m, entry.kind)]
        for name in (f.name for f in fields(usual)):
            assert any(getattr(m, name) != getattr(usual, name) for m in own), (usual, name)


def back(recipe: Recipe) -> Recipe:
    return Recipe.from_toml(recipe.to_toml())


@pytest.mark.parametrize("grid", WEIGHTS, ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kv", CACHES, ids=str)
def test_every_grid_comes_back(grid, activations, kv) -> None:
    recipe = Recipe(grid, activations=activations, kv=kv)
    assert back(recipe) == recipe
    assert parse_scheme(str(recipe.scheme)) == recipe.scheme


@pytest.mark.parametrize(("grid", "other"), list(itertools.permutations(WEIGHTS, 2)), ids=str)
def test_every_pair_of_grids_comes_back(grid, other) -> None:
    recipe = Recipe(grid, overrides=(("*.o_proj", other), ('a"b\\[0-9]', grid)))
    assert back(recipe) == recipe


@pytest.mark.parametrize("method", OTHER, ids=lambda m: type(m).__name__)
def test_every_option_of_every_method_comes_back(method) -> None:
    recipe = Recipe(Codebook(2) if isinstance(method, CLAQ) else Affine(2, 64), (method,))
    assert back(recipe) == recipe


@pytest.mark.parametrize(
    "text",
    ["", "x y", 'a "quoted" name', "C:\\new\\table", "a\nb", "tab\there", "\x00\x1b\x7f", "üñ 你", "#"],
)  # fmt: skip
def test_every_text_comes_back(text: str) -> None:
    calibration = Calibration(text or "stdlib", 3, 17)
    methods = (OmniQuant(clips=text),)
    pattern = text or "*"
    recipe = Recipe(Affine(4), methods, ((pattern, Affine(2)),), calibration, text)
    assert back(recipe) == recipe


def test_a_path_that_is_no_text_leaves_a_document_that_is() -> None:
    recipe = Recipe(Affine(4), calibration=Calibration("t\udcff.txt", 3, 17))
    assert recipe.to_toml().encode() and back(recipe).calibration.source == "t?.txt"


@pytest.mark.parametrize("value", [1e-30, 1e-5, 0.1, 1 / 3, 1.0, 123456.789, 2.0**31 - 1])
def test_every_number_comes_back(value: float) -> None:
    recipe = Recipe(Affine(4), (TesseraQ(lr=value),))
    assert back(recipe).methods[0].lr == value


def test_a_recipe_without_overrides_and_methods_has_its_defaults() -> None:
    recipe = Recipe.from_toml("")
    assert recipe == Recipe(Affine(4, 128), ())
    assert recipe.calibration == Calibration("stdlib", 128, 2048)
    assert Recipe.from_toml('codebook = "row"').grid == Codebook(4, "row")


def test_what_all_grids_share_is_said_once() -> None:
    shared = Recipe(Codebook(2), overrides=(("*.o_proj", Codebook(3)),)).as_dict()
    assert (shared["codebook"], shared["scheme"]) == ("column", "W2A16")
    assert shared["overrides"] == {"*.o_proj": "W3A16"}
    mixed = Recipe(Codebook(2), overrides=(("*.o_proj", Affine(3)),)).as_dict()
    assert "codebook" not in mixed and mixed["scheme"] == "W2A16:column"


def test_a_document_is_plain_toml() -> None:
    data = load_recipe("quarot+tesseraq", scheme=parse_scheme("W3A8KV4g32")).as_dict()
    text = Recipe.from_dict(data).to_toml()
    assert tomllib.loads(text) == data


# --- what is wrong with a file --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "mine.toml is not valid TOML: "),
        ("scheme = ", "mine.toml is not valid TOML: "),
        ("a = 1\na = 2", "mine.toml is not valid TOML: "),
        ("shceme = 'W4'", "unknown key in mine.toml 'shceme': did you mean 'scheme'?"),
        ("[qqqq]\nx = 1", "unknown key in mine.toml 'qqqq': known: activations, awq,"),
        ("methods = 'rtn'", "mine.toml: 'methods' must be a list of method names (quarot,"),
        ("methods = ['rtn', 3]", "mine.toml: 'methods' must be a list of method names"),
        ("methods = ['gptp']", "unknown method in mine.toml 'gptp': did you mean 'gptq'?"),
        ("[awq]\nrows = 3", "mine.toml sets options of 'awq', which is not among its methods []"),
        ("name = 3", "mine.toml: 'name' must be a string, got 3"),
        ("codebook = true", "mine.toml: 'codebook' must be a string, got True"),
        ("codebook = 'col'", "mine.toml: codebook must be one of column, row, tensor, got 'col'"),
        ("overrides = []", "mine.toml: 'overrides' must be a table, got []"),
        ("[overrides]\n'*.o_proj' = 4", "mine.toml: override '*.o_proj' must be a scheme"),
        ("[overrides]\n'*.o_proj' = ['W4']", "mine.toml: override '*.o_proj' must be a scheme"),
        ("[overrides.model]\nx = 'W4'", "mine.toml: override 'model' must be a scheme"),
        ("[overrides]\nx = 'W4A8'", "override scheme 'W4A8': overrides are about weights; write W4A16"),
        ("[overrides]\nx = 'W4KV8'", "override scheme 'W4KV8': overrides are about weights"),
        ("[overrides]\nx = 'W44'", "scheme 'W44': bits must be 1 to 8, got 44"),
        ("scheme = 'W4A1'", "scheme 'W4A1': activation bits must be 2 to 8"),
        ("scheme = 'W4g0'", "scheme 'W4g0': group_size must be positive, got 0"),
        ("scheme = 'W1sym'", "scheme 'W1sym': a symmetric grid needs at least 2 bits"),
        ("scheme = '4 bits'", "unknown scheme '4 bits': write W<bits>A<bits>"),
        ("scheme = 'gguf:q5_k'", "scheme 'gguf:q5_k'"),
        ("codebook = 'row'\nscheme = 'W4sym'", "scheme 'W4A16sym': a codebook has no symmetric form"),
        ("codebook = 'row'\nscheme = 'W4g8'", "scheme 'W4A16g8': group_size is the number of columns"),
        ("codebook = 'row'\nscheme = 'mxfp4'", "is a grid of its own, and this recipe is for codebooks"),
        ("activations = 8", "mine.toml: 'activations' must be a table of options ([activations]), got 8"),
        ("[activations]\nbits = 8", "mine.toml: 'activations.bits' is said by the scheme, as in W4A8KV4"),
        ("[kv]\nbits = 8", "mine.toml: 'kv.bits' is said by the scheme"),
        ("[kv]\nrow_exponent = 0.5", "unknown option of kv in mine.toml 'row_exponent'"),
        ("[activations]\nclipp = 1", "option of activations in mine.toml 'clipp': did you mean 'clip'?"),
        ("[activations]\nclip = 0", "mine.toml: activations: an activation clip must be in (0, 1], got 0"),
        ("[activations]\nclip = 1.5", "mine.toml: activations: an activation clip must be in (0, 1]"),
        ("[activations]\nfull_range = true", "full_range is a kind of symmetric grid: set symmetric too"),
        ("[activations]\nrow_exponent = 2", "activations: row_exponent must be in [0, 1], got 2"),
        ("[activations]\nrow_exponent = 1\ncolumns = 'all'", "columns must be one of call, sequence"),
        ("[activations]\nthreshold = 0", "activations: threshold must be positive, got 0"),
        ("[activations]\nthreshold = 1\nclip = 1", "unknown option of activations in mine.toml 'clip'"),
        ("[calibration]\nsource = ''", "calibration needs a text source (--calib)"),
        ("[calibration]\nlength = 1", "at least 1 sample of at least 2 tokens, got 128 x 1"),
        ("[calibration]\nsamples = 1.5", "mine.toml: calibration.samples must be of type int, got 1.5"),
        ("[calibration]\nsamples = true", "calibration.samples must be of type int, got True"),
        ("methods = ['awq']\nawq = 1", "mine.toml: 'awq' must be a table of options ([awq]), got 1"),
        ("methods = ['awq']\n[awq]\nrow = 1", "option of awq in mine.toml 'row': did you mean 'rows'?"),
        ("methods = ['awq']\n[awq]\nscales = 1", "mine.toml: awq.scales must be of type bool, got 1"),
        ("methods = ['awq']\n[awq]\nclip = 'no'", "awq.clip must be one of asymmetric, symmetric, none"),
        ("methods = ['gptq']\n[gptq]\ndamping = '1'", "gptq.damping must be of type float, got '1'"),
        ("methods = ['gptq']\n[gptq]\ndamping = true", "gptq.damping must be of type float, got True"),
        ("methods = ['gptq']\n[gptq]\nrows = 2147483648", "gptq.rows must be a number from -2147483647"),
        ("methods = ['gptq']\n[gptq]\ndamping = nan", "gptq.damping must be a number from -2147483647"),
        ("methods = ['gptq']\n[gptq]\ndamping = -0.1", "gptq needs a finite damping >= 0"),
        ("methods = ['gptq']\n[gptq]\nblock_size = 0", "gptq needs a finite damping >= 0, block_size >= 1"),
        ("methods = ['smoothquant']\n[smoothquant]\nalpha = 1.1", "smoothquant needs alpha in [0, 1]"),
        ("methods = ['claq']\n[claq]\nupper = 9", "claq needs upper from 2 to 8 bits"),
        ("methods = ['claq']\n[claq]\nscope = 'model'", 'claq.scope = "model" is for claq.allocation'),
        ("methods = ['tesseraq']\n[tesseraq]\nschedule = 'x'", "unknown schedule 'x': use handcrafted-20"),
        ("methods = ['crossquant']\n[crossquant]\nisolate = 1", "isolate > 1"),
    ],
)  # fmt: skip
def test_a_file_with_a_fault_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(LowbitError) as e:
        Recipe.from_toml(text, "mine.toml")
    said = str(e.value)
    assert words in said and (said.endswith((".", "?")) or "not valid TOML" in said)


# --- the order of roles ---------------------------------------------------------------------------

ROLE_OF = {
    "quarot": "rotation",
    "smoothquant": "transform",
    "crossquant": "transform",
    "awq": "clip",
    "omniquant": "clip",
    "rtn": "solver",
    "gptq": "solver",
    "claq": "solver",
    "tesseraq": "learner",
}
ORDER = ["rotation", "transform", "clip", "solver", "learner"]


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ROLE_OF, 2)))
def test_methods_stand_in_the_order_of_their_roles(first: str, second: str) -> None:
    one, two = ORDER.index(ROLE_OF[first]), ORDER.index(ROLE_OF[second])
    fine = one < two or (one == two and ROLE_OF[first] not in ("rotation", "clip", "solver"))
    text = f"methods = ['{first}', '{second}']\n"
    if "claq" in (first, second):
        text += "[claq]\noutlier_bits = 0.1\n"  # else it has nothing to do on integers
    if fine:
        assert [name for name, _, _ in Recipe.from_toml(text).entries] == [first, second]
        return
    with pytest.raises(LowbitError, match=f"'{second}'.*'{first}'"):
        Recipe.from_toml(text)


def test_a_method_that_a_file_could_not_say_twice_is_refused() -> None:
    """A file has one table of options for a method."""
    free = AWQ(clip="none")
    assert back(Recipe(Affine(4), (free, free))).methods == (free, free)
    with pytest.raises(LowbitError, match="override 'a' is in this recipe twice"):
        Recipe(Affine(4), overrides=(("a", Affine(2)), ("a", Affine(3))))
    with pytest.raises(LowbitError, match="int is no method of lowbit.methods.METHODS"):
        Recipe(Affine(4), (3,))  # type: ignore[arg-type]
    with pytest.raises(LowbitError, match="'awq' is in this recipe twice with other options"):
        Recipe(Affine(4), (AWQ(rows=3), AWQ(rows=4)))


# --- another scheme, single options ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "scheme", "grid", "activations", "kv"),
    [
        (Recipe(Affine(4, 128)), "W2g64", Affine(2, 64), None, None),
        (Recipe(Affine(4)), "W3A8", Affine(3), PerToken(8), None),
        (Recipe(Codebook(4)), "W2A16", Codebook(2), None, None),
        (Recipe(Codebook(4, "row")), "W2A16", Codebook(2, "row"), None, None),
        (Recipe(Codebook(4, "row")), "W2:column", Codebook(2), None, None),
        (Recipe(Codebook(4)), "W2g8", Codebook(2, "column", 8), None, None),
        (Recipe(Affine(4)), "mxfp4+A8KV4", MXFP4(), PerToken(8), PerToken(4)),
        (
            Recipe(Affine(8), activations=CrossQuant(8, 0.5, "sequence"), kv=PerToken(8, clip=0.9)),
            "W4A4KV2",
            Affine(4),
            CrossQuant(4, 0.5, "sequence"),
            PerToken(2, clip=0.9),
        ),
        (Recipe(Affine(8), activations=LLMInt8(8, 2.0)), "W4A6", Affine(4), LLMInt8(6, 2.0), None),
        (Recipe(Affine(8), activations=PerToken(8), kv=PerToken(4)), "W8", Affine(8), None, None),
    ],
)
def test_another_scheme_changes_the_bits_and_nothing_else(base, scheme, grid, activations, kv):
    found = base.with_scheme(parse_scheme(scheme))
    assert found == replace(base, grid=grid, activations=activations, kv=kv)
    assert found.scheme == Scheme(grid, activations and activations.bits, kv and kv.bits)


@pytest.mark.parametrize(
    ("linear", "bits"),
    [
        ("model.layers.0.self_attn.q_proj", 4),
        ("model.layers.0.mlp.down_proj", 8),
        ("model.layers.10.mlp.down_proj", 3),
        ("model.layers.1.mlp.up_proj", 4),
        ("model.layers.1.mlp.UP_proj", 2),
    ],
)
def test_the_last_pattern_that_matches_counts(linear: str, bits: int) -> None:
    overrides = (("*.UP_proj", Affine(2)), ("*.down_proj", Affine(8)), ("*.1?.*", Affine(3)))
    assert Recipe(Affine(4), overrides=overrides).grid_of(linear) == Affine(bits)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("awq.rows=7", lambda r: r.methods[0].rows == 7),
        (" awq.rows = 7 ", lambda r: r.methods[0].rows == 7),
        ("awq.clip=none", lambda r: r.methods[0].clip == "none"),
        ('awq.clip="none"', lambda r: r.methods[0].clip == "none"),
        ("awq.scales=false", lambda r: r.methods[0].scales is False),
        ("calibration.source=a=b", lambda r: r.calibration.source == "a=b"),
        ("calibration.length=64", lambda r: r.calibration.length == 64),
        ("overrides.*.o_proj=W8", lambda r: r.overrides == (("*.o_proj", Affine(8)),)),
        ("overrides.a.b=mxfp4", lambda r: r.overrides == (("a.b", MXFP4()),)),
    ],
)
def test_one_option_is_set(setting: str, found) -> None:
    assert found(load_recipe("awq", settings=[setting]))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("awq", "--set takes METHOD.OPTION=VALUE, for example tesseraq.iters=100; got 'awq'"),
        ("awq=3", "--set takes METHOD.OPTION=VALUE"),
        ("awq.rows", "--set takes METHOD.OPTION=VALUE"),
        ("awq.=3", "--set takes METHOD.OPTION=VALUE"),
        ("", "--set takes METHOD.OPTION=VALUE"),
        ("akq.rows=3", "unknown section in --set 'akq': did you mean 'awq'?"),
        ("gptq.rows=3", "recipe 'awq' sets options of 'gptq', which is not among its methods"),
        ("awq.rows=many", "recipe 'awq': awq.rows must be of type int, got 'many'"),
        ("awq.rows=[1]", "recipe 'awq': awq.rows must be of type int, got [1]"),
        ("overrides.*.o_proj=4", "recipe 'awq': override '*.o_proj' must be a scheme"),
        (
            "kv.clip=0.9",
            "--set kv.clip=0.9 has no effect: scheme W4A16g128 leaves them in floating",
        ),
        ("activations.clip=0.9", "--set activations.clip=0.9 has no effect"),
    ],
)
def test_an_option_that_cannot_be_set_is_refused_in_words(setting: str, words: str) -> None:
    with pytest.raises(LowbitError) as e:
        load_recipe("awq", settings=[setting])
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("text", "setting", "words"),
    [
        ("awq = 3\nmethods = ['awq']", "awq.rows=3", "'awq' must be a table of options"),
        ("overrides = 'x'", "overrides.x=W4", "'overrides' must be a table"),
        ("calibration = []", "calibration.samples=3", "'calibration' must be a table of options"),
    ],
)
def test_an_option_is_not_set_into_what_is_no_table(tmp_path, text, setting, words) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(LowbitError) as e:
        load_recipe(str(path), settings=[setting])
    assert words in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.toml", "no such recipe file: 'nowhere.toml'"),
        ("tesserak", "unknown recipe 'tesserak': did you mean 'tesseraq'?"),
        ("awq+", "unknown recipe ''"),
        ("+awq", "unknown recipe ''"),
        ("awq+gptq+gptq", "recipe 'awq+gptq+gptq' has 'gptq' twice"),
        ("mine.toml+awq", "files cannot be joined; write the methods into one file"),
        ("awq+mine.toml", "no such recipe file: 'awq+mine.toml'"),
    ],
)
def test_a_name_that_is_no_recipe_is_refused(tmp_path, monkeypatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowbitError) as e:
        load_recipe(name)
    assert words in str(e.value)
