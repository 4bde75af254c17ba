"""Work by the weight is dealt out evenly, and cut where rows do not depend on each other."""

import pytest
import torch
import transformers
from helpers import begin, save_tiny
from hypothesis import given
from hypothesis import strategies as st

from lowbit.grid.names import parse_scheme
from lowbit.methods import GPTQ
from lowbit.methods._hessian import factored, input_hessians
from lowbit.methods._parts import Span, divided_rows, joined, whole
from lowbit.model.dealing import cut, divided, owners, parts_of
from lowbit.model.model import Streams
from lowbit.model.ranks import ALONE
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_no_rank_has_more_than_its_share_and_the_largest_piece(costs, size):
    owner = owners(costs, size)
    load = [sum(c for c, r in zip(costs, owner, strict=True) if r == rank) for rank in range(size)]
    assert len(owner) == len(costs) and set(owner) <= set(range(size))
    assert max(load) <= (sum(costs) / size + max(costs, default=0)) * (1 + 1e-9)


@given(st.integers(0, 3000), st.integers(1, 70))
def test_rows_are_cut_without_gap_or_overlap(rows, parts):
    found = cut(rows, parts)
    assert [i for s in found for i in range(rows)[s]] == list(range(rows))
    assert len(found) <= parts and all(s.start < s.stop for s in found)
    if rows >= 64 * parts:
        assert len(found) == parts and all(s.start % 64 == 0 for s in found)
        longest, shortest = (f(s.stop - s.start for s in found) for f in (max, min))
        assert longest - shortest <= 128
    else:
        assert len(found) == min(rows, parts)


@pytest.mark.parametrize(
    ("costs", "size", "parts"),
    [
        ([1.0, 8.0], 1, [1, 1]),
        ([1.0] * 256, 8, [1] * 256),  # experts: whole ones
        ([1.0, 1.0, 6.0], 4, [2, 2, 4]),
        ([5.0], 64, [64]),
        ([], 4, []),
        ([0.0, 0.0], 4, [1, 1]),
    ],
)
def test_what_is_large_is_cut(costs, size, parts):
    assert parts_of(costs, size) == parts


def test_alone_all_is_done_here():
    assert divided(ALONE, [1.0, 2.0], lambda i: i) == [0, 1]


def test_rows_over_several_linears():
    part = (Span("a", slice(0, 3)), Span("b", slice(0, 5)))
    assert divided_rows(part, 1) == [part]
    assert divided_rows(part, 4) == [
        (Span("a", slice(0, 2), False),),
        (Span("a", slice(2, 3), False), Span("b", slice(0, 1), False)),
        (Span("b", slice(1, 3), False),),
        (Span("b", slice(3, 5), False),),
    ]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return ModelStream(save_tiny(tmp_path_factory.mktemp("m"), config, torch.float32))


def block_of(stream, grid):
    ids = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
    x = stream.embed(ids)
    return begin(stream, 0, Recipe(grid), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)


SITE = ["self_attn.q_proj", "self_attn.k_proj"]


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("scheme", ["W2A16g16", "W4A16sym", "mxfp4", "W3A16:row", "gguf:q2_k"])
def test_rows_coded_apart_have_the_codes_of_all_together(stream, scheme, parts, ranged):
    block = block_of(stream, parse_scheme(scheme).weights)
    if ranged:
        block = block.with_params({n: block.range_of(n) for n in SITE})
    method = GPTQ(clip="mse")
    hessian = input_hessians(block, SITE[:1], 8)[SITE[0]]
    inputs = factored(block, method.walk, SITE[0], hessian, [])
    for known in (inputs, None):
        (all_,) = method._divided(block, SITE, 1)
        assert all_ == whole(block, SITE)
        cells = method._divided(block, SITE, parts)
        assert len(cells) == parts
        one = zip(all_, method._part(block, all_, known).codes, strict=True)
        some = [
            pair
            for part in cells
            for pair in zip(part, method._part(block, part, known).codes, strict=True)
        ]
        expected, found = joined(one), joined(some)
        assert list(found) == SITE
        for name, q in expected.items():
            assert q.same_as(found[name]) is None
