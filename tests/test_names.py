"""Names of grids and schemes: what each says, that it reads back, and what is none."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.grid import MXFP4, Affine, Codebook, KQuant
from lowbit.grid.names import (
    Scheme,
    as_codebook,
    of_kind,
    parse_grid,
    parse_scheme,
    scheme_name,
    shared_codebook,
    weights_only,
    without_kind,
)

SCHEMES = [  # as written, grid, bits of activations, of keys and values, as written back
    ("W4", Affine(4), None, None, "W4A16"),
    ("W4A16", Affine(4), None, None, "W4A16"),
    ("w4a16", Affine(4), None, None, "W4A16"),
    (" W2A16g64 ", Affine(2, 64), None, None, "W2A16g64"),
    ("W3A16g64sym", Affine(3, 64, True), None, None, "W3A16g64sym"),
    ("W3g64SYM", Affine(3, 64, True), None, None, "W3A16g64sym"),
    ("W3g64asym", Affine(3, 64), None, None, "W3A16g64"),
    ("W4asym", Affine(4), None, None, "W4A16"),
    ("W4A4", Affine(4), 4, None, "W4A4"),
    ("W8A8sym", Affine(8, None, True), 8, None, "W8A8sym"),
    ("W4A8KV4", Affine(4), 8, 4, "W4A8KV4"),
    ("W4KV4", Affine(4), None, 4, "W4A16KV4"),
    ("W4A16KV8", Affine(4), None, 8, "W4A16KV8"),
    ("W4A4KV16", Affine(4), 4, None, "W4A4"),
    ("W4A16KV16", Affine(4), None, None, "W4A16"),
    ("W4A8KV4g128sym", Affine(4, 128, True), 8, 4, "W4A8KV4g128sym"),
    ("W1", Affine(1), None, None, "W1A16"),
    ("W2A16:column", Codebook(2), None, None, "W2A16:column"),
    ("W2:COLUMN", Codebook(2), None, None, "W2A16:column"),
    ("W3A8:row", Codebook(3, "row"), 8, None, "W3A8:row"),
    ("W3A8KV4:tensor", Codebook(3, "tensor"), 8, 4, "W3A8KV4:tensor"),
    ("W2g4:column", Codebook(2, "column", 4), None, None, "W2A16g4:column"),
    ("W2A4g4:column", Codebook(2, "column", 4), 4, None, "W2A4g4:column"),
    ("gguf:q2_k", KQuant("q2_k"), None, None, "gguf:q2_k"),
    ("GGUF:Q4_K", KQuant("q4_k"), None, None, "gguf:q4_k"),
    ("gguf:q3_k+A8", KQuant("q3_k"), 8, None, "gguf:q3_k+A8"),
    ("gguf:q6_k+A8KV4", KQuant("q6_k"), 8, 4, "gguf:q6_k+A8KV4"),
    ("gguf:q6_k+KV4", KQuant("q6_k"), None, 4, "gguf:q6_k+KV4"),
    ("gguf:q6_k+A16", KQuant("q6_k"), None, None, "gguf:q6_k"),
    ("mxfp4", MXFP4(), None, None, "mxfp4"),
    ("MXFP4+a8", MXFP4(), 8, None, "mxfp4+A8"),
    ("mxfp4+a4kv8", MXFP4(), 4, 8, "mxfp4+A4KV8"),
]


@pytest.mark.parametrize("text, grid, activations, kv, written", SCHEMES)
def test_a_scheme_says_its_grid_and_bits(text, grid, activations, kv, written):
    scheme = parse_scheme(text)
    assert scheme == Scheme(grid, activations, kv)
    assert str(scheme) == written and parse_scheme(written) == scheme
    assert parse_grid(grid.name) == grid


REFUSED = [
    ("", "unknown scheme ''"),
    ("W", "unknown scheme 'W'"),
    ("4", "unknown scheme '4'"),
    ("A4", "unknown scheme 'A4'"),
    ("W4G", "unknown scheme 'W4G'"),
    ("W4g", "unknown scheme 'W4g'"),
    ("W4A", "unknown scheme 'W4A'"),
    ("W4 A8", "unknown scheme 'W4 A8'"),
    ("W4g-1", "unknown scheme"),
    ("W-4", "unknown scheme"),
    ("W4.5", "unknown scheme"),
    ("W4symg64", "unknown scheme"),  # the group comes first
    ("W4KV4A8", "unknown scheme"),  # activations come first
    ("W4g64A16", "unknown scheme"),
    ("W4A8+KV4", "unknown scheme"),
    ("mxfp", "unknown scheme 'mxfp'"),
    ("mxfp8", "unknown scheme 'mxfp8'"),
    ("q4_k", "write W<bits>A<bits>"),
    ("W0", "scheme 'W0': bits must be 1 to 8, got 0"),
    ("W9A16", "scheme 'W9A16': bits must be 1 to 8, got 9"),
    ("W16", "bits must be 1 to 8, got 16"),
    ("W4g0", "group_size must be positive, got 0"),
    ("W1sym", "a symmetric grid needs at least 2 bits"),
    ("W4A0", "activation bits must be 2 to 8 .or 16 for none., got 0"),
    ("W4A1", "got 1"),
    ("W4A9", "got 9"),
    ("W4A32", "got 32"),
    ("W4KV1", "got 1"),
    ("W4A8KV12", "got 12"),
    ("W9:column", "scheme 'W9:column': bits must be 1 to 8"),
    ("W2:layer", "a codebook is per column, row or tensor, not per 'layer'"),
    ("W2g4:row", "only per column"),
    ("W2g4:tensor", "only per column"),
    ("W2g0:column", "at least 1"),
    ("W2sym:column", "unknown scheme"),
    ("gguf:", "a K-quant is one of q2_k, q3_k, q4_k, q6_k, not ''"),
    ("gguf:q5_k", "a K-quant is one of q2_k, q3_k, q4_k, q6_k, not 'q5_k'"),
    ("gguf:q4_0", "not 'q4_0'"),
    ("gguf:q4_k+A1", "activation bits must be 2 to 8"),
    ("mxfp4+KV9", "got 9"),
    ("mxfp4+", "unknown scheme 'mxfp4.'"),
    ("gguf:q4_k+", "unknown scheme|not 'q4_k.'"),
    ("mxfp4A8", "unknown scheme"),
]


@pytest.mark.parametrize("text, words", REFUSED)
def test_what_is_no_scheme_is_refused_in_words(text, words):
    with pytest.raises(LowbitError, match=words) as found:
        parse_scheme(text)
    assert f"'{text}'" in str(found.value) and str(found.value).endswith(".")


AFFINE = st.builds(
    Affine, st.integers(2, 8), st.none() | st.integers(1, 4096), symmetric=st.booleans()
)
BOOKS = st.one_of(
    st.builds(Codebook, st.integers(1, 8), st.sampled_from(["column", "row", "tensor"])),
    st.builds(Codebook, st.integers(1, 8), st.just("column"), st.integers(1, 64)),
)
GRIDS = st.one_of(
    AFFINE,
    st.just(Affine(1, 32)),
    BOOKS,
    st.builds(KQuant, st.sampled_from(["q2_k", "q3_k", "q4_k", "q6_k"])),
    st.just(MXFP4()),
)
BITS = st.none() | st.integers(2, 8)


@settings(max_examples=100, deadline=None)
@given(GRIDS, BITS, BITS)
def test_every_scheme_reads_back_in_any_case(grid, activations, kv):
    scheme = Scheme(grid, activations, kv)
    for text in (str(scheme), str(scheme).lower(), str(scheme).upper()):
        assert parse_scheme(text) == scheme
    for text in (grid.name, grid.name.lower()):
        assert parse_grid(text) == grid


def test_no_two_schemes_share_a_name():
    grids = [
        *(Affine(b, g, s) for b in (2, 4) for g in (None, 2, 24) for s in (False, True)),
        *(Codebook(b, per) for b in (2, 4) for per in ("column", "row", "tensor")),
        *(Codebook(2, "column", g) for g in (2, 24)),
        *map(KQuant, ("q2_k", "q4_k")),
        MXFP4(),
    ]
    every = [Scheme(*s) for s in itertools.product(grids, (None, 4, 8), (None, 4, 8))]
    assert len({str(s) for s in every}) == len(every)


# --- overrides and codebooks ----------------------------------------------------------------------


@pytest.mark.parametrize("text, grid, activations, kv, written", SCHEMES)
def test_an_override_is_about_weights(text, grid, activations, kv, written):
    if activations is None and kv is None:
        assert weights_only(text) == grid
        return
    plain = str(Scheme(grid))
    with pytest.raises(LowbitError, match="overrides are about weights") as found:
        weights_only(text)
    assert f"write {plain} or leave A out" in str(found.value)
    assert weights_only(plain) == grid


@pytest.mark.parametrize(
    "grid, plain, name",
    [
        (Affine(3, 64, True), Affine(3, 64, True), "W3A16g64sym"),
        (Codebook(2), Affine(2), "W2A16"),
        (Codebook(2, "row"), Affine(2), "W2A16"),
        (Codebook(3, "column", 8), Affine(3, 8), "W3A16g8"),
        (KQuant("q2_k"), KQuant("q2_k"), "gguf:q2_k"),
        (MXFP4(), MXFP4(), "mxfp4"),
    ],
)
def test_a_codebook_is_named_by_its_bits_where_its_kind_is_said(grid, plain, name):
    assert without_kind(grid) == plain and scheme_name(grid) == name
    if isinstance(grid, Codebook):
        assert as_codebook(plain, grid.per) == grid == of_kind(plain, grid)


@pytest.mark.parametrize(
    "grids, per",
    [
        ([Codebook(2)], "column"),
        ([Codebook(2), Codebook(4, "column", 4)], "column"),
        ([Codebook(2, "row"), Codebook(4, "row")], "row"),
        ([Codebook(2, "tensor")], "tensor"),
        ([Codebook(2), Codebook(2, "row")], None),
        ([Codebook(2), Affine(2)], None),
        ([Affine(2)], None),
        ([KQuant("q2_k"), MXFP4()], None),
    ],
)
def test_a_kind_is_shared_or_none(grids, per):
    assert shared_codebook(grids) == per
    assert shared_codebook(grids[::-1]) == per


@pytest.mark.parametrize(
    "wanted, kind, made",
    [
        (Affine(3), Affine(4, 64), Affine(3)),
        (Affine(3, 8), Codebook(2), Codebook(3, "column", 8)),
        (Affine(3), Codebook(2, "row"), Codebook(3, "row")),
        (Codebook(3), Codebook(2, "row"), Codebook(3)),  # the scheme says it itself
        (Codebook(3), Affine(4), Codebook(3)),
        (KQuant("q2_k"), Affine(4), KQuant("q2_k")),
        (MXFP4(), KQuant("q2_k"), MXFP4()),
        (Affine(3, None, True), Codebook(2), "scheme 'W3A16sym': a codebook has no symmetric form"),
        (Affine(3, 64), Codebook(2, "row"), "scheme 'W3A16g64': group_size is the number of col"),
        (Affine(3, 64), Codebook(2, "tensor"), "only per column"),
        (KQuant("q2_k"), Codebook(2), "scheme 'gguf:q2_k' is a grid of its own"),
        (MXFP4(), Codebook(2), "scheme 'mxfp4' is a grid of its own, and this recipe is for code"),
    ],
)
def test_a_schemes_grid_in_a_recipe_of_a_kind(wanted, kind, made):
    if isinstance(made, str):
        with pytest.raises(LowbitError, match=made):
            of_kind(wanted, kind)
    else:
        assert of_kind(wanted, kind) == made
