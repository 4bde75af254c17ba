"""Activation grids, online rotations and quantized keys and values: against brute force, and in a
block.
"""

from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, apply_methods, begin, save_tiny, staged
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lowbit.errors import LowbitError
from lowbit.grid import Affine, InputQuantizer, KVGrid, LLMInt8, PerToken, QuantizedStates, Rotation
from lowbit.grid.names import parse_scheme
from lowbit.grid.rotation import dense
from lowbit.methods import AWQ, RTN, QuaRot, SmoothQuant, TesseraQ
from lowbit.methods.awq import search_clip
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe

W4A4 = Recipe(Affine(4), activations=PerToken(4))
IDS = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))


def opened(stream, recipe, i=0):
    x = stream.embed(IDS)
    return begin(stream, i, recipe, Streams(x, x, 8), stream.block_kwargs(24)[i], 0)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return ModelStream(save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32))


# --- the grid -------------------------------------------------------------------------------------


def near_a_tie(quotient):
    """Where float32 may round to one side and float64 to the other."""
    return (quotient - quotient.floor() - 0.5).abs() < 1e-4


@settings(deadline=None, max_examples=60)
@example(8, "asymmetric", 1.0, 58358)  # has a tie
@given(
    st.integers(2, 8),
    st.sampled_from(["asymmetric", "symmetric", "full"]),
    st.sampled_from([1.0, 0.9]),
    st.integers(0, 2**31),
)
def test_per_token_against_a_loop(bits, kind, clip, seed):
    symmetric, full = kind != "asymmetric", kind == "full"
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) + 0.3
    got = PerToken(bits, symmetric, clip, full)(x)
    for token, out in zip(x.flatten(0, 1).double(), got.flatten(0, 1).double(), strict=True):
        if symmetric:
            scale, zero, low, high = (
                float(token.abs().max()) * clip / (2 ** (bits - 1) - (0.5 if full else 1)),
                0,
                -(2 ** (bits - 1)),
                2 ** (bits - 1) - 1,
            )
        else:
            bottom, top = min(float(token.min()), 0) * clip, max(float(token.max()), 0) * clip
            scale = (top - bottom) / (2**bits - 1)
            if near_a_tie(torch.tensor(-bottom / scale, dtype=torch.float64)):
                continue
            zero, low, high = min(max(round(-bottom / scale), 0), 2**bits - 1), 0, 2**bits - 1
        exact = ((token / scale).round() + zero).clamp(low, high) - zero
        away = (exact * scale - out).abs() / scale  # in steps
        assert (away[~near_a_tie(token / scale)] < 1e-4).all() and (away < 1 + 1e-4).all()


def test_per_token_passes_gradients_and_refuses_nonsense():
    x = torch.randn(4, 8, requires_grad=True)
    (PerToken(4)(x) * torch.arange(8.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(8.0).expand(4, 8))
    for bad in (
        {"bits": 1},
        {"bits": 9},
        {"bits": 4, "clip": 0.0},
        {"bits": 4, "clip": 1.5},
        {"bits": 4, "full_range": True},
    ):
        with pytest.raises(ValueError):
            PerToken(**bad)


# --- rotations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64, 128, 12, 172, 344, 352, 768])
def test_a_rotation_is_its_dense_matrix_and_orthogonal(size):
    rotation, x = Rotation.hadamard(size), torch.randn(3, 2, size, dtype=torch.float64)
    matrix = dense(rotation.factors)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(
        matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64)
    )
    torch.testing.assert_close(rotation(x), x @ matrix)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x)


# Widths with a tabulated factor: its root is no power of two.
ODD = [
    12,
    20,
    28,
    36,
    40,
    44,
    52,
    60,
    172,
    11008,
    14336,
    28672,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize("which", ["forth", "back"])
def test_a_rotation_has_no_gain_in_any_dtype(size, dtype, which):
    rotation = Rotation.hadamard(size)
    apply = rotation if which == "forth" else rotation.inverse
    x = torch.randn(1 + 60000 // size, size, generator=torch.Generator().manual_seed(size)).to(
        dtype
    )
    exact, got = apply(x.double()), apply(x)
    assert got.dtype == dtype
    # A relative error of at most half a unit in the last place, uniform, is less than 0.6 of that
    # half in root mean square.
    half, error, narrow = torch.finfo(dtype).eps / 2, got.double() - exact, dtype.itemsize == 2
    # Float32 rounds the scale itself.
    assert abs(float((error * exact).sum() / exact.pow(2).sum())) < (0.1 if narrow else 1) * half
    assert float(error.norm() / exact.norm()) < (0.6 if narrow else 16) * half  # and the sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_reads_a_rotated_input_that_is_rounded_once(dtype):
    x, rotation = (
        torch.randn(4, 14336, generator=torch.Generator().manual_seed(0)).to(dtype),
        Rotation.hadamard(14336),
    )
    assert torch.equal(InputQuantizer(rotation)(x), rotation(x.float()).to(dtype))


def test_factors_are_placed_once_for_a_device_and_dtype(monkeypatch):
    rotation, placed, to = Rotation.across_heads(12, 4), [], torch.Tensor.to

    def counted(t, *args, **kwargs):
        placed.append(args) if t.dtype == torch.int8 else None
        return to(t, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with torch.inference_mode():  # what is kept from here on must still do for gradients
        rotation(torch.randn(2, 48))
    x = torch.randn(2, 48, requires_grad=True)
    rotation.inverse(rotation(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 48))
    rotation(x.bfloat16())
    rotation(torch.randn(2, 48, device="meta"))
    assert placed == [(torch.device("cpu"), torch.float32), (torch.device("meta"), torch.float32)]
    monkeypatch.undo()
    torch.export.export(
        _Rotating(again := Rotation.hadamard(12)), (torch.randn(2, 12),), strict=False
    )
    assert type(again(torch.randn(2, 12))) is torch.Tensor  # nothing of the tracer's was kept


class _Rotating(torch.nn.Module):
    def __init__(self, rotation):
        super().__init__()
        self.rotation = rotation

    def forward(self, x):
        return self.rotation(x)


@pytest.mark.parametrize("threshold", [6.0, 6.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outliers_are_compared_with_the_threshold_as_it_is(dtype, threshold):
    near = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    x = torch.stack(
        [
            torch.nextafter(near, torch.tensor(-torch.inf, dtype=dtype)),
            near,
            torch.nextafter(near, torch.tensor(torch.inf, dtype=dtype)),
        ]
    )
    assert LLMInt8(8, threshold).outliers(x[None]).tolist() == [
        float(v) >= threshold for v in x.float()
    ]


def test_sizes_without_a_hadamard_matrix_are_named():
    with pytest.raises(LowbitError, match="the width is 262 = 2 x 131"):
        Rotation.hadamard(262, "the width")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "quarot",
    [
        QuaRot(heads=False, online=False),
        QuaRot(residual=False),
        QuaRot(residual=False, online=False),
        QuaRot(),
    ],
)
def test_rotations_keep_the_logits_of_every_family(tmp_path, family, quarot):
    folder = save_tiny(tmp_path, family, torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(
        IDS, use_cache=False
    ).logits
    recipe, plain = Recipe(Affine(8), (quarot,)), ModelStream(folder, compute=torch.float64)
    if family == "opt-post-norm" and quarot.residual:
        with pytest.raises(LowbitError, match="cannot be rotated"):
            staged(plain, recipe)
        return
    rotated = staged(plain, recipe).source
    x = rotated.embed(IDS, torch.float64)
    changed = 0
    for i in range(len(rotated)):
        block = quarot(opened(rotated, recipe, i))
        changed += sum(
            not torch.equal(block.weight(n), plain.block_weights(i)[f"{n}.weight"])
            for n in block.graph.linears
        )
        x = block.forward(x)
    assert changed >= 2 * len(rotated)
    torch.testing.assert_close(rotated.head(x), expected.float(), rtol=0, atol=5e-6)


def test_rotation_spreads_an_outlier_channel(stream):
    block = opened(stream, W4A4)
    loud = block.x.clone()
    loud[..., 3] *= 30
    rotated = Rotation.hadamard(64)(loud)
    peak = lambda x: float((x.abs().amax(-1) / x.pow(2).mean(-1).sqrt()).mean())  # noqa: E731
    assert peak(rotated) < 0.6 * peak(loud)


# --- transforms for activations -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gemma", "bitnet", "phi3"])
def test_smoothquant_keeps_the_function_and_evens_out_channels(tmp_path, family):
    block = opened(ModelStream(save_tiny(tmp_path, family, torch.float32)), Recipe(Affine(8)))
    smooth = SmoothQuant(0.5)(block)
    torch.testing.assert_close(
        smooth.forward(block.x[:4]), block.forward(block.x[:4]), rtol=1e-4, atol=1e-4
    )
    site = block.graph.sites[0]
    seen = {}
    for name, b in (("before", block), ("after", smooth)):
        b.observe(
            [site.reads[0]],
            "float",
            8,
            lambda _, call, name=name: seen.setdefault(
                name, call.args[0].flatten(0, -2).abs().amax(0)
            ),
        )
    spread = {k: float(v.max() / v.median()) for k, v in seen.items()}
    assert spread["after"] < spread["before"]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([2, 4]), st.booleans())
def test_clip_under_quantized_activations_against_every_token(seed, bits, symmetric):
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(3, 16, generator=g).double(), torch.randn(40, 16, generator=g).double()
    q, grid = PerToken(3)(x), Affine(bits, 8)
    cut = lambda t: t.reshape(40, 2, 8).transpose(0, 1)  # noqa: E731
    _, high = search_clip(
        weight,
        cut(q).transpose(1, 2) @ cut(q),
        grid,
        10,
        symmetric=symmetric,
        drift=cut(q).transpose(1, 2) @ (cut(q) - cut(x)),
    )
    for row in range(3):
        for group in range(2):
            w, at = weight[row, 8 * group : 8 * group + 8], slice(8 * group, 8 * group + 8)
            bottom, top = (
                (-float(w.abs().max()), float(w.abs().max()))
                if symmetric
                else (float(w.min()), float(w.max()))
            )
            errors = []
            for i in range(10):
                p = 1 - i / 20
                clamped = w.clamp(bottom * p, top * p)[None]
                own = Affine(bits)
                params = own.fit(clamped)
                decoded = own.decode(own.encode(clamped, params), params)[0]
                errors.append(float((q[:, at] @ decoded - x[:, at] @ w).pow(2).sum()))
            chosen = round((1 - float(high[row, group]) / top) * 20)
            assert errors[chosen] <= min(errors) * (1 + 1e-9)


# --- in a block -----------------------------------------------------------------------------------


def test_every_linear_of_a_block_reads_quantized_inputs(stream):
    block = opened(stream, W4A4)
    seen = {}
    handles = [
        block.module.get_submodule(n).register_forward_hook(
            lambda _, args, __, n=n: seen.__setitem__(n, args[0])
        )
        for n in block.graph.linears
    ]
    block.forward(block.x[:2])
    for handle in handles:
        handle.remove()
    assert set(seen) == set(block.graph.linears)
    for x in seen.values():
        levels = max(len(token.unique()) for token in x.flatten(0, -2))
        assert 2 < levels <= 16
    assert torch.equal(seen["self_attn.q_proj"], seen["self_attn.v_proj"])
    assert not torch.allclose(
        block.forward(block.x[:2]), block.exact().forward(block.x[:2]), atol=1e-4
    )
    assert torch.equal(block.target, block.exact().run(block.x))


def test_no_hook_survives_a_pass(stream):
    block = opened(stream, W4A4)
    with pytest.raises(RuntimeError):
        block.forward(block.x[:2, :, :5])
    assert not any(m._forward_pre_hooks for m in block.module.modules())


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3", "bitnet"])
def test_keys_and_values_are_quantized_in_every_family(tmp_path, family):
    stream = ModelStream(save_tiny(tmp_path, family, torch.float32))
    block = opened(stream, Recipe(Affine(8), kv=PerToken(2)))
    exact = block.exact().forward(block.x[:4])
    errors = [
        float((replace(block, kv=KVGrid(PerToken(b))).forward(block.x[:4]) - exact).pow(2).mean())
        for b in (2, 4, 8)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_keys_are_rotated_around_their_grid():
    k, rotation = torch.randn(2, 2, 5, 16), Rotation.hadamard(16)
    kv = KVGrid(PerToken(3), rotation)
    keys, values = QuantizedStates(kv).update(k, k, 0)
    torch.testing.assert_close(
        keys, PerToken(3)(k @ dense(rotation.factors).float()) @ dense(rotation.factors).T.float()
    )
    assert torch.equal(values, PerToken(3)(k))


@pytest.mark.parametrize(
    "methods",
    [(AWQ(),), (SmoothQuant(), AWQ()), (QuaRot(), AWQ(scales=False)), (QuaRot(), SmoothQuant())],
)
def test_tuning_helps_under_quantized_activations(stream, methods):
    tuned = (*methods, TesseraQ(schedule="exponential-4-6", iters=8, lr=3e-2))
    losses = []
    for chain in (methods, tuned):
        recipe = Recipe(Affine(3, 16), chain, activations=PerToken(6))
        block = apply_methods(opened(staged(stream, recipe).source, recipe), recipe)
        assert set(block.coded) == set(block.graph.linears)
        losses.append(block.notes["loss_after"])
    assert losses[1] < 0.9 * losses[0]


def test_readings_apply_rotation_then_factor_then_grid():
    x, factor, rotation = torch.randn(3, 8), torch.rand(8) + 0.5, Rotation.hadamard(8)
    torch.testing.assert_close(
        InputQuantizer(rotation, PerToken(4), factor)(x), PerToken(4)(rotation(x) / factor) * factor
    )
    torch.testing.assert_close(InputQuantizer(rotation, PerToken(4)).exact()(x), rotation(x))


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["W4A4", "W4A8KV4", "W3A3g64sym", "W2A16g64", "W8A8sym", "W4A16KV8"]
)
def test_scheme_names_are_inverse(name):
    assert str(parse_scheme(name)) == name
    recipe = load_recipe("awq", scheme=parse_scheme(name))
    assert str(recipe.scheme) == name
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_activation_options_wait_for_a_scheme_that_has_them():
    assert load_recipe("smoothquant").activations == PerToken(8, symmetric=True, full_range=True)
    assert load_recipe("smoothquant", scheme=parse_scheme("W4A4")).activations == PerToken(
        4, symmetric=True, full_range=True
    )
    assert load_recipe("smoothquant", scheme=parse_scheme("W4A16")).activations is None
    assert load_recipe(
        "awq", scheme=parse_scheme("W4A4"), settings=["activations.clip=0.9"]
    ).activations == PerToken(4, clip=0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_scheme("W4A1"), "2 to 8"),
        (
            lambda: load_recipe(
                "awq", scheme=parse_scheme("W4A4"), settings=["activations.clip=2.0"]
            ),
            "clip",
        ),
        (lambda: load_recipe("awq", settings=["activations.bits=4"]), "said by the scheme"),
        (lambda: load_recipe("awq", settings=["overrides.*=W4A4"]), "overrides are about weights"),
        (lambda: Recipe(Affine(4), (RTN(), AWQ())), "'awq' after 'rtn'"),
        (lambda: Recipe(Affine(4), (AWQ(), QuaRot())), "must come first"),
        (lambda: QuaRot(False, False, False), "rotates nothing"),
        (lambda: SmoothQuant(alpha=1.5), "alpha"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(LowbitError, match=message):
        make()


def test_linears_of_a_site_share_their_prepared_input(stream, monkeypatch):
    block, calls = opened(stream, W4A4), []
    quantize = PerToken.__call__
    monkeypatch.setattr(PerToken, "__call__", lambda self, x: calls.append(1) or quantize(self, x))
    block.forward(block.x[:2])
    assert len(calls) == len(block.graph.sites)
