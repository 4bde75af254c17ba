"""Layouts of other runtimes: against decoding word by word as their documents say, back and forth,
and their refusals.
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_axes import GRIDS_TRIED

from lowbit.errors import LowbitError
from lowbit.formats import LAYOUTS, affine, awq, gptq, mlx, native, packing
from lowbit.formats import compressed_tensors as ct
from lowbit.formats.by_name import FORMATS
from lowbit.formats.layout import Layout
from lowbit.grid import GRIDS, MXFP4, Affine, AffineParams, Codebook, KQuant, Outliers, QTensor
from lowbit.grid.names import parse_grid
from lowbit.plan.checks import check_divides
from lowbit.recipe import Recipe
from lowbit.runtime.linears import DecodedLinear, module_for


def weight(bits, group, symmetric, rows=32, columns=128, seed=0):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = Affine(bits, group, symmetric)
    params = grid.stored(grid.fit(w), torch.float16)
    return QTensor(grid, grid.encode(w, params), params)


def field(words, bits, index):
    """Code ``index`` of a little-endian bit stream of 32-bit words, bit by bit."""
    return sum(
        (int(words[(index * bits + b) // 32]) >> ((index * bits + b) % 32) & 1) << b
        for b in range(bits)
    )


def unsigned(t):
    return t.numpy().view(np.uint32)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    group=st.sampled_from([None, 32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gptq_word_by_word_and_back(bits, group, symmetric, seed):
    q = weight(bits, group, symmetric, seed=seed)
    version = gptq.V1 if symmetric else gptq.V2
    t = gptq.pack(q, version)
    qweight, qzeros = unsigned(t["qweight"]), unsigned(t["qzeros"])
    for row, column in ((0, 0), (31, 127), (5, 77), (17, 31)):
        g = int(t["g_idx"][column])
        z = (field(qzeros[g], bits, row) + (version == gptq.V1)) & ((1 << bits) - 1)
        assert (field(qweight[:, row], bits, column) - z) * float(
            t["scales"][g, row]
        ) == pytest.approx(float(q.decode()[row, column]), abs=1e-7)
    assert gptq.unpack(t, q.grid, version).same_as(q) is None
    config = gptq.describe(
        {"a.b": q.grid, "a.c": Affine(8, None, True)}, ["lm_head", "x"], version, "m"
    )
    assert [gptq.grid_of(config, n) for n in ("a.b", "a.c", "x", "lm_head")] == [
        q.grid,
        Affine(8, None, True),
        None,
        None,
    ]


@settings(max_examples=15, deadline=None)
@given(group=st.sampled_from([None, 32, 128]), symmetric=st.booleans(), seed=st.integers(0, 999))
def test_awq_nibble_by_nibble_and_back(group, symmetric, seed):
    q = weight(4, group, symmetric, seed=seed)
    t = awq.pack(q)
    qweight, qzeros = unsigned(t["qweight"]), unsigned(t["qzeros"])
    for row, column in ((0, 0), (31, 127), (5, 77), (18, 30)):
        g, k = column // (group or 128), [0, 2, 4, 6, 1, 3, 5, 7].index(row % 8)
        code, zero = (int(w[row // 8]) >> (4 * k) & 15 for w in (qweight[column], qzeros[g]))
        assert (code - zero) * float(t["scales"][g, row]) == pytest.approx(
            float(q.decode()[row, column]), abs=1e-7
        )
    held = awq.unpack(t, q.grid)
    assert held.same_as(q) is None


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(mlx.BITS),
    group=st.sampled_from([None, 32, 64]),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_mlx_word_by_word_and_back(bits, group, symmetric, seed):
    q = weight(bits, group, symmetric, columns=256, seed=seed)
    t = mlx.pack(q, torch.float32)
    assert t["weight"].dtype == torch.uint32
    words, size = unsigned(t["weight"].view(torch.int32)), mlx.group_of(q.grid, 256, "w")
    assert t["scales"].shape == t["biases"].shape == (32, 256 // size)
    for row, column in ((0, 0), (31, 255), (5, 77), (18, 130)):
        g = column // size
        value = field(words[row], bits, column) * float(t["scales"][row, g]) + float(
            t["biases"][row, g]
        )
        assert value == pytest.approx(float(q.decode()[row, column]), abs=1e-5)
    held = mlx.unpack(t, mlx.grid_of(mlx.describe({"w": q.grid}, {"w": (32, 256)}), "w"))
    assert torch.equal(held.codes, q.codes)
    held = mlx.unpack(t, q.grid)
    torch.testing.assert_close(
        held.params.zero_point.float(), q.params.zero_point.float(), rtol=0, atol=1e-5
    )


def test_what_the_layouts_cannot_say():
    with pytest.raises(LowbitError, match="Export to gptq_v2"):
        gptq.pack(weight(2, 64, False), gptq.V1)
    with pytest.raises(LowbitError, match="5-bit weights; GPTQ takes 2, 3, 4, 8 bits"):
        gptq.pack(weight(5, 64, True), gptq.V1)
    with pytest.raises(LowbitError, match="packs 32 weights at a time"):
        gptq.pack(weight(4, None, True, rows=24), gptq.V1)
    with pytest.raises(LowbitError, match="AWQ's layout takes 4 bits"):
        awq.pack(weight(2, 64, False))
    with pytest.raises(LowbitError, match="MLX takes 32, 64 and 128"):
        mlx.pack(weight(4, 16, False), torch.float32)
    for factor, at in ((1e-8, ...), (1e7, (0, 0))):  # all of them vanish, one is infinite
        q = weight(4, 64, True)
        q.params.scale[at] *= factor
        with pytest.raises(LowbitError, match="which float16 does not hold"):
            gptq.pack(q, gptq.V1, "layer")


@pytest.mark.parametrize("vanished", [1e-9, 1.18e-38])
def test_a_group_that_was_tuned_to_nothing_stays_nothing(vanished):
    """By the smallest float16 above zero, where that is nothing beside the largest scale."""
    q = weight(4, 64, False)
    q.params.scale[3, 0] = vanished
    largest = float(q.params.scale.max())
    for target, packed in ((gptq.V2, gptq.pack(q, gptq.V2, "w")), (awq.NAME, awq.pack(q, "w"))):
        scales = packed["scales"]
        assert float(scales[0, 3]) == 2.0**-24 < 1e-4 * largest, target
        assert bool((scales > 0).all())


@pytest.mark.parametrize("group", [32, 128])
def test_awq_as_compressed_tensors_own_converter_reads_it(group):
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    q = weight(4, group, False)
    converter = AutoAWQConverter(group_size=group)
    found = converter.process({f"layer.{k}": t for k, t in awq.pack(q, "layer").items()})
    expected = affine.pack(q, torch.float16)
    for key in ("weight_packed", "weight_scale", "weight_zero_point"):
        assert torch.equal(found[f"layer.{key}"], expected[key]), key


# --- the table of layouts -------------------------------------------------------------------------

EVERY = [
    *map(parse_grid, GRIDS_TRIED),
    *(Affine(4, 64), Affine(3, None, True), Affine(2, 32, True)),
    *(KQuant(kind) for kind in ("q3_k", "q4_k")),
]


def on(grid, kept=False, rows=32, columns=256):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    params = grid.stored(grid.fit(w), torch.bfloat16)
    index = torch.tensor([3, 300, 8000])
    outliers = Outliers(index, torch.tensor([1.0, -2.0, 0.5])) if kept else None
    return QTensor(grid, grid.encode(w, params), params, outliers)


def test_every_kind_of_grid_has_a_layout():
    assert set(LAYOUTS) == set(GRIDS) == {type(g) for g in EVERY}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("grid", EVERY, ids=str)
def test_a_layout_says_what_it_packs(grid, kept):
    q = on(grid, kept)
    tensors = packing.pack(q, torch.bfloat16)
    assert packing.unpack(tensors, grid, "w").same_as(q) is None
    assert packing.packed_linears({f"a.w.{k}" for k in tensors}) == ["a.w"]
    counts = packing.counts(q)
    assert counts.get("outliers") == (3 if kept else None)
    columns = {int(b): n for b, n in counts.get("columns", {}).items()}
    held = packing.buffers(grid, (32, 256), torch.bfloat16, columns, 3 if kept else None)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == held
    own = sum(t.nbytes for k, t in tensors.items() if "outlier" not in k)
    assert own == packing.tensor_bytes(grid, 32, 256, 2)


@pytest.mark.parametrize("grid", EVERY, ids=str)
def test_a_layout_is_read_from_what_configs_say(grid):
    counts = {n: {"columns": {"2": 256}} for n in ("m.0.a", "m.0.b")}
    own = native.describe(dict.fromkeys(counts, grid), ["head"], torch.bfloat16, {}, None, counts)
    own = json.loads(json.dumps(own))
    assert native.grid_of(own, "m.0.a") == grid and native.grid_of(own, "head") is None
    assert (ct.scheme_of(grid) is None) == ("m.0.a" in own["linears"])
    if ct.scheme_of(grid) is None:
        assert ct.beyond([grid]) == LAYOUTS[type(grid)].kind
        with pytest.raises(LowbitError, match="compressed-tensors has no layout for a"):
            ct.describe({"m.0.a": grid}, [])
    else:
        assert ct.beyond([grid]) is None
        described = json.loads(json.dumps(ct.describe({"m.0.a": grid}, ["head"])))
        assert FORMATS[ct.NAME].grid_of(described, "m.0.a") == grid


@pytest.mark.parametrize(
    "grid, width, words",
    [
        (Affine(4, 64), 96, "group size 64 does not divide the 96 inputs of 'b'.*: 32, 16, 8, or"),
        (Affine(4, 64), 97, "of this model: none of the usual ones, or a scheme without g"),
        (Codebook(2, "column", 64), 96, "group size 64 does not divide the 96 inputs of 'b'"),
        (KQuant("q2_k"), 128, "gguf:q2_k comes in blocks of 256 inputs.*the 128 inputs of 'b'"),
        (MXFP4(), 80, "mxfp4 comes in blocks of 32 inputs.*the 80 inputs of 'b'.*scheme without g"),
        (Affine(4), 97, None),
        (MXFP4(), 96, None),
    ],
)
def test_widths_that_do_not_fit_are_named(grid, width, words):
    shapes = {"a": (8, 256), "b": (8, width)}
    if words is None:
        check_divides(shapes, Recipe(grid))
    else:
        with pytest.raises(LowbitError, match=words):
            check_divides(shapes, Recipe(grid))


def test_a_grid_that_no_format_holds_is_refused_before_any_work(monkeypatch):
    monkeypatch.delitem(LAYOUTS, MXFP4)
    with pytest.raises(LowbitError, match="'a' would be on mxfp4, which no format holds"):
        check_divides({"a": (8, 64)}, Recipe(MXFP4()))


@dataclass(frozen=True)
class Signs(Affine):
    """A kind of grid that this library does not know."""

    bits: int = 1

    @property
    def name(self):
        return "signs"


def test_a_new_kind_of_grid_is_a_row_of_the_table(monkeypatch):
    q = on(Signs())
    with pytest.raises(LowbitError, match="no format stores a signs"):
        packing.pack(q, torch.bfloat16)
    row = Layout(
        kind="signs",
        pack=lambda q, dtype: {"weight_signs": q.codes, "weight_step": q.params.scale},
        unpack=lambda t, grid, name: QTensor(
            grid, t["weight_signs"], AffineParams(t["weight_step"], q.params.zero_point)
        ),
        tensor_bytes=lambda grid, rows, width, scale_bytes: rows * (width + 4),
        buffers=lambda grid, rows, width, stored, columns: {
            "weight_signs": ((rows, width), torch.uint8),
            "weight_step": ((rows, 1), torch.float32),
        },
        mark="weight_signs",
        entry=lambda grid, columns: {"signs": True},
        read_entry=lambda entry: Signs() if "signs" in entry else None,
    )
    monkeypatch.setitem(LAYOUTS, Signs, row)
    test_a_layout_says_what_it_packs(q.grid, True)
    test_a_layout_is_read_from_what_configs_say(q.grid)
    loaded = module_for(q.grid)(
        "w", torch.nn.Linear(256, 32), q.grid, {}, None, None, torch.float32
    )
    assert isinstance(loaded, DecodedLinear)
    loaded.load_state_dict({**packing.pack(q, torch.bfloat16), "bias": torch.zeros(32)})
    assert torch.equal(loaded.weight, q.decode())
