"""MXFP4: the grid against all its codes in float64, its tensors, and that plain transformers reads
them bit for bit.
"""

import json

import pytest
import torch
from helpers import begin, save_tiny
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowbit.artifact.proof.runtimes import runtime_logits
from lowbit.errors import LowbitError
from lowbit.formats import affine, mxfp4, native, packing
from lowbit.formats import compressed_tensors as ct
from lowbit.grid import MXFP4, Affine, Codebook, KVGrid, MXFP4Params, PerToken, QTensor
from lowbit.grid.mxfp4 import LEVELS, MAGNITUDES, ZERO
from lowbit.methods import AWQ, CLAQ, GPTQ, RTN, OmniQuant, TesseraQ
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.runtime.linears import DecodedLinear

GRID = MXFP4()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(rows=6, columns=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-9, 9, (rows, columns // 32, 1), generator=g).double())
    w = torch.randn(rows, columns // 32, 32, generator=g, dtype=torch.float64)
    return (w * spread).flatten(1)


def halfway(rows=5, seed=1):
    """Multiples of a quarter up to 8: every level, every point halfway, and what is clipped."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-32, 33, (rows, 64), generator=g).double() / 4


def coded(w, dtype=torch.bfloat16):
    params = GRID.stored(GRID.fit(w), dtype)
    return QTensor(GRID, GRID.encode(w, params), params)


# --- the grid -------------------------------------------------------------------------------------


def test_levels_are_those_of_e2m1_in_order():
    assert sorted({*E2M1.tolist(), *(-E2M1).tolist()}) == list(LEVELS)
    assert len(LEVELS) == 15 and LEVELS[ZERO] == 0


@pytest.mark.parametrize("w", [weights(), halfway()])
@pytest.mark.parametrize("exponent", [0, -3])
def test_codes_against_all_fifteen(w, exponent):
    params = MXFP4Params(torch.full((len(w), w.shape[1] // 32), 2.0**exponent).double())
    codes = GRID.encode(w, params)
    levels = torch.tensor(LEVELS, dtype=torch.float64) * 2.0**exponent
    distance = (w[..., None] - levels).abs()  # (out, in, 15)
    least = distance == distance.amin(-1, keepdim=True)
    assert bool(least.gather(-1, codes.long()[..., None]).all())
    tie = least.sum(-1) == 2
    assert bool(((codes.long() - ZERO)[tie] % 2 == 0).all())
    assert torch.equal(GRID.decode(codes, params), levels[codes.long()])
    for column in (0, 31, 32, w.shape[1] - 1):
        one = GRID.take(params, column)
        assert torch.equal(one.encode(w[:, column, None])[:, 0], codes[:, column])
        decoded = one.decode(codes[:, column, None])[:, 0]
        assert torch.equal(decoded, levels[codes[:, column].long()])


@pytest.mark.parametrize("weighted", [False, True])
def test_no_power_of_two_fits_better(weighted):
    w = weights(rows=40)
    weight = torch.rand(w.shape, dtype=torch.float64) if weighted else None

    def errors(scale):
        params = MXFP4Params(scale)
        square = (GRID.decode(GRID.encode(w, params), params) - w).square()
        return GRID.grouped(square if weight is None else square * weight).sum(-1)

    every = torch.stack([errors(torch.full((40, 3), 2.0**e).double()) for e in range(-16, 16)])
    fitted = GRID.fit(w, weight)
    torch.testing.assert_close(errors(fitted.scale), every.amin(0))
    assert torch.equal(GRID.stored(fitted, torch.float16).scale, fitted.scale)


def test_ranges_are_rounded_where_the_squared_error_is_least():
    """On the average over groups: a hundredth more is lost to the best choice for each, not 1/5 as
    with a scale that clips nothing, nor more as with the exponent rounded down.
    """
    w = torch.randn(4000, 32, dtype=torch.float64) * torch.exp2(torch.rand(4000, 1).double())
    peak = w.abs().amax(1, keepdim=True) / 6
    tried = {
        "fit": GRID.fit(w),
        "range": GRID.from_range(*GRID.ends(w)),
        "up": MXFP4Params(torch.exp2(peak.log2().ceil())),
        "down": MXFP4Params(torch.exp2(peak.log2().floor())),
    }
    lost = {k: float((GRID.rounded(w, p) - w).square().sum()) for k, p in tried.items()}
    assert lost["range"] < 1.01 * lost["fit"]
    assert lost["up"] > 1.05 * lost["range"] and lost["down"] > 2 * lost["range"]


@pytest.mark.parametrize(
    "scale, stored",
    [(1.0, 1.0), (1.49, 1.0), (1.5, 2.0), (1.99, 2.0), (0.76, 1.0), (0.0, 2.0**-126)],
)
def test_scales_are_stored_as_the_nearest_power_of_two(scale, stored):
    params = MXFP4Params(torch.full((2, 3), scale).requires_grad_())
    held = GRID.stored(params, torch.float16)
    assert torch.equal(held.scale, torch.full((2, 3), stored))
    held.scale.sum().backward()
    assert torch.equal(params.scale.grad, torch.ones(2, 3))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(number):
    w = torch.ones(1, 32)
    w[0, 3] = number
    with pytest.raises(ValueError, match="mxfp4"):
        GRID.check_finite(GRID.stored(GRID.fit(w), torch.bfloat16))


def test_neighbours_enclose_the_weight():
    w = torch.cat([weights().float(), halfway(6).float()[:, :32]], 1)
    params = GRID.fit(w)
    low, high, fraction = GRID.neighbours(w, params)
    up = GRID.beside(low, torch.ones_like(w), params)
    assert torch.equal(up, high)
    assert torch.equal(
        GRID.beside(high, torch.full_like(w, -1), params)[low < high], low[low < high]
    )
    below, above = GRID.decode(low, params), GRID.decode(high, params)
    inside = (
        w >= -6 * GRID.grouped(torch.ones_like(w)).mul(params.scale[..., None]).flatten(1)
    ) & (w <= 6 * GRID.grouped(torch.ones_like(w)).mul(params.scale[..., None]).flatten(1))
    torch.testing.assert_close((below + fraction * (above - below))[inside], w[inside])
    assert bool(((below <= w) & (w <= above))[inside].all())


def test_params_are_cut_joined_and_moved():
    w = weights().float()
    whole = GRID.fit(w)
    parts = [GRID.fit(part) for part in w.split(GRID.period(96), 1)]
    assert GRID.join(parts).differing(whole) is None
    lists = GRID.lists(w)
    assert torch.equal(GRID.unlisted(lists, len(w)), w)
    cut = GRID.cut(whole, len(lists))
    assert GRID.uncut(cut, len(w)).differing(whole) is None
    codes = GRID.of_lists.encode(lists, cut)
    assert torch.equal(GRID.unlisted(codes, len(w)), GRID.encode(w, whole))
    assert GRID.moved(cut, torch.ones(GRID.freedom(cut))).differing(cut) is None


def test_rounded_has_the_slopes_of_rounding_straight_through():
    w = (halfway() + 0.1).requires_grad_()
    scale = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
    out = GRID.rounded(w, MXFP4Params(scale))
    assert torch.equal(out, GRID.decode(GRID.encode(w, MXFP4Params(scale)), MXFP4Params(scale)))
    out.sum().backward()
    clipped = w.abs() > 6
    assert torch.equal(w.grad, (~clipped).double())
    slope = torch.where(clipped, out, out - w).detach()
    torch.testing.assert_close(scale.grad, GRID.grouped(slope).sum(-1))


def test_names_and_widths():
    assert MXFP4.parse("MXFP4") == GRID and MXFP4.parse("w4g32") is None and str(GRID) == "mxfp4"
    with pytest.raises(ValueError, match="blocks of 32 inputs, which do not divide the 40"):
        GRID.check(40)


@pytest.mark.parametrize(
    "methods",
    [
        (RTN(),),
        (AWQ(exponents=3), RTN()),
        (GPTQ(),),
        (GPTQ(act_order=True),),
        (OmniQuant(epochs=1), RTN()),
        (TesseraQ(schedule="exponential-4-4", iters=4),),
        (CLAQ(outlier_bits=0.2),),
    ],
    ids=lambda m: "+".join(type(x).__name__ for x in m),
)
def test_methods_end_on_the_grid(methods, tmp_path):
    stream = ModelStream(save_tiny(tmp_path, dtype=torch.float32))
    x = stream.embed(torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0)))
    done = begin(stream, 0, Recipe(GRID), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)
    for method in methods:
        done = method(done)
    assert set(done.coded) == set(done.graph.linears)
    for q in done.coded.values():
        tensors = packing.pack(q, torch.bfloat16)
        assert packing.unpack(tensors, GRID, "w").same_as(q) is None


# --- the layout -----------------------------------------------------------------------------------


def test_nibble_by_nibble_and_back():
    w = weights()
    q = coded(w)
    t = mxfp4.pack(q, torch.bfloat16)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in t.items()} == {
        "weight_packed": (torch.uint8, (6, 48)),
        "weight_scale": (torch.uint8, (6, 3)),
    }
    assert sum(v.nbytes for v in t.values()) == mxfp4.tensor_bytes(GRID, 6, 96)
    for row, column in ((0, 0), (5, 95), (2, 33), (3, 64)):
        byte = int(t["weight_packed"][row, column // 2])
        nibble = byte >> 4 if column % 2 else byte & 15
        value = float(E2M1[nibble & 7]) * (-1 if nibble & 8 else 1)
        value *= 2.0 ** (int(t["weight_scale"][row, column // 32]) - 127)
        assert value == float(q.decode(torch.float64)[row, column])
    assert mxfp4.unpack(t, GRID).same_as(q) is None
    assert torch.equal(q.decode(torch.bfloat16).double(), q.decode(torch.float64))


def test_a_negative_zero_is_read_as_zero():
    held = {
        "weight_packed": torch.full((1, 16), 0x88, dtype=torch.uint8),
        "weight_scale": torch.full((1, 1), 127, dtype=torch.uint8),
    }
    assert torch.equal(mxfp4.unpack(held, GRID).codes, torch.full((1, 32), ZERO, dtype=torch.uint8))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("weight_scale"), "'a.b' has no tensor 'weight_scale'"),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, 1:]), "do not belong together"),
        (lambda t: t.update(weight_scale=t["weight_scale"].int()), "do not belong together"),
        (lambda t: t["weight_scale"].fill_(255), "an exponent is beyond"),
    ],
)
def test_damaged_tensors_are_refused_by_name(change, words):
    held = mxfp4.pack(coded(weights()), torch.bfloat16)
    change(held)
    with pytest.raises(LowbitError, match=words):
        packing.unpack(held, GRID, "a.b")


def test_what_would_change_is_not_packed():
    q = coded(weights())
    with pytest.raises(LowbitError, match="no powers of two"):
        mxfp4.pack(QTensor(GRID, q.codes, MXFP4Params(q.params.scale * 1.5)), torch.bfloat16)
    with pytest.raises(LowbitError, match="a code is 15"):
        mxfp4.pack(QTensor(GRID, torch.full_like(q.codes, 15), q.params), torch.bfloat16)


# --- as config.json says it, and as transformers reads it -------------------------------------------


@pytest.mark.parametrize(
    "grids, dtype, words",
    [
        ([GRID], torch.float16, None),
        ([GRID, Affine(4, 32, True)], torch.bfloat16, None),
        (
            [GRID, Affine(4, 32, True)],
            torch.float16,
            "decodes mxfp4 to bfloat16.*in float16 only if",
        ),
        ([GRID, Affine(4, 32, True)], None, "decodes mxfp4 to bfloat16"),
        ([GRID, Affine(4, 32)], torch.bfloat16, "only if all are symmetric"),
        ([Affine(4, 32), Affine(3, 32)], torch.bfloat16, "only if all are symmetric"),
        ([Affine(4, 32, True), Affine(3, 32, True)], None, None),
    ],
)
def test_which_grids_transformers_loads_together(grids, dtype, words):
    if words is None:
        ct.check_mixed(grids, dtype)
    else:
        with pytest.raises(LowbitError, match=words):
            ct.check_mixed(grids, dtype)


def test_its_activations_stay_in_floating_point():
    eight = PerToken(8, True, full_range=True)
    assert ct.carries([GRID], None) and not ct.carries([GRID], eight)
    assert ct.carries([Affine(8, None, True)], eight)
    assert not ct.carries([Codebook(4)], eight)


def test_the_config_of_both_formats_is_inverse():
    grids = {"model.layers.0.q": GRID, "model.layers.0.k": GRID, "model.layers.0.v": Codebook(2)}
    plain = {n: g for n, g in grids.items() if g == GRID}
    said = json.loads(json.dumps(ct.describe(plain, ["lm_head"], dtype=torch.bfloat16)))
    assert said["format"] == "mxfp4-pack-quantized" and "dequantize" not in said
    assert all(ct.grid_of(said, n) == GRID for n in plain) and ct.grid_of(said, "lm_head") is None
    counts = {"model.layers.0.v": {"columns": {"2": 8}}}
    own = native.describe(grids, ["lm_head"], torch.float16, {}, None, counts)
    assert {n: native.grid_of(json.loads(json.dumps(own)), n) for n in grids} == grids
    assert list(own["linears"]) == ["model.layers.0.v"]
    said["config_groups"]["group_0"]["format"] = "nvfp4-pack-quantized"
    with pytest.raises(LowbitError, match="format 'nvfp4-pack-quantized', which lowbit does not"):
        ct.grid_of(said, "model.layers.0.q")


def artifact(folder, dtype, grid_for):
    """A model in compressed-tensors, written by hand, and its linears by name."""
    save_tiny(folder, "llama-mha", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tensors, held = {}, {}
    for name, value in model.state_dict().items():
        linear, _, last = name.rpartition(".")
        if "layers" in name and value.dim() == 2 and last == "weight":
            grid = grid_for(linear)
            params = grid.stored(grid.fit(value.float()), dtype)
            held[linear] = q = QTensor(grid, grid.encode(value.float(), params), params)
            tensors |= {f"{linear}.{k}": t for k, t in packing.pack(q, dtype).items()}
        else:
            tensors[name] = value.contiguous()
    grids = {n: q.grid for n, q in held.items()}
    ct.check_mixed(grids.values(), dtype)
    config = json.loads((folder / "config.json").read_text())
    described = ct.describe(grids, ["lm_head"], dtype=dtype)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert packing.packed_linears(tensors) == sorted(held)
    return held


def mixed(linear):
    return GRID if "self_attn" in linear else Affine(4, 32, symmetric=True)


@pytest.mark.parametrize(
    "dtype, grid_for, format_",
    [
        *((d, lambda _: GRID, "mxfp4-pack-quantized") for d in DTYPES),
        (torch.bfloat16, mixed, "mixed-precision"),
    ],
    ids=["bfloat16", "float16", "float32", "mixed"],
)
def test_plain_transformers_reads_it_bit_for_bit(tmp_path, dtype, grid_for, format_):
    held = artifact(tmp_path, dtype, grid_for)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format"] == format_ and said.get("dequantize", False) == (dtype != torch.bfloat16)
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with torch.no_grad():
        logits = model(ids).logits  # some weights are decoded at the first pass
        for name, q in held.items():
            assert torch.equal(model.get_submodule(name).weight, q.decode(dtype)), name
        bare = json.loads((tmp_path / "config.json").read_text())
        del bare["quantization_config"]
        (plain := tmp_path / "plain").mkdir()
        (plain / "config.json").write_text(json.dumps(bare))
        whole = {k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))}
        whole |= {f"{n}.weight": q.decode(dtype) for n, q in held.items()}
        save_file(whole, plain / "model.safetensors", metadata={"format": "pt"})
        same = AutoModelForCausalLM.from_pretrained(plain, dtype="auto").eval()
        assert torch.equal(same(ids).logits, logits)
        # In a process that never imports lowbit, arithmetic in float32.
        found = runtime_logits(tmp_path, ids, ct.NAME, 12)["logits"]
        torch.testing.assert_close(found, same.float()(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_format_of_lowbit_loads_it(tmp_path):
    """As it must where something else of the model is beyond compressed-tensors."""
    held = artifact(tmp_path, torch.float16, lambda _: GRID)
    config = json.loads((tmp_path / "config.json").read_text())
    grids, kv = {n: q.grid for n, q in held.items()}, KVGrid(PerToken(4))
    config["quantization_config"] = native.describe(
        grids, ["lm_head"], torch.float16, {}, (kv, "self_attn"), {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, q in held.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, DecodedLinear) and linear.grid == GRID
        assert torch.equal(linear.weight, q.decode(torch.float16))
        assert linear.weight_scale.dtype == torch.uint8
    with torch.no_grad():
        assert bool(model(torch.arange(3, 15)[None]).logits.isfinite().all())


def test_it_has_no_shape_and_is_found_all_the_same():
    names = {"a.q.weight_packed", "a.q.weight_scale", "a.k.weight_shape", "a.norm.weight"}
    assert packing.packed_linears(names) == ["a.k", "a.q"]
    assert packing.is_packed("a.q", names) and not packing.is_packed("a.norm", names)
    assert affine.LAYOUT.mark == "weight_shape" and mxfp4.LAYOUT.mark == "weight_packed"
    assert MAGNITUDES[-1] == 6
