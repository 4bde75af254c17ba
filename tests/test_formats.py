"""Formats by name: which linear has which grid by each format's own rules, and damaged tensors."""

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.export.gguf.types import decoded, held, rounded
from lowbit.formats import affine, awq, gptq, mlx
from lowbit.formats.by_name import FORMATS
from lowbit.formats.ggml import BLOCKS
from lowbit.formats.uniform import as_uniform, most_common, uniform
from lowbit.grid import MXFP4, Affine, AffineParams, Codebook, KQuant, QTensor
from lowbit.grid.bits import pack, packed_words, unpack


def weight(grid, rows=32, columns=128, seed=0):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    params = grid.stored(grid.fit(w), torch.float16)
    return QTensor(grid, grid.encode(w, params), params)


# --- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8, 13, 31, 32, 33, 64, 129])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_is_one_little_endian_number(bits, count):
    """Code i in bits [i * bits, (i + 1) * bits) of an integer, in Python's own arithmetic."""
    generator = torch.Generator().manual_seed(100 * bits + count)
    codes = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8, generator=generator)
    words = pack(codes, bits)
    assert words.shape == (3, packed_words(count, bits)) and words.dtype == torch.int32
    assert words.shape[1] == (count * bits + 31) // 32
    for row, stored in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(stored)) == number
    assert torch.equal(unpack(words, bits, count), codes)
    assert torch.equal(unpack(words.T.contiguous().T, bits, count), codes)  # strides do not matter


@pytest.mark.parametrize(
    "codes, bits, words",
    [
        (torch.zeros(2, 8, dtype=torch.int32), 4, r"\(rows, n\) uint8 tensor, got .* torch.int32"),
        (torch.zeros(8, dtype=torch.uint8), 4, r"got \(8,\) torch.uint8"),
        (torch.zeros(2, 8, dtype=torch.uint8), 0, "bits must be 1 to 8, got 0"),
        (torch.zeros(2, 8, dtype=torch.uint8), 9, "bits must be 1 to 8, got 9"),
        *(
            (torch.full((1, 5), 2**b, dtype=torch.uint8), b, f"is {2**b}, .* fit in {b} bits")
            for b in range(1, 8)
        ),
    ],
)
def test_codes_that_cannot_be_packed(codes, bits, words):
    with pytest.raises(ValueError, match=words):
        pack(codes, bits)


@pytest.mark.parametrize("bits, count, held", [(3, 33, 3), (3, 32, 4), (8, 5, 1), (1, 33, 1)])
def test_words_that_belong_to_other_codes(bits, count, held):
    said = f"{count} codes of {bits} bits are {(count * bits + 31) // 32} int32 words a row"
    with pytest.raises(ValueError, match=said):
        unpack(torch.zeros(2, held, dtype=torch.int32), bits, count)
    with pytest.raises(ValueError, match="torch.int64"):
        unpack(torch.zeros(2, packed_words(count, bits), dtype=torch.int64), bits, count)


# --- which grid a linear has ----------------------------------------------------------------------

FOUR, EIGHT = Affine(4, 32, True), Affine(8, 64, True)
DYNAMIC = {"-:^model.skip.*$": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}}


def said_by_gptq(**more):
    base = {"bits": 4, "group_size": 32, "sym": True, "lm_head": False}
    return {**base, **more}


@pytest.mark.parametrize(
    "config, name, grid",
    [
        (said_by_gptq(), "model.layers.0.q_proj", FOUR),
        (said_by_gptq(group_size=-1), "model.layers.0.q_proj", Affine(4, None, True)),
        (said_by_gptq(sym=False), "model.layers.0.q_proj", Affine(4, 32)),
        (said_by_gptq(), "lm_head", None),
        (said_by_gptq(lm_head=True), "lm_head", FOUR),
        (said_by_gptq(dynamic=DYNAMIC), "model.skip.0", None),
        (said_by_gptq(dynamic=DYNAMIC), "model.layers.0.down_proj", EIGHT),
        (said_by_gptq(dynamic=DYNAMIC), "model.skip.down_proj", None),  # the first rule counts
        (said_by_gptq(dynamic=DYNAMIC), "model.layers.0.up_proj", FOUR),
        (said_by_gptq(dynamic={"+:a": {"group_size": -1}}), "abc", Affine(4, None, True)),
        (
            said_by_gptq(dynamic={"+:a": {"bits": 8}, "+:ab": {"bits": 2}}),
            "abc",
            Affine(8, 32, True),
        ),
        (said_by_gptq(dynamic={"+:ab": {"bits": 2}, "-:a": {}}), "abc", Affine(2, 32, True)),
        (said_by_gptq(dynamic={"+:b": {"group_size": -1}}), "abc", FOUR),  # from the start
    ],
)
def test_rules_of_gptq(config, name, grid):
    assert gptq.grid_of(config, name) == grid


@pytest.mark.parametrize(
    "skipped, group, name, grid",
    [
        (None, 128, "model.layers.0.q_proj", Affine(4, 128)),
        (None, -1, "model.layers.0.q_proj", Affine(4)),
        (["lm_head"], 128, "lm_head", None),
        (["mlp.gate"], 128, "model.layers.0.mlp.gate", None),  # anywhere in the name
        (["mlp.gate"], 128, "model.layers.0.mlp.up", Affine(4, 128)),
    ],
)
def test_rules_of_awq(skipped, group, name, grid):
    assert awq.grid_of({"group_size": group, "modules_to_not_convert": skipped}, name) == grid


@pytest.mark.parametrize(
    "name, grid",
    [("a", Affine(4, 64)), ("b", Affine(8, 32)), ("b.c", Affine(4, 64)), ("", Affine(4, 64))],
)
def test_rules_of_mlx(name, grid):
    assert (
        mlx.grid_of({"bits": 4, "group_size": 64, "b": {"bits": 8, "group_size": 32}}, name) == grid
    )


MIXED = {"m.a": FOUR, "m.b": FOUR, "m.b2": EIGHT, "m.c": Affine(4, None, True), "m.d": FOUR}


@pytest.mark.parametrize("name", [*MIXED, "m.skip", "lm_head"])
def test_what_gptq_is_told_is_read_back(name):
    config = gptq.describe(MIXED, ["m.skip", "lm_head"], gptq.V1, "a test")
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert gptq.grid_of(config, name) == MIXED.get(name)


@pytest.mark.parametrize("name", MIXED)
def test_what_mlx_is_told_is_read_back(name):
    config = mlx.describe(MIXED, dict.fromkeys(MIXED, (32, 128)))
    found = mlx.grid_of(config, name)
    assert found.bits == MIXED[name].bits and config["mode"] == "affine"
    assert found.group_size == min(MIXED[name].group_size or 128, 128)


def test_one_group_size_is_all_that_awq_can_say():
    assert awq.describe({"a": FOUR, "b": FOUR}, ["z", "c"])["modules_to_not_convert"] == ["c", "z"]
    assert awq.describe({"a": Affine(4)}, [])["group_size"] == -1
    with pytest.raises(
        LowbitError, match="one group size for the whole model, .* W4g32.* and W4g64"
    ):
        awq.describe({"a": Affine(4, 32), "b": Affine(4, 64)}, [])


@pytest.mark.parametrize(
    "grids, common, others",
    [
        ({"a": FOUR}, FOUR, {}),
        ({"a": EIGHT, "b": FOUR, "c": FOUR}, FOUR, {"a": EIGHT}),
        ({"c": EIGHT, "b": FOUR, "a": EIGHT}, EIGHT, {"b": FOUR}),
        ({"a": EIGHT, "b": FOUR}, FOUR, {"a": EIGHT}),  # alike often: by name
    ],
)
def test_the_grid_of_most(grids, common, others):
    assert most_common(grids) == (common, others)


@pytest.mark.parametrize("grid", [Codebook(2), KQuant("q4_k"), MXFP4()], ids=str)
def test_other_runtimes_read_uniform_weights(grid):
    assert as_uniform(grid) is None and as_uniform(FOUR) is FOUR
    assert uniform(FOUR, "a.b", "MLX") is FOUR
    with pytest.raises(
        LowbitError, match="'a.b' is on .*, and MLX is known to read uniform weights only"
    ):
        uniform(grid, "a.b", "MLX")


# --- what each layout takes -----------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "awq", "mlx"])
def test_bits_of_a_layout_by_its_definition(to, bits):
    taken = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "awq": (4,), "mlx": (2, 3, 4, 5, 6, 8)}
    grid = Affine(bits, 32, symmetric=to == "gptq" and bits > 1)
    q = weight(grid)
    if bits in taken[to]:
        tensors = FORMATS[to].pack(q, torch.float16, "m.a")
        assert torch.equal(FORMATS[to].unpack(tensors, grid, "m.a").codes, q.codes)
        assert set(tensors) == set(FORMATS[to].tensors)
        return
    with pytest.raises(LowbitError, match=f"'m.a' has {bits}-bit weights|layout takes 4 bits"):
        FORMATS[to].pack(q, torch.float16, "m.a")


@pytest.mark.parametrize(
    "to, rows, columns, group, words",
    [
        ("gptq_v2", 24, 128, 32, "'m.a' is 24 x 128: GPTQ packs 32 weights at a time"),
        ("gptq_v2", 32, 48, 16, "'m.a' is 32 x 48: GPTQ packs 32 weights at a time"),
        ("awq", 12, 128, 32, "'m.a' has 12 outputs; AWQ's layout packs 8 at a time"),
        ("mlx", 12, 128, 16, "'m.a' has groups of 16 inputs; MLX takes 32, 64 and 128"),
        ("mlx", 12, 96, None, None),
        ("mlx", 5, 256, None, None),
        ("mlx", 5, 80, None, "'m.a' has groups of 80 inputs"),
        ("awq", 8, 96, None, None),
    ],
)
def test_shapes_of_a_layout(to, rows, columns, group, words):
    q = weight(Affine(4, group), rows, columns)
    if words is None:
        tensors = FORMATS[to].pack(q, torch.float16, "m.a")
        assert torch.equal(FORMATS[to].unpack(tensors, q.grid, "m.a").codes, q.codes)
    else:
        with pytest.raises(LowbitError, match=words):
            FORMATS[to].pack(q, torch.float16, "m.a")


def cut(key):
    return lambda t: t.update({key: t[key][:-1]})


@pytest.mark.parametrize(
    "to, change, words",
    [
        *(
            (to, lambda t, key=key: t.pop(key), f"'m.a' has no tensor '{key}' in this model")
            for to in ("gptq_v2", "awq", "mlx")
            for key in FORMATS[to].tensors
        ),
        ("gptq_v2", lambda t: t["g_idx"].zero_(), "g_idx does not count groups up"),
        ("gptq_v2", cut("g_idx"), "'m.a' is not a weight of GPTQ on W4g32"),
        ("gptq_v2", cut("qweight"), "'m.a' is not a weight of GPTQ"),
        ("gptq_v2", cut("scales"), "do not belong together"),
        ("gptq_v2", cut("qzeros"), "do not belong together"),
        ("awq", cut("qweight"), "'m.a' is not a weight of AWQ on W4g32"),
        ("awq", cut("scales"), "do not belong together"),
        ("awq", cut("qzeros"), "do not belong together"),
        ("mlx", cut("weight"), "do not belong together"),
        ("mlx", cut("scales"), "do not belong together"),
        ("mlx", cut("biases"), "do not belong together"),
    ],
)
def test_damaged_tensors_of_other_formats_are_named(to, change, words):
    q = weight(Affine(4, 32))
    tensors = FORMATS[to].pack(q, torch.float16, "m.a")
    change(tensors)
    with pytest.raises(LowbitError, match=words):
        FORMATS[to].unpack(tensors, q.grid, "m.a")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("weight_scale"), "'m.a' has no tensor 'weight_scale' in this artifact"),
        (lambda t: t.pop("weight_packed"), "no tensor 'weight_packed'"),
        (lambda t: t.pop("weight_shape"), "no tensor 'weight_shape'"),
        (lambda t: t.pop("weight_zero_point"), "no tensor 'weight_zero_point'"),
        (cut("weight_packed"), "'m.a' is not a packed W4g32 weight: codes .31, 128."),
        (cut("weight_scale"), "do not belong to a 32 x 128 weight"),
        (lambda t: t["weight_shape"].fill_(64), "'m.a' is not a packed W4g32 weight"),
        (lambda t: t["weight_scale"].neg_(), "holds values that are not positive numbers"),
        (lambda t: t["weight_scale"].fill_(float("nan")), "not positive numbers"),
        (lambda t: t["weight_scale"].fill_(float("inf")), "not positive numbers"),
    ],
)
def test_damaged_tensors_of_an_artifact_are_named(change, words):
    q = weight(Affine(4, 32))
    tensors = affine.pack(q, torch.float16)
    change(tensors)
    with pytest.raises(LowbitError, match=words):
        affine.unpack(tensors, q.grid, "m.a")


@pytest.mark.parametrize("to", ["gptq_v2", "awq", "mlx"])
def test_a_file_is_read_linear_by_linear(to):
    made, q = FORMATS[to], {n: weight(Affine(4, 32), seed=i) for i, n in enumerate("ab")}
    file = {
        f"m.{n}.{k}": t for n, one in q.items() for k, t in made.pack(one, torch.float16, n).items()
    }
    file |= {"m.norm.weight": torch.ones(8), "m.b.bias": torch.zeros(32)}
    assert made.linears(file) == ["m.a", "m.b"]
    config = {
        "quantization_config": {**said_by_gptq(sym=False), "modules_to_not_convert": ["m.none"]},
        "quantization": {"bits": 4, "group_size": 32},
    }
    for n, one in q.items():
        assert set(made.local(file, f"m.{n}")) == set(made.tensors)
        read = made.read(file, f"m.{n}", config)
        assert torch.equal(read.codes, one.codes)
        torch.testing.assert_close(read.decode(), one.decode(), rtol=1e-2, atol=1e-2)
    if to != "mlx":
        config["quantization_config"] |= {
            "dynamic": {"-:.*a$": {}},
            "modules_to_not_convert": ["m.a"],
        }
        with pytest.raises(
            LowbitError, match="'m.a' is packed, but config.json gives it no scheme"
        ):
            made.read(file, "m.a", config)


# --- numbers beyond float16 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, size, fits",
    [
        ("f32", 1e9, True),
        ("bf16", 1e9, True),
        ("f16", 6e4, True),
        ("f16", 1e5, False),
        ("q8_0", 1e6, True),  # 127 times a scale
        ("q8_0", 1e8, False),
        ("q6_k", 1e6, True),  # 32 times a scale of up to 127 units
        ("q6_k", 1e9, False),
        ("q6_k", 1e30, False),
    ],
)
def test_an_embedding_that_a_type_cannot_hold_is_named(asked, size, fits):
    w = torch.linspace(-1, 1, 512).reshape(2, 256) * size
    if not fits:
        with pytest.raises(LowbitError, match="'m.embed' has .* beyond float16|'m.embed'.*float16"):
            rounded(w, asked, "m.embed")
        return
    kind, made = rounded(w, asked, "m.embed")
    assert made.extra < 1e-2
    torch.testing.assert_close(decoded(made.rows, kind).float(), w, rtol=0, atol=0.05 * size)


@pytest.mark.parametrize(
    "kind, bits, symmetric, most",
    [  # most: units that a scale may be
        ("Q2_K", 2, False, 15),
        ("Q4_K", 4, False, 63),
        ("Q3_K", 3, True, 31),
        ("Q6_K", 6, True, 127),
        ("Q4_0", 4, True, 1),
        ("Q8_0", 8, True, 1),
    ],
)
@pytest.mark.parametrize("fits", [True, False])
def test_scales_that_a_block_cannot_hold_are_refused_and_never_zero(
    kind, bits, symmetric, most, fits
):
    grid = Affine(bits, 32, symmetric)
    codes = (torch.arange(512) % 2**bits).to(torch.uint8)
    scale = torch.full((2, 8), 6e4 * most * (1 if fits else 2))
    params = AffineParams(scale, torch.full_like(scale, 2 ** (bits - 1) if symmetric else 1))
    q = QTensor(grid, codes.view(2, 256), params)
    if not fits:
        with pytest.raises(LowbitError, match="'m.a'.*float16"):
            held(q, BLOCKS[kind], "m.a")
        return
    exact = q.decode(torch.float64)
    torch.testing.assert_close(
        decoded(held(q, BLOCKS[kind], "m.a").rows, BLOCKS[kind]), exact, rtol=2e-3, atol=0
    )
