"""CrossQuant folded with static column sizes: the fold against float64, its steps against the
published ones, and what it does not leak.
"""

import json
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, apply_methods, begin, save_tiny, staged
from transformers import AutoModelForCausalLM

from lowbit.artifact.proof import compare_logits
from lowbit.errors import LowbitError
from lowbit.grid import Affine, PerToken
from lowbit.grid.names import parse_scheme
from lowbit.methods import CrossQuant
from lowbit.methods.crossquant import Reorder
from lowbit.model.model import Streams
from lowbit.model.order import reorder
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe
from lowbit.recipe.presets import load_recipe
from lowbit.run.quantize import quantize

IDS = torch.randint(3, 280, (8, 24), generator=torch.Generator().manual_seed(0))


def opened(stream, recipe):
    x = stream.embed(IDS)
    return begin(stream, 0, recipe, Streams(x, x, 8), stream.block_kwargs(x.shape[1])[0], 0)


def inputs_of(block, exact=True):
    seen = {}

    def keep(name, call):
        seen.setdefault(name, []).append(call.args[0])

    (block.exact() if exact else block).observe(
        list(block.graph.linears), "float", len(block.x), keep
    )
    return {n: torch.cat(xs) for n, xs in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fold_changes_no_output_in_any_family(tmp_path, family):
    block = opened(
        ModelStream(save_tiny(tmp_path, family, torch.float32), compute=torch.float64),
        Recipe(Affine(8)),
    )
    folded = CrossQuant(0.15)(block)
    done = set(folded.notes["crossquant_exponents"])
    assert done or family == "opt-post-norm"
    assert any(not torch.equal(folded.weights[k], w) for k, w in block.weights.items()) == bool(
        done
    )
    y = folded.run(block.x)
    assert (
        float((y - block.target).abs().max())
        < (1e-9 if family != "gemma" else 1e-6) * float(block.target.abs().max()) + 1e-6
    )


def test_activations_become_those_divided_by_the_column_and_rows_have_finer_steps_than_published(
    tmp_path,
):
    block = opened(ModelStream(save_tiny(tmp_path, "llama", torch.float32)), Recipe(Affine(8)))
    before, a = inputs_of(block), 0.15
    after = inputs_of(CrossQuant(a, skip_first=False)(block))
    for name in block.graph.linears:
        x, t = before[name].double().flatten(0, 1), before[name].double().abs().flatten(0, 1)
        c = t.amax(0)
        if name.endswith("o_proj"):  # 4 query heads of 16 channels on 2 heads of values
            c = c.reshape(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).flatten()
        norm = c.pow(1 - a).log().mean().exp()
        torch.testing.assert_close(
            after[name].double().flatten(0, 1), x / c.pow(1 - a) * norm, rtol=1e-4, atol=1e-6
        )
        published = t.amax(1).pow(a)
        own = after[name].double().flatten(0, 1).abs().amax(1) / norm
        assert (own <= published * (1 + 1e-4)).all() and (own < 0.9 * published).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_folded_and_per_token_is_a_grid_with_fixed_columns_on_the_unfolded_input(tmp_path, bits):
    block = opened(
        ModelStream(save_tiny(tmp_path, "llama", torch.float32), compute=torch.float64),
        Recipe(Affine(8)),
    )
    folded, a = CrossQuant(0.15, skip_first=False)(block), 0.15
    before, after = inputs_of(block), inputs_of(folded)
    for name in block.graph.linears:
        x = before[name].double().flatten(0, 1)
        c = x.abs().amax(0)
        if name.endswith("o_proj"):  # 4 query heads of 16 channels on 2 heads of values
            c = c.reshape(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16).flatten()
        column = c.pow(1 - a)
        row = (x / column).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        static = column * row * (x / column / row).round()
        run = PerToken(bits, symmetric=True)(after[name].flatten(0, 1)).double()
        torch.testing.assert_close(
            run * column / column.log().mean().exp(),
            static,
            rtol=0,
            atol=1e-6 * float(static.abs().max()),
        )
        # Their rows carry the factors of what they feed.
        if not name.endswith(("v_proj", "up_proj")):
            expected = static @ block.weight(name).double().T
            torch.testing.assert_close(
                run @ folded.weight(name).double().T,
                expected,
                rtol=0,
                atol=1e-6 * float(expected.abs().max()),
            )
        assert float((static - x).abs().max()) > 1e-3 * float(x.abs().max())


def test_first_tokens_and_rare_values_set_no_columns(tmp_path):
    block = opened(ModelStream(save_tiny(tmp_path, "llama", torch.float32)), Recipe(Affine(8)))
    x = block.x.clone()
    x[:, 0] *= 1000
    x[3, 5, 7] = 500.0
    block, name = block.within(x=x), block.graph.sites[0].reads[0]
    seen = inputs_of(block)[name].double().abs()
    largest = seen[:, 1:].flatten(0, 1).sort(0, descending=True).values
    assert torch.equal(CrossQuant().sizes(block, [name], 8)[name], largest[0])
    assert torch.equal(
        CrossQuant(columns="percentile", percentile=98).sizes(block, [name], 8)[name],
        largest[int(8 * 23 * 0.02)],
    )
    assert torch.equal(
        CrossQuant(skip_first=False).sizes(block, [name], 8)[name], seen.flatten(0, 1).amax(0)
    )
    assert torch.equal(
        CrossQuant(rows=2).sizes(block, [name], 2)[name], seen[:2, 1:].flatten(0, 1).amax(0)
    )


def test_dead_channels_keep_their_weights_and_infinite_activations_are_named(tmp_path):
    block = opened(ModelStream(save_tiny(tmp_path, "llama", torch.float32)), Recipe(Affine(8)))
    weights = {k: w.clone() for k, w in block.weights.items()}
    weights["input_layernorm.weight"][5] = 0
    weights["mlp.up_proj.weight"][9] = 0
    dead = replace(block, weights=weights)
    folded = CrossQuant(0.15)(dead)
    assert torch.equal(
        folded.weight("self_attn.q_proj")[:, 5], dead.weight("self_attn.q_proj")[:, 5]
    )
    assert torch.equal(folded.weight("mlp.down_proj")[:, 9], dead.weight("mlp.down_proj")[:, 9])
    assert all(bool(torch.isfinite(w).all()) for w in folded.weights.values())
    weights["mlp.up_proj.weight"][9, 0] = float("inf")
    with pytest.raises(
        LowbitError, match=r"'model.layers.0.mlp.down_proj' gets activations that are not finite"
    ):
        CrossQuant(0.15)(replace(block, weights=weights))


def test_the_search_is_never_behind_any_exponent_it_tries_on_one_site(tmp_path):
    stream = ModelStream(save_tiny(tmp_path, "llama", torch.float32))
    block = opened(stream, Recipe(Affine(4), activations=PerToken(4, symmetric=True)))
    name, down = "mlp.down_proj", block.graph.sites[-1]
    alone = block.within(graph=replace(block.graph, sites=(down,)))

    def error(method):
        done = apply_methods(
            alone, Recipe(Affine(4), (method,), activations=PerToken(4, symmetric=True))
        )
        x, y = inputs_of(block)[name], inputs_of(block)[name] @ block.weight(name).T
        s = (
            x.flatten(0, 1).abs().amax(0)
            / inputs_of(done)[name].flatten(0, 1).abs().amax(0).clamp(min=1e-12)
        ).clamp(min=1e-12)
        return float(
            (PerToken(4, symmetric=True)(x / s) @ done.decoded()[f"{name}.weight"].T - y)
            .pow(2)
            .sum()
        )

    chosen = error(CrossQuant(search=True))
    tried = [error(CrossQuant(a)) for a in (0.0, 0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 1.0)]
    assert chosen <= min(tried) * (1 + 1e-3) and chosen < 0.999 * max(tried)


# --- by groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt-post-norm"])
def test_another_order_of_channels_changes_no_logit_in_any_family(tmp_path, family):
    stream = ModelStream(save_tiny(tmp_path, family, torch.float32), compute=torch.float64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))

    def logits(stream, reordered):
        x = stream.embed(IDS, torch.float64)
        for i in range(len(stream)):
            block = begin(
                stream,
                i,
                Recipe(Affine(8)),
                Streams(x, x, 8),
                stream.block_kwargs(x.shape[1])[i],
                0,
            )
            if reordered:
                last = block.graph.sites[-1]
                width = block.weight(last.reads[0]).shape[1]
                moved = reorder(
                    block, last, torch.randperm(width, generator=torch.Generator().manual_seed(i))
                )
                assert not torch.equal(moved.weight(last.reads[0]), block.weight(last.reads[0]))
                output = block.graph.sites[1]
                if output.source is not None and block.graph.heads.norm is None:
                    inside = torch.cat(
                        [
                            torch.randperm(16, generator=torch.Generator().manual_seed(h)) + 16 * h
                            for h in range(4)
                        ]
                    )
                    moved = reorder(moved, output, inside)
                block = moved
            x = block.run(x)
        return stream.head(x)

    torch.testing.assert_close(
        logits(stream.ordered(order), True), logits(stream, False), rtol=0, atol=1e-5
    )


def test_a_group_shares_a_factor_and_no_code_changes(tmp_path):
    stream = ModelStream(save_tiny(tmp_path, "llama", torch.float32))
    recipe = Recipe(Affine(4, 16, symmetric=True), (CrossQuant(0.15, fold="group", isolate=1e9),))
    still = Recipe(recipe.grid, (CrossQuant(1.0, fold="group"),))  # sorts alike, folds nothing
    moved = staged(stream, recipe, IDS).source
    assert not torch.equal(moved.embed(IDS), stream.embed(IDS))
    folded, plain = (
        apply_methods(opened(moved, recipe), recipe),
        apply_methods(opened(moved, still), still),
    )
    scales = 0
    for name, q in folded.coded.items():
        assert (
            torch.equal(q.codes, plain.coded[name].codes)
            or (q.codes != plain.coded[name].codes).double().mean() < 2e-3
        ), name  # ties
        ratio = q.params.scale / plain.coded[name].params.scale
        # Their rows are divided for the site after them.
        if not name.endswith(("v_proj", "up_proj")):
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
            scales += int((ratio[0] - 1).abs().max() > 0.01)
    assert scales >= 5
    assert (
        float(
            (folded.exact().run(moved.embed(IDS), dict(folded.weights)) - folded.target).abs().max()
        )
        < 1e-4
    )


def test_sizes_fall_along_the_sorted_channels_and_outliers_are_isolated(tmp_path):
    stream = ModelStream(save_tiny(tmp_path, "llama", torch.float32))
    recipe = Recipe(Affine(4, 16), (CrossQuant(0.0, fold="group", isolate=4.0),))
    moved = staged(stream, recipe, IDS).source
    block, method = opened(moved, recipe), recipe.methods[0]
    down = block.graph.sites[-1]
    sizes = method.sizes(block, [down.reads[0]], 8)[down.reads[0]]
    done, ordered_sizes = method._sorted(block, down, sizes)
    assert torch.equal(ordered_sizes, sizes.sort(descending=True).values)
    torch.testing.assert_close(
        method.sizes(done, [down.reads[0]], 8)[down.reads[0]], ordered_sizes, rtol=1e-5, atol=0
    )
    total = Reorder(method)._sizes(opened(moved, recipe))
    assert total[:16].mean() > total[16:32].mean() > total[48:].mean()
    size = torch.tensor([100.0, 9.0, *[3.0] * 14, *[1.0] * 16], dtype=torch.float64)
    flat = replace(block, weights={**block.weights, "mlp.down_proj.weight": torch.zeros(64, 32)})
    assert method._by_group(flat, down, size).tolist() == [100.0, *[9.0] * 15, *[1.0] * 16]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma", "bitnet", "phi3"])
def test_artifacts_by_groups_load_in_plain_transformers(tmp_path, family):
    model = save_tiny(tmp_path / "m", family)
    done = quantize(
        str(model),
        "W4A8g16sym",
        "crossquant-deploy",
        out=tmp_path / "a",
        calib=str(model / "text.txt"),
        samples=8,
        length=32,
        settings=["crossquant.fold=group"],
    )
    # transformers would give all tokens of a matrix one scale, and OPT's MLP gets matrices
    assert done.report["format"] == ("lowbit" if family == "opt" else "compressed-tensors")
    assert done.verification.loader == "passed" and done.verification.logits_rms < 1e-3


def test_what_groups_need(tmp_path):
    model, groups = save_tiny(tmp_path / "m"), ["crossquant.fold=group"]
    with pytest.raises(LowbitError, match="needs one group size"):  # before any work
        load_recipe("crossquant-deploy", scheme=parse_scheme("W8A8sym"), settings=groups)
    for scheme, recipe, words in (
        ("W8A8sym", "crossquant-deploy", "needs one group size"),
        ("W4A8g16", "quarot+crossquant-deploy", "that quarot has mixed"),
    ):
        with pytest.raises(LowbitError, match=words):
            quantize(
                str(model),
                scheme,
                recipe,
                out=tmp_path / scheme,
                calib=str(model / "text.txt"),
                samples=4,
                length=32,
                settings=groups,
            )
    with pytest.raises(LowbitError, match="cannot be put in another order"):
        ModelStream(save_tiny(tmp_path / "o", "opt-post-norm")).ordered(torch.arange(64))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deploy")
    done = quantize(
        str(save_tiny(folder / "m")),
        "W8A8sym",
        "crossquant-deploy",
        out=folder / "a",
        calib=str(folder / "m" / "text.txt"),
        samples=8,
        length=32,
    )
    return done, folder / "a"


def test_plain_loaders_run_it_and_no_token_sees_later_ones_the_batch_or_padding(artifact):
    done, out = artifact
    assert done.report["format"] == "compressed-tensors" and done.verification.loader == "passed"
    config = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    assert (
        config["input_activations"]["dynamic"]
        and config["input_activations"]["strategy"] == "token"
    )
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        ids = IDS[:2]
        both, later = model(ids).logits, ids.clone()
        later[:, -1] = 7
        torch.testing.assert_close(model(later).logits[:, :-1], both[:, :-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(ids[:1]).logits, both[:1], rtol=0, atol=1e-5)
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], 1)
        mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # Sums of another shape flip a code here and there.
        for logits, expected in (
            (model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:], both),
            (model(ids[:, :9]).logits, both[:, :9]),  # the calibration's length is in nothing
        ):
            assert compare_logits(expected, logits)[0] < 1e-2


@pytest.mark.parametrize(
    "name, methods",
    [
        ("crossquant-deploy+awq", ["CrossQuant", "AWQ"]),
        ("quarot+crossquant-deploy+gptq", ["QuaRot", "CrossQuant", "GPTQ"]),
        ("smoothquant+crossquant-deploy+rtn", ["SmoothQuant", "CrossQuant", "RTN"]),
        ("crossquant-deploy+awq+tesseraq", ["CrossQuant", "AWQ", "TesseraQ"]),
    ],
)
def test_it_joins_others(name, methods):
    recipe = load_recipe(name, settings=[])
    assert [type(m).__name__ for m in recipe.methods] == methods
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_bad_options():
    for bad in (
        dict(row_exponent=1.5),
        dict(percentile=0.0),
        dict(rows=-1),
        dict(search_rows=0),
        dict(isolate=1.0),
    ):
        with pytest.raises(LowbitError, match="crossquant needs"):
            CrossQuant(**bad)
    with pytest.raises(LowbitError, match="columns must be one of max, percentile"):
        load_recipe("crossquant-deploy", settings=["crossquant.columns=mean"])


def test_rows_of_one_token_are_refused(tmp_path):
    stream = ModelStream(save_tiny(tmp_path, "llama", torch.float32))
    x = stream.embed(IDS[:, :1])
    block = begin(stream, 0, Recipe(Affine(8)), Streams(x, x, 8), stream.block_kwargs(1)[0], 0)
    with pytest.raises(LowbitError, match="crossquant.skip_first=false"):
        CrossQuant()(block)
