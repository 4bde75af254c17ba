"""K-quants under the methods, in recipes, artifacts and transformers; the blocks themselves are in
test_gguf.py.
"""

import json
from dataclasses import replace

import helpers
import pytest
import torch
from helpers import apply_methods, assert_slopes, begin, projected, save_tiny
from safetensors.torch import load_file, save_file
from test_gguf import artifact, wide
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import verify
from lowbit.cli import app
from lowbit.errors import LowbitError, VerificationError
from lowbit.formats import kquant as blocks
from lowbit.formats.packing import pack, tensor_bytes, unpack
from lowbit.grid import Affine, KQuant, QTensor
from lowbit.grid.names import parse_scheme
from lowbit.methods import AWQ, CLAQ, GPTQ, RTN, OmniQuant, TesseraQ
from lowbit.methods._columns import inverse_factor
from lowbit.methods._hessian import Inputs
from lowbit.methods._reconstruct import Reconstruction
from lowbit.methods._soft import SoftBlock
from lowbit.methods.gptq import error_cost, fit_range, solve
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.plan.checks import check_divides
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe
from lowbit.runtime.linears import DecodedLinear

FAST = TesseraQ(schedule="exponential-4-4", iters=6)


@pytest.fixture(scope="module", params=["q2_k", "q3_k"])
def block(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        wide(patch)
        stream = ModelStream(save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    return begin(
        stream, 0, Recipe(KQuant(request.param)), Streams(x, x, 8), stream.block_kwargs(32)[0], 0
    )


@pytest.mark.parametrize(
    "method",
    [
        RTN(),
        AWQ(exponents=4, shrinks=3),
        GPTQ(),
        GPTQ(act_order=True),
        FAST,
        replace(FAST, rounds=2),
        replace(FAST, refit=5),
    ],
)
def test_every_method_ends_in_blocks_and_is_deterministic(block, method):
    once, twice = (
        apply_methods(block, Recipe(block.grids["mlp.down_proj"], (method,))) for _ in range(2)
    )
    assert set(once.coded) == set(block.graph.linears)
    for name, q in once.coded.items():
        assert q.same_as(twice.coded[name]) is None
        assert unpack(pack(q, torch.float32), q.grid, name).same_as(q) is None


def test_losses_fall_from_method_to_method(block):
    def error(*methods):
        done = apply_methods(block, Recipe(block.grids["mlp.down_proj"], methods))
        return Reconstruction(done, 4).loss(done.decoded(), 8)

    rtn, gptq, tuned = error(RTN()), error(GPTQ()), error(FAST)
    assert gptq < 0.8 * rtn and tuned < 0.8 * rtn
    assert error(GPTQ(), replace(FAST, rounds=1)) < gptq


def brute_force(w, hessian, grid, params):
    """Optimal brain quantization: after every column, the rest by the inverse of what remains of
    the Hessian.
    """
    w, codes, left = w.clone(), torch.zeros_like(w, dtype=torch.uint8), list(range(w.shape[1]))
    scale, offset = (t.double() for t in grid.steps(params))
    while left:
        c, sub = left[0], left[0] // grid.group_size
        inverse = torch.linalg.inv(hessian[left][:, left])
        step = torch.where(scale[:, sub] == 0, 1.0, scale[:, sub])
        code = (
            torch.where(scale[:, sub] == 0, 0.0, ((w[:, c] + offset[:, sub]) / step))
            .round()
            .clamp(-grid.middle, grid.top - grid.middle)
        )
        codes[:, c] = (code + grid.middle).to(torch.uint8)
        e = (w[:, c] - (code * scale[:, sub] - offset[:, sub])) / inverse[0, 0]
        w[:, left[1:]] -= e[:, None] * inverse[0, 1:]
        left = left[1:]
    return codes


def fixed_in_advance(w, inputs, grid):
    params = fit_range(grid, w, "none", torch.float64, error_cost(inputs))
    return solve(w, inputs, grid, params, torch.float64, block_size=64)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k"])
def test_gptq_in_blocks_against_brute_force(kind):
    g, grid = torch.Generator().manual_seed(1), KQuant(kind)
    x = torch.randn(700, 256, generator=g, dtype=torch.float64) @ torch.randn(
        256, 256, generator=g, dtype=torch.float64
    )
    hessian, w = x.T @ x, torch.randn(6, 256, generator=g, dtype=torch.float64)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inputs = Inputs(
        inverse_factor(hessian.clone()), torch.arange(256), torch.zeros(256, dtype=torch.bool)
    )
    params = grid.fit(w)
    q = solve(w, inputs, grid, params, torch.float64, block_size=64)
    expected = brute_force(w, hessian, grid, params)
    # Positions are in float32 here, halves may fall to either side.
    assert float((q.codes == expected).double().mean()) > 0.995

    def loss(p, codes):
        return float(
            (
                ((grid.decode(codes, p).double() - w) @ hessian)
                * (grid.decode(codes, p).double() - w)
            ).sum()
        )

    assert loss(params, q.codes) < 0.9 * loss(params, grid.encode(w, params))
    own = fixed_in_advance(w, inputs, grid)
    assert loss(own.params, own.codes) < 1.3 * loss(params, q.codes)


def test_gradients_match_finite_differences(block, monkeypatch):
    # Rounding has no slope.
    monkeypatch.setattr(KQuant, "stored", lambda self, params, dtype: params)
    soft = SoftBlock(block)
    for b in soft.buckets:
        b.v.add_(0.1)
    loss, found = projected(soft, block)
    for b, (by_nu, grad) in zip(soft.buckets, found, strict=True):
        assert_slopes(loss, b.nu, by_nu)
        # Of each list (256 inputs): the unit of its scales, and that of its minima.
        for at in [(0, 0, 0), (3, 0, 0), *([] if b.grid.symmetric else [(5, 0, 1), (20, 0, 1)])]:
            keep, eps = b.v[at].item(), 1e-2
            b.v[at] = keep + eps
            up = loss()
            b.v[at] = keep - eps
            down = loss()
            b.v[at] = keep
            assert abs(float((up - down) / (2 * eps)) - float(grad[at])) < 5e-3 + 2e-2 * abs(
                float(grad[at])
            )


def test_soft_weights_start_as_the_float_ones_and_end_as_stored(block):
    soft = SoftBlock(block)
    weights = soft.weights()
    for name in block.graph.linears:
        w, grid, params = block.weight(name), block.grids[name], block.range_of(name)
        near = grid.neighbours(w, params)
        inside = (near.low != near.high) & (params.scale.repeat_interleave(grid.group_size, 1) != 0)
        assert inside.double().mean() > 0.8
        torch.testing.assert_close(
            weights[f"{name}.weight"][inside], w[inside], rtol=1e-3, atol=1e-5
        )
    soft.harden_all()
    soft.buckets[0].v.add_(torch.randn_like(soft.buckets[0].v) * 0.3)
    weights = soft.weights()
    for name, q in soft.codes().items():
        assert torch.equal(weights[f"{name}.weight"], q.decode())


def test_a_restart_moves_to_codes_inside_the_range(block):
    done = GPTQ()(block)
    soft = SoftBlock(done)
    assert soft.from_codes and all(
        q.same_as(done.coded[n]) is None for n, q in soft.codes().items()
    )
    g = torch.Generator().manual_seed(0)
    gradient = {k: torch.randn(block.weights[k].shape, generator=g) for k in soft.keys}
    soft.aim(gradient, {k: torch.ones_like(v) for k, v in gradient.items()})
    for b in soft.buckets:
        b.nu.copy_(torch.where(b.other != b.base, 100.0, -100.0))
    for name, q in soft.codes().items():
        before, after = done.coded[name].decode(), q.decode()
        assert int(q.codes.max()) <= q.grid.top and bool(
            ((after - before) * gradient[f"{name}.weight"] <= 0).all()
        )
        assert float((after != before).double().mean()) > 0.3


def test_schemes_and_recipes():
    assert (
        parse_scheme("GGUF:Q2_K").weights == KQuant("q2_k")
        and str(parse_scheme("gguf:q4_k")) == "gguf:q4_k"
    )
    recipe = load_recipe(
        "gptq",
        scheme=parse_scheme("gguf:q2_k"),
        settings=["overrides.*.down_proj=gguf:q3_k", "overrides.*.v_proj=W4A16g32"],
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.grid_of("a.down_proj") == KQuant("q3_k") and recipe.grid_of("a.v_proj") == Affine(
        4, 32
    )
    for text, words in (
        ("gguf:q5_x", "a K-quant is one of q2_k, q3_k, q4_k, q6_k"),
        ("gguf", "or gguf:q2_k"),
    ):
        with pytest.raises(LowbitError, match=words):
            parse_scheme(text)
    with pytest.raises(
        LowbitError, match="omniquant learns ranges of uniform grids, and gguf:q2_k has none"
    ):
        Recipe(KQuant("q2_k"), (OmniQuant(),))
    with pytest.raises(LowbitError, match="claq needs a codebook per column, not gguf:q2_k"):
        Recipe(KQuant("q2_k"), (CLAQ(),))
    with pytest.raises(LowbitError, match="this recipe is for codebooks"):
        load_recipe("claq", scheme=parse_scheme("gguf:q2_k"))


def test_an_artifact_of_several_kinds_loads_and_goes_out_unchanged(tmp_path, monkeypatch):
    wide(monkeypatch)
    model = save_tiny(tmp_path / "m")
    made = artifact(
        model,
        tmp_path / "a",
        "gguf:q2_k",
        "gptq",
        ["overrides.*.down_proj=gguf:q3_k", "overrides.*.v_proj=W4A16g32sym"],
    )
    report = json.loads((made / "report.json").read_text())
    assert report["format"] == "lowbit" and report["verification"]["logits_rms"] < 1e-5
    assert {e["scheme"] for e in report["linears"] if "skipped" not in e} == {
        "gguf:q2_k",
        "gguf:q3_k",
        "W4A16g32sym",
    }
    for e in report["linears"]:
        if e.get("scheme", "").startswith("gguf"):
            assert e["bytes"] == tensor_bytes(parse_scheme(e["scheme"]).weights, *e["shape"])
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(made)
    assert sum(isinstance(m, DecodedLinear) for m in loaded.modules()) == 14
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    result = CliRunner().invoke(
        app, ["export", str(made), "-o", str(tmp_path / "g"), "--to", "gguf"]
    )
    assert result.exit_code == 0, result.output
    types = json.loads((tmp_path / "g" / "report.json").read_text())["gguf"]["types"]
    assert types == {"Q2_K": 10, "Q3_K": 2, "Q4_0": 2}
    for target in ("gptq", "mlx", "compressed-tensors"):
        refused = CliRunner().invoke(
            app, ["export", str(made), "-o", str(tmp_path / "x"), "--to", target]
        )
        assert refused.exit_code == 2 and not (tmp_path / "x").exists(), refused.output


@pytest.mark.parametrize(
    "widths, words",
    [
        (
            (640, 1024, 2048),
            "W2A16g64sym (q2_0), W4A16g32sym (q4_0), W4A16g32 (q4_1), W8A16g32sym (q8_0)",
        ),
        ((64, 96), "W4A16g32sym (q4_0), W4A16g32 (q4_1), W8A16g32sym (q8_0)"),
        ((640, 40), "none"),
    ],
)
def test_a_k_quant_that_does_not_fit_names_what_does(widths, words):
    shapes = {f"model.layers.{i}.w": (8, width) for i, width in enumerate(widths)}
    with pytest.raises(LowbitError) as refused:
        check_divides(shapes, Recipe(KQuant("q2_k"), ()))
    said = "schemes whose types of GGUF fit every linear of this model are"
    assert str(refused.value).endswith(f"of 'model.layers.0.w': {said} {words}.")


def test_rows_that_blocks_do_not_divide_are_refused_before_any_work(tmp_path):
    model = save_tiny(tmp_path / "m")
    with pytest.raises(
        LowbitError,
        match=r"gguf:q2_k comes in blocks of 256 inputs, which do not divide the 64 inputs of 'model.layers.0.self_attn.q_proj': schemes whose types of GGUF fit every linear of this model are W4A16g32sym \(q4_0\), W4A16g32 \(q4_1\), W8A16g32sym \(q8_0\)\.",
    ):
        lowbit.quantize(
            str(model),
            "gguf:q2_k",
            "rtn",
            out=tmp_path / "a",
            calib=str(model / "text.txt"),
            samples=4,
            length=32,
        )
    assert not list(tmp_path.glob("a*"))


def test_damaged_blocks_are_named(tmp_path, monkeypatch):
    wide(monkeypatch)
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a", "gguf:q2_k")
    shard = next(
        p
        for p in sorted(made.glob("*.safetensors"))
        if any(k.endswith("weight_blocks") for k in load_file(p))
    )
    tensors = load_file(shard)
    key = next(k for k in tensors if k.endswith("down_proj.weight_blocks"))
    local = {
        "weight_blocks": tensors[key].clone(),
        "weight_shape": tensors[key.replace("blocks", "shape")],
    }
    grid = KQuant("q2_k")
    assert isinstance(blocks.unpack(local, grid, "w"), QTensor)
    with pytest.raises(LowbitError, match="'w.weight_blocks' is damaged"):
        blocks.unpack({**local, "weight_blocks": local["weight_blocks"][:, :-1]}, grid, "w")
    with pytest.raises(LowbitError, match="'w' is damaged: no tensor 'weight_shape'"):
        blocks.unpack({"weight_blocks": local["weight_blocks"]}, grid, "w")
    # Infinity.
    local["weight_blocks"].view(-1, 84)[3, 80:82] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    with pytest.raises(LowbitError, match="a unit is not finite"):
        blocks.unpack(local, grid, "w")
    tensors[key][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(
        VerificationError, match=r"down_proj.weight_blocks' in .* is not what was written"
    ):
        verify(made, loader=False)


def test_the_plan_counts_blocks(tmp_path, monkeypatch):
    wide(monkeypatch)
    save_tiny(tmp_path / "m")
    result = CliRunner().invoke(
        app,
        ["plan", str(tmp_path / "m"), "--scheme", "gguf:q2_k", "--json", str(tmp_path / "p.json")],
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "p.json").read_text())["bits_per_weight"] == pytest.approx(
        2.625, abs=0.01
    )
    assert helpers.LLAMA["hidden_size"] == 256
