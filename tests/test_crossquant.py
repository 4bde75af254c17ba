"""CrossQuant's activation grid: against a float64 loop, its limits, what it leaks, and through
tuning, artifact and loader.
"""

import math

import pytest
import torch
from helpers import TEXT, apply_methods, begin, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.evaluate import evaluate, load_causal_lm
from lowbit.grid import Affine, CrossQuant, InputQuantizer, PerToken
from lowbit.grid.names import parse_scheme
from lowbit.methods import AWQ, RTN
from lowbit.model import block as block_module
from lowbit.model import context
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe
from lowbit.run import closing
from lowbit.run.quantize import quantize

IDS = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))


def heavy_tailed(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) / torch.rand(*shape, generator=g).clamp(min=1e-3)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(2, 8),
    st.sampled_from([0.0, 0.15, 0.55, 1.0]),
    st.sampled_from(["call", "sequence"]),
    st.integers(0, 2**31),
)
def test_against_a_float64_loop_and_without_a_clip(bits, exponent, columns, seed):
    x, top = heavy_tailed(2, 7, 9, seed=seed), 2 ** (bits - 1) - 1
    grid = CrossQuant(bits, exponent, columns)
    codes, _ = grid.codes(x)
    assert int(codes.abs().max()) <= top
    wide = x.double()
    for b in range(2):
        pool = wide.flatten(0, 1) if columns == "call" else wide[b]
        for token in range(7):
            for channel in range(9):
                value = float(wide[b, token, channel])
                scale = (
                    float(wide[b, token].abs().max()) ** exponent
                    * float(pool[:, channel].abs().max()) ** (1 - exponent)
                    / top
                )
                exact = value / scale
                # Not near a tie, which float32 may round otherwise.
                if abs(exact - math.floor(exact) - 0.5) > 1e-3:
                    assert int(codes[b, token, channel]) == round(exact)


def test_limits_are_per_token_and_per_channel_bit_for_bit():
    x = heavy_tailed(5, 16)
    assert torch.equal(CrossQuant(4, 1.0)(x), PerToken(4, symmetric=True)(x))
    assert torch.equal(CrossQuant(4, 0.0)(x), PerToken(4, symmetric=True)(x.T).T)


def test_kernel_shrinks_where_the_channel_is_smaller_than_the_token_and_grows_elsewhere():
    x = heavy_tailed(64, 32)
    zeros = PerToken(4, symmetric=True)(x) == 0
    cross = CrossQuant(4, 0.15)(x) == 0
    rows, columns = x.abs().amax(1, keepdim=True), x.abs().amax(0)
    smaller = columns < rows
    assert (zeros | ~cross)[smaller].all() and (cross | ~zeros)[~smaller].all()
    assert smaller.any() and (~smaller).any() and (zeros != cross).any()


def test_outlier_channels_lose_their_kernel():
    """Six normal channels 60 times larger at 8 bits, as in OPT: shares of zeros as the normal
    distribution has them.
    """
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    size = torch.ones(2048)
    size[:6] = 60
    x *= size
    rows, columns = x.abs().amax(1, keepdim=True).double(), x.abs().amax(0).double()
    shares = {}
    for grid, bound in (
        (PerToken(8, symmetric=True), rows / 254),
        (CrossQuant(8, 0.15), rows**0.15 * columns**0.85 / 254),
    ):
        shares[type(grid)] = float((grid(x) == 0).double().mean())
        assert abs(shares[type(grid)] - float(torch.erf(bound / size / 2**0.5).mean())) < 2e-3
    assert shares[PerToken] > 0.3 and shares[CrossQuant] < 0.02


def test_zero_columns_rows_and_single_tokens():
    x = heavy_tailed(6, 8)
    x[:, 3], x[2] = 0, 0
    for exponent in (0.0, 0.15, 1.0):
        out = CrossQuant(4, exponent)(x)
        assert torch.isfinite(out).all() and not out[:, 3].any() and not out[2].any()
    assert torch.isfinite(CrossQuant(4)(torch.zeros(2, 3, 4))).all()
    # A token alone has its own values for scales, which makes the codes a power of them: a gain no
    # real code has.
    alone = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    codes, _ = CrossQuant(4).codes(alone)
    assert torch.equal(
        codes.abs().int(), (7 * (alone.abs() / alone.abs().max()).double().pow(0.15)).round().int()
    )
    error = [float((g(alone) - alone).norm()) for g in (CrossQuant(4), PerToken(4, symmetric=True))]
    assert error[0] < error[1] / 3


@pytest.mark.parametrize(("columns", "batch_matters"), [("call", True), ("sequence", False)])
def test_it_sees_the_future_and_as_published_the_batch(columns, batch_matters):
    grid = CrossQuant(4, 0.15, columns)
    x = heavy_tailed(2, 8, 16)
    later, other = x.clone(), x.clone()
    later[0, -1], other[1] = 50, 50
    assert not torch.equal(grid(later)[0, :-1], grid(x)[0, :-1])
    assert torch.equal(grid(other)[0], grid(x)[0]) != batch_matters
    plain = PerToken(4, symmetric=True)
    assert torch.equal(plain(later)[0, :-1], plain(x)[0, :-1]) and torch.equal(
        plain(other)[0], plain(x)[0]
    )


def test_gradients_pass_and_nonsense_is_refused():
    x = torch.randn(4, 8, requires_grad=True)
    CrossQuant(4)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    for bad in ({"bits": 1}, {"bits": 4, "row_exponent": 1.5}, {"bits": 4, "columns": "batch"}):
        with pytest.raises(ValueError):
            CrossQuant(**bad)
    with pytest.raises(LowbitError, match="row_exponent"):
        load_recipe("crossquant", settings=["activations.row_exponent=2.0"])
    with pytest.raises(LowbitError, match="symmetric"):
        load_recipe("crossquant", settings=["activations.symmetric=true"])


def test_recipe_names():
    assert load_recipe("crossquant").activations == CrossQuant(8, 0.15, "call")
    joined = load_recipe(
        "awq+crossquant", scheme=parse_scheme("W4A4"), settings=["activations.row_exponent=0.55"]
    )
    assert joined.activations == CrossQuant(4, 0.55) and [type(m) for m in joined.methods] == [AWQ]
    assert Recipe.from_toml(joined.to_toml()) == joined
    assert load_recipe("smoothquant").activations == PerToken(8, True, full_range=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32)


def test_methods_see_whole_calls(folder):
    """AWQ's searches quantize the tensor that the linear gets, not tokens picked from it or rows
    flattened together.
    """
    seen = []

    class Spy(CrossQuant):
        def __call__(self, x):
            seen.append(tuple(x.shape))
            return super().__call__(x)

    stream = ModelStream(folder)
    x = stream.embed(IDS)
    recipe = Recipe(
        Affine(4),
        (AWQ(rows=4, exponents=2, shrinks=2, clip_tokens=16),),
        activations=CrossQuant(4, 0.15, "sequence"),
    )
    block = begin(stream, 0, recipe, Streams(x, x, 8), stream.block_kwargs(24)[0], 0)
    block = block.with_input_quantizers(
        dict.fromkeys(block.graph.linears, InputQuantizer(grid=Spy(4, 0.15, "sequence")))
    )
    apply_methods(block, recipe)
    assert seen and {shape[1] for shape in seen} == {24} and all(len(shape) == 3 for shape in seen)


@pytest.mark.parametrize("columns", ["call", "sequence"])
def test_artifact_reads_as_tuned(folder, tmp_path, columns):
    (tmp_path / "text.txt").write_text(TEXT)
    result = quantize(
        str(folder),
        "W4A4",
        "awq+crossquant",
        out=tmp_path / "out",
        calib=str(tmp_path / "text.txt"),
        samples=8,
        length=32,
        settings=[f"activations.columns={columns}"],
    )
    assert result.report["format"] == "lowbit" and result.verification.logits_rms < 1e-3


@pytest.mark.parametrize("per_pass", [8192, 5 * 32, 1])
def test_the_result_tells_how_many_rows_column_maxima_were_taken_over(
    folder, tmp_path, monkeypatch, per_pass
):
    """Of the run's own figures in report.json, and of an evaluation: the most rows that a call of
    the grid saw.
    """
    (tmp_path / "text.txt").write_text(TEXT)
    sizes, whole, codes, run = [], [], CrossQuant.codes, block_module.Block.run
    monkeypatch.setattr(CrossQuant, "codes", lambda self, x: sizes.append(len(x)) or codes(self, x))

    # Whole streams, as figures are computed on; methods and losses look at fewer rows.
    def running(*args, **kwargs):
        sizes.clear()
        out = run(*args, **kwargs)
        whole.extend(sizes)
        return out

    monkeypatch.setattr(block_module.Block, "run", running)
    for module in (block_module, context, closing):
        monkeypatch.setattr(module, "TOKENS_PER_PASS", per_pass)
    out = tmp_path / "out"
    made = quantize(
        str(folder),
        "W8A8sym",
        "crossquant",
        out=out,
        calib=str(tmp_path / "text.txt"),
        samples=8,
        length=32,
    )
    quality = made.report["quality"]
    assert quality["float"]["batch"] == quality["quantized"]["batch"] == max(whole)
    model = load_causal_lm(str(out), "cpu")
    sizes.clear()
    found = [evaluate(model, IDS, batch=n) for n in (1, 4)]
    assert [e.batch for e in found] == [1, 4] == sorted(set(sizes)) and found[0].nll != found[1].nll


def test_it_helps_where_channels_stand_out(folder):
    stream = ModelStream(folder)
    x = stream.embed(IDS)
    x[..., :2] *= 30
    losses = {}
    for grid in (PerToken(4, symmetric=True), CrossQuant(4, 0.15)):
        recipe = Recipe(Affine(8), (RTN(),), activations=grid)
        block = begin(stream, 0, recipe, Streams(x, x, 8), stream.block_kwargs(24)[0], 0)
        losses[type(grid)] = apply_methods(block, recipe).notes["loss_after"]
    assert losses[CrossQuant] < losses[PerToken]
