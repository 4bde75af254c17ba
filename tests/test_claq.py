"""CLAQ against its definition: the loop with plain K-means, who gets bits, who keeps weights; and
whole artifacts.
"""

import json
from dataclasses import replace

import pytest
import torch
from helpers import apply_methods, begin, planned, save_tiny, staged
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lowbit  # noqa: F401  registers the format
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid import Affine, Codebook, PerToken
from lowbit.grid.kmeans import kmeans
from lowbit.methods import AWQ, CLAQ, GPTQ, RTN, OmniQuant, QuaRot, TesseraQ
from lowbit.methods._bit_budget import bit_gains, greedy_widths, least_gain
from lowbit.methods._columns import inverse_factor
from lowbit.methods._hessian import Inputs
from lowbit.methods._parts import whole
from lowbit.methods.claq import column_scores
from lowbit.model.model import Streams
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe
from lowbit.runtime.linears import CodebookLinear

Q = "self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("m"), dtype=torch.float32)


@pytest.fixture(scope="module")
def block(model):
    stream = ModelStream(model)
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    return begin(stream, 0, Recipe(Codebook(2)), Streams(x, x, 8), stream.block_kwargs(32)[0], 0)


def inputs_of(hessian, act_order):
    diagonal = hessian.diagonal()
    order = (
        diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    )
    return Inputs(
        inverse_factor(hessian[order][:, order]), order, torch.zeros(len(hessian), dtype=torch.bool)
    )


def brute(weight, factor, order, bits):
    """GPTQ's recursion in float64 with K-means for every column, no blocks: decoded weight."""
    w, out = weight[:, order].double(), torch.empty_like(weight, dtype=torch.float64)
    for c in range(w.shape[1]):
        levels = kmeans(w[:, c].float()[None], 1 << bits, exact=True)[0][0].half().double()
        q = levels[(w[:, c, None].float().double() - levels).abs().argmin(1)]
        out[:, order[c]] = q
        w[:, c + 1 :] -= ((w[:, c] - q) / factor[c, c])[:, None] * factor[c, c + 1 :]
    return out


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("method", [CLAQ(block_size=5), GPTQ(block_size=64)])
def test_the_loop_is_gptq_with_k_means(block, act_order, method):
    x = torch.randn(
        400, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ) @ torch.randn(64, 64, dtype=torch.float64)
    inputs = inputs_of(2 / 400 * x.T @ x + torch.eye(64, dtype=torch.float64), act_order)
    q = (
        method._linear(block, Q, inputs, {})
        if isinstance(method, CLAQ)
        else method._part(block, whole(block, [Q]), inputs).codes[0]
    )
    expected = brute(block.weight(Q), inputs.factor, inputs.order, 2)
    # A tie here or there.
    assert float((q.decode().double() - expected).abs().gt(1e-3).double().mean()) < 0.01


def test_uncorrelated_inputs_give_k_means_of_every_column(block):
    w = block.weight(Q)
    for act_order in (True, False):
        q = CLAQ()._linear(
            block,
            Q,
            inputs_of(torch.diag(torch.rand(64, dtype=torch.float64) + 0.5), act_order),
            {},
        )
        levels = kmeans(w.T.contiguous(), 4)[0].half().float()
        assert torch.equal(q.params.levels, levels)


def test_order_of_columns():
    w = torch.full((50, 4), 0.1)
    w[:2, 2] = 40.0
    w[:3, 0] = 40.0
    diagonal = torch.tensor([1.0, 0.5, 1.0, 2.0])
    assert column_scores(w, diagonal, 4.0).tolist() == [0, 2, 1, 3]
    saliency = w.double().square().mean(0) / diagonal.double().square()
    assert column_scores(w, diagonal, None).tolist() == saliency.argsort(descending=True).tolist()
    assert column_scores(w, diagonal, 1e9).tolist() == column_scores(w, diagonal, None).tolist()


@pytest.mark.parametrize(
    ("bits", "extra", "share"), [(2, 0.1, 0.05), (2, 0.5, 0.25), (3, 0.2, 0.2), (2, 2.0, 1.0)]
)
def test_adaptive_precision_widens_the_published_share(block, bits, extra, share):
    given = block.within(grids=dict.fromkeys(block.graph.linears, Codebook(bits)))
    done = CLAQ(adaptive_bits=extra)(given)
    for q in done.coded.values():
        widths, columns = q.params.widths, q.codes.shape[1]
        assert int((widths == 4).sum()) == round(columns * share)
        assert int((widths == bits).sum()) == columns - round(columns * share)


def test_greedy_spends_the_budget_where_the_loss_falls_most():
    torch.manual_seed(0)
    w = torch.randn(60, 12) * torch.logspace(-1, 1, 12)
    diagonal = torch.ones(12)
    widths = greedy_widths(w, diagonal, 30, 2, 4)
    assert int(widths.sum()) == 30 and int(widths.min()) >= 2 and int(widths.max()) <= 4
    assert bool((widths.diff() >= 0).all())  # columns of one shape, by rising size

    def loss(of):
        return sum(float(kmeans(w[:, j][None], 1 << int(b))[1]) for j, b in enumerate(of))

    for i in range(12):
        for j in range(12):
            if i != j and widths[i] > 2 and widths[j] < 4:
                other = widths.clone()
                other[i] -= 1
                other[j] += 1
                assert loss(other) >= loss(widths) - 1e-6


def test_a_budget_for_the_whole_model_is_met_where_it_is_surveyed(model):
    stream = ModelStream(model)
    ids = torch.randint(3, 280, (8, 32), generator=torch.Generator().manual_seed(0))
    x = stream.embed(ids)
    streams, kwargs = Streams(x, x, 8), stream.block_kwargs(32)
    asked = CLAQ(adaptive_bits=0.4, allocation="greedy", scope="model")
    recipe = Recipe(Codebook(2), (asked,))
    (found,) = staged(stream, recipe, ids).methods
    assert found.least_gain > 0 and replace(found, least_gain=0.0) == asked
    recipe = replace(recipe, methods=(found,))
    assert not planned(stream, recipe).stages
    bits = weights = 0
    averages = set()
    for i in range(len(stream)):
        done = apply_methods(begin(stream, i, recipe, streams, kwargs[i], 0), recipe)
        streams = replace(streams, x=done.target, xq=done.run(streams.xq, done.decoded()))
        for q in done.coded.values():
            bits += int(q.params.widths.sum()) * len(q.codes)
            weights += q.codes.numel()
            averages.add(round(float(q.params.widths.double().mean()), 3))
    assert bits / weights == pytest.approx(2.4, abs=0.08)
    assert len(averages) > 3


@pytest.mark.parametrize("wider", [(0, 0), (1, 0), (0, 1)])  # bits of the grids beyond the least
def test_a_price_spends_the_budget(wider):
    g = torch.Generator().manual_seed(1)
    surveyed_ = [
        (
            torch.rand(50, 2, generator=g, dtype=torch.float64).sort(dim=1, descending=True).values,
            rows,
            own,
        )
        for rows, own in zip((10, 40), wider, strict=True)
    ]
    price = least_gain(surveyed_, 0.7)
    spent = sum(int((gains >= price).sum()) * rows for gains, rows, _ in surveyed_)
    budget = sum((own + 0.7) * 50 * rows for _, rows, own in surveyed_)
    assert budget - 40 <= spent <= budget + 40
    with pytest.raises(LowbitError, match="no 2.5 bits a weight to give"):
        least_gain(surveyed_, 2.5)


def test_gains_are_per_bit_stored():
    w, diagonal = (
        torch.randn(40, 6, generator=torch.Generator().manual_seed(2)),
        torch.rand(6) + 0.5,
    )
    once, thrice = bit_gains(w, diagonal, 2, 4), bit_gains(torch.cat([w, w, w]), diagonal, 2, 4)
    # Three times the loss, three times the bits.
    torch.testing.assert_close(once, thrice, rtol=1e-4, atol=1e-9)
    for j, column in enumerate(w.T):
        by_hand = [
            float(kmeans(column[None], 1 << b)[1]) / float(diagonal[j]) ** 2 / 40 for b in (2, 3, 4)
        ]
        assert once[j].tolist() == pytest.approx(
            [by_hand[0] - by_hand[1], by_hand[1] - by_hand[2]], rel=1e-5
        )


def test_a_uniform_range_need_not_reach_what_is_kept(block):
    weight = block.weight(Q).clone()
    weight[5, 7] = 50.0
    given = replace(block, weights={**block.weights, f"{Q}.weight": weight})
    given = given.within(grids=dict.fromkeys(block.graph.linears, Affine(3, 16)))
    q = CLAQ(outlier_bits=0.07)(given).coded[Q]
    assert float(q.params.scale[5].max()) < 2 * float(weight[4].abs().max()) / 3
    # Errors of other columns are made up for here, too.
    assert float(q.decode()[5, 7]) == pytest.approx(50.0, abs=5)


@pytest.mark.parametrize("reserve", ["label", "two_sided", "official"])
@pytest.mark.parametrize("grid", [Codebook(2), Affine(2)])
def test_reserved_counts(block, reserve, grid):
    given = block.within(grids=dict.fromkeys(block.graph.linears, grid))
    done = CLAQ(outlier_bits=0.7, reserve=reserve, act_order=False)(given)
    for name, q in done.coded.items():
        rows, columns = q.codes.shape
        counts = torch.bincount(q.outliers.index % columns, minlength=columns)
        high, low = round(rows * 0.05 * 2.8), round(rows * 0.05 * 0.8)
        expected = (
            (max(1, high), max(1, low)) if reserve == "label" else (2 * high + 1, 2 * low + 1)
        )
        assert set(counts.tolist()) <= set(expected), name
        if reserve != "official":
            assert int((counts == expected[0]).sum()) == round(columns * 0.1)


def test_official_looks_rates_up_by_the_place_in_a_block():
    rows, columns = 200, 300
    score = torch.arange(columns)  # the first tenth ranks first
    counts = CLAQ(outlier_bits=0.7, reserve="official")._selector("b", "x", rows, score, {}).counts
    assert counts[:30] == [28] * 30 and counts[30:128] == [8] * 98
    assert counts[128:256] == counts[:128] and counts[256:] == counts[:44]


def test_what_is_kept_costs_nothing_and_more_bits_cost_less(block):
    losses = [
        CLAQ(**options)
        for options in (
            dict(),
            dict(outlier_bits=0.07),
            dict(outlier_bits=0.7),
            dict(adaptive_bits=0.5),
            dict(adaptive_bits=2.0),
        )
    ]
    plain, few, many, half, all_four = (
        apply_methods(block, Recipe(Codebook(2), (m,))).notes["loss_after"] for m in losses
    )
    assert many < few < plain
    assert all_four < half < plain


@pytest.mark.parametrize("levels", ["sequential", "refined", "precomputed"])
@pytest.mark.parametrize("cluster", [True, False])
def test_every_way_to_choose_levels_ends_on_them(block, levels, cluster):
    done = apply_methods(
        block,
        Recipe(
            Codebook(2),
            (CLAQ(levels=levels, cluster_reserved=cluster, outlier_bits=0.07, adaptive_bits=0.1),),
        ),
    )
    assert (
        done.notes["loss_after"]
        < 0.7 * apply_methods(block, Recipe(Codebook(2), (RTN(),))).notes["loss_after"]
    )
    for q in done.coded.values():
        assert bool(((1 << q.params.widths[:, None]) > q.codes.T).all())
        assert torch.equal(q.params.levels, q.params.levels.half().float())


@pytest.mark.parametrize(
    "grid", [Codebook(2, "row"), Codebook(2, "tensor"), Codebook(2, "column", 4)]
)
def test_gptq_codes_on_shared_books(block, grid):
    given = block.within(grids=dict.fromkeys(block.graph.linears, grid))
    done, nearest = GPTQ()(given), RTN()(given)
    job_loss = [
        apply_methods(given, Recipe(grid, (m,))).notes["loss_after"] for m in (GPTQ(), RTN())
    ]
    assert set(done.coded) == set(nearest.coded)
    assert job_loss[0] < job_loss[1]


@pytest.mark.parametrize(
    "methods",
    [
        (AWQ(), CLAQ()),
        (QuaRot(), CLAQ()),
        (AWQ(), RTN()),
        (QuaRot(), CLAQ(outlier_bits=0.07), TesseraQ(schedule="exponential-4-3", iters=2)),
    ],
)
def test_transforms_before_codebooks(block, methods):
    done = apply_methods(block, Recipe(Codebook(2), methods))
    assert set(done.coded) == set(block.graph.linears)
    assert done.notes["loss_after"] < done.notes["loss_before"] * 1.001


def test_awq_leaves_alone_what_a_book_per_column_cannot_feel(block):
    assert AWQ()(block).notes["awq_exponents"].keys() == set()
    quantized = block.with_input_quantizers(
        dict.fromkeys(block.graph.linears, block.input_quantizers.get(Q) or _reading())
    )
    assert AWQ(rows=4, exponents=3)(quantized).notes["awq_exponents"].keys() != set()


def _reading():
    from lowbit.grid import InputQuantizer

    return InputQuantizer(grid=PerToken(8))


@pytest.mark.parametrize(
    ("options", "grid", "words"),
    [
        (dict(adaptive_bits=2.5), Codebook(2), "cannot average 4.5 bits"),
        (dict(adaptive_bits=0.1), Affine(2), "needs a codebook per column"),
        (dict(), Affine(2), "keeps outliers or does nothing of its own"),
        (dict(), Codebook(2, "row"), "needs a codebook per column"),
        (dict(adaptive_bits=1.0, upper=3), Codebook(3), "cannot average 4 bits"),
    ],
)
def test_budgets_that_cannot_be_met(options, grid, words):
    with pytest.raises(LowbitError, match=words):
        Recipe(grid, (CLAQ(**options),))


def test_bad_options_are_refused():
    for bad in (
        dict(allocation="x"),
        dict(reserve="x"),
        dict(levels="x"),
        dict(outlier_bits=5.0),
        dict(adaptive_bits=-0.1),
        dict(upper=9),
        dict(threshold=0.0),
        dict(damping=-1.0),
        dict(scope="model"),
        dict(scope="x"),
    ):
        with pytest.raises(LowbitError, match="claq"):
            CLAQ(**bad)
    with pytest.raises(LowbitError, match="codebook per column has none"):
        Recipe(Codebook(2), (OmniQuant(),))


def test_a_column_too_short_for_its_outliers_is_named():
    with pytest.raises(
        LowbitError,
        match=r"claq.outlier_bits = 3.5 keeps 5 weights of some columns of 'b.x', which have only 3",
    ):
        CLAQ(outlier_bits=3.5, reserve="two_sided")._selector("b", "x", 3, torch.arange(64), {})


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(adaptive_bits=0.5, allocation="greedy"),
        dict(outlier_bits=0.3, cluster_reserved=False),
    ],
)
def test_constant_and_coarse_columns(block, options):
    """Columns of one value, of none but zeros, and of fewer values than levels; act-order off
    leaves the first ones uncompensated.
    """
    weight = block.weight(Q).clone()
    weight[:, 0], weight[:, 1] = 0.25, 0.0
    weight[:, 2] = torch.where(torch.arange(len(weight)) % 3 == 0, 0.5, -0.125)
    given = replace(block, weights={**block.weights, f"{Q}.weight": weight})
    inputs = inputs_of(torch.diag(torch.rand(64, dtype=torch.float64) + 0.5), False)
    q = CLAQ(**options)._linear(given, Q, inputs, {})
    assert torch.equal(q.decode()[:, :3], weight[:, :3])


@pytest.mark.parametrize("method", [CLAQ(), GPTQ(), RTN()])
def test_weights_beyond_what_is_stored_are_named(block, method):
    huge = block.weight(Q).clone()
    huge[3] *= 1e7
    given = replace(block, weights={**block.weights, f"{Q}.weight": huge})
    with pytest.raises(LowbitError, match=r"self_attn.q_proj'.*(float16|finite)"):
        method(given)
    with pytest.raises(LowbitError, match=r"self_attn.q_proj'.*(float16|finite)"):
        CLAQ(outlier_bits=0.7, cluster_reserved=False)(given)


def test_compensation_that_runs_away_is_named(block, monkeypatch):
    real = inverse_factor
    monkeypatch.setattr(
        "lowbit.methods._hessian.inverse_factor",
        lambda hessian: real(hessian) * torch.linspace(1, 1e38, len(hessian)).double(),
    )
    with pytest.raises(
        LowbitError,
        match=r"layers.0.self_attn.q_proj' and what reads the same inputs: .*raise claq.damping",
    ):
        CLAQ()(block)


def test_awq_says_what_it_leaves_out(block):
    assert AWQ()(block).notes["trouble"] == [
        "awq: on codebooks nothing: each column has levels of its own"
    ]
    shared = block.within(grids=dict.fromkeys(block.graph.linears, Codebook(2, "row")))
    assert AWQ(rows=4, exponents=3)(shared).notes["trouble"] == ["awq: on codebooks no clip"]
    mixed = block.within(grids={n: Affine(2, 16) for n in block.graph.linears})
    mixed = mixed.within(grids={**mixed.grids, "self_attn.o_proj": Codebook(2)})
    done = AWQ(rows=4, exponents=3)(mixed)
    assert set(done.params) >= {"mlp.down_proj", "mlp.up_proj"}
    assert "self_attn.o_proj" not in done.params
    assert done.notes["trouble"] == ["awq: on codebooks no clip for self_attn.o_proj"]


def test_short_columns_are_remarked(block):
    done = CLAQ(outlier_bits=0.07)(block)
    assert any("keep at least one each" in t and "k_proj" in t for t in done.notes["trouble"])


@pytest.mark.parametrize("allocation", ["outliers", "greedy"])
def test_a_budget_below_one_column_is_remarked(block, allocation):
    done = CLAQ(adaptive_bits=0.001, allocation=allocation)(block)
    assert any(
        "less than one of 64 columns needs" in t and "k_proj" in t for t in done.notes["trouble"]
    )
    assert not CLAQ(adaptive_bits=0.1, allocation=allocation)(block).notes.get("trouble")


@pytest.mark.parametrize("name", ["claq", "claq-ap", "claq-or", "claq-fused"])
@pytest.mark.parametrize("scheme", ["W2A16", "W3A16"])
def test_recipes_read_back(name, scheme):
    from lowbit.grid.names import parse_scheme

    recipe = load_recipe(name, scheme=parse_scheme(scheme))
    assert recipe.grid == Codebook(int(scheme[1]))
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_a_scheme_that_no_codebook_has_is_refused():
    from lowbit.grid.names import parse_scheme

    with pytest.raises(LowbitError, match="no symmetric form"):
        load_recipe("claq", scheme=parse_scheme("W2A16sym"))
    with pytest.raises(
        LowbitError, match="needs a codebook per column, not W2 codebook per 4 columns"
    ):
        load_recipe("claq", scheme=parse_scheme("W2A16g4"))


# --- artifacts ------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def quantized(model, out, *extra):
    return run(
        "quantize",
        model,
        "--calib",
        model / "text.txt",
        "--samples",
        8,
        "--length",
        32,
        "-o",
        out,
        *extra,
    )


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("a") / "out"
    done = quantized(model, out, "--scheme", "W2A16", "--recipe", "claq-fused")
    assert done.exit_code == 0, done.output
    return out


def test_an_artifact_verifies_and_stays_packed_in_memory(artifact):
    from transformers import AutoModelForCausalLM

    report = json.loads((artifact / "report.json").read_text())
    assert report["format"] == "lowbit" and report["verification"]["loader"] == "passed"
    assert report["verification"]["logits_rms"] < 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(artifact)
    layers = [m for m in loaded.modules() if isinstance(m, CodebookLinear)]
    assert len(layers) == 14
    loaded(torch.arange(5)[None])
    stored = {e["name"]: e["bytes"] for e in report["linears"] if "skipped" not in e}
    for layer in layers:
        held = sum(b.nbytes for b in layer.buffers()) + sum(
            t.nbytes for t in vars(layer).values() if isinstance(t, torch.Tensor)
        )
        assert held <= stored[layer.name] + 2 * sum(
            b.nbytes for n, b in layer.named_buffers() if "levels" in n
        )


def test_generation_runs_and_a_gradient_reaches_the_embedding(artifact):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(artifact)
    ids = torch.arange(3, 9)[None]
    cached, plain = (
        loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0)
        for c in (True, False)
    )
    assert torch.equal(cached, plain)
    loaded(ids, labels=ids).loss.backward()
    assert float(loaded.get_input_embeddings().weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("family", "scheme", "recipe"),
    [
        ("llama", "W2A16", "claq-fused+tesseraq"),
        ("llama", "W3A8", "quarot+claq-or"),
        ("llama", "W2A16g2", "gptq-row.toml"),
        ("llama", "W4A16", "affine-or.toml"),
        ("phi3", "W2A16", "claq-fused"),
        ("opt", "W2A16", "claq-fused"),
        ("bitnet", "W2A16", "claq-fused"),
    ],
)
def test_families_and_combinations(tmp_path, family, scheme, recipe):
    model = save_tiny(tmp_path / "m", family, torch.bfloat16)
    if recipe == "gptq-row.toml":
        (tmp_path / recipe).write_text('codebook = "column"\nmethods = ["gptq"]\n')
    if recipe == "affine-or.toml":
        (tmp_path / recipe).write_text('methods = ["awq", "claq"]\n[claq]\noutlier_bits = 0.28\n')
    recipe = tmp_path / recipe if recipe.endswith(".toml") else recipe
    fast = (
        ["--set", "tesseraq.schedule=exponential-4-3", "--set", "tesseraq.iters=2"]
        if "tesseraq" in str(recipe)
        else []
    )
    done = quantized(model, tmp_path / "out", "--scheme", scheme, "--recipe", recipe, *fast)
    assert done.exit_code == 0, done.output
    assert (
        json.loads((tmp_path / "out" / "report.json").read_text())["verification"]["loader"]
        == "passed"
    )


def test_interrupted_it_ends_with_the_same_bytes(artifact, model, tmp_path, monkeypatch):
    from lowbit.run.shards import Shards

    real, calls = Shards.keep, []

    def stop(self, i, block, seconds):
        calls.append(real(self, i, block, seconds))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(Shards, "keep", stop)
    quantized(model, tmp_path / "out", "--scheme", "W2A16", "--recipe", "claq-fused")
    done = quantized(model, tmp_path / "out", "--scheme", "W2A16", "--recipe", "claq-fused")
    assert done.exit_code == 0, done.output
    hashes = [
        json.loads((d / "report.json").read_text())["hash"] for d in (artifact, tmp_path / "out")
    ]
    assert hashes[0] == hashes[1]


def test_a_damaged_index_is_named_and_never_followed(artifact, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    copy = shutil.copytree(artifact, tmp_path / "copy")
    shard = next(
        p for p in sorted(copy.glob("*.safetensors")) if any("outlier" in k for k in load_file(p))
    )
    tensors = load_file(shard)
    key = next(k for k in tensors if k.endswith("weight_outlier_columns"))
    tensors[key][0] = 60000
    save_file(tensors, shard, metadata={"format": "pt"})
    failed = run("verify", copy)
    assert failed.exit_code == 1 and key in failed.output
    loaded = AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(LowbitError, match=key.removesuffix(".weight_outlier_columns")):
        loaded(torch.arange(5)[None])


def test_a_ternary_model_loses_nothing(tmp_path):
    """Three levels in every column, scales that float16 holds: codes, disk and loader give the very
    weights back.
    """
    model = save_tiny(tmp_path / "m", dtype=torch.float32)
    path = model / "model.safetensors"
    tensors = load_file(path)
    for k, t in tensors.items():
        if "proj" in k:
            tensors[k] = t.sign() * (t.abs() > t.abs().median()) * 0.0625
    save_file(tensors, path, metadata={"format": "pt"})
    done = quantized(model, tmp_path / "out", "--scheme", "W2A16", "--recipe", "claq")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quality"]["quantized"]["kl"] < 1e-9
    assert all(b["loss_after"] < 1e-9 for b in report["blocks"])
