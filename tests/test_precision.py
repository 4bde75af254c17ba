"""What stays in float32 where a block computes in 16 bits: what transformers keeps so."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch
import transformers as T
from helpers import apply_methods, model_of, opened, save_tiny
from safetensors.torch import load_file, save_file

from lowbit.grid.names import parse_scheme
from lowbit.methods._reconstruct import Reconstruction
from lowbit.model.experts import Experts
from lowbit.model.stream import ModelStream
from lowbit.recipe.presets import load_recipe

HALF, BRAIN = torch.float16, torch.bfloat16
# How a class says it, and the dtype it is loaded in.
KEPT = {
    "deepseek_v3": ("a buffer, named", BRAIN),
    "ernie4_5_moe": ("the router's weight, named", BRAIN),
    "flint": ("the sinks of attention, named", HALF),
    "hunyuan_v1_moe": ("a linear made in float32", BRAIN),
    "lfm2_moe": ("a buffer made in float32", HALF),
    "gpt_oss": ("norms, in float16 alone", HALF),
    "deepseek_v4": ("norms and mixing of streams", BRAIN),
    "hy_v4": ("the head", BRAIN),
}
NOT_KEPT = {"gpt_oss": BRAIN, "qwen3_moe": BRAIN, "llama": HALF}
ROUTED = {"deepseek_v3": "e_score_correction_bias", "lfm2_moe": "expert_bias"}


QUICK = {
    "omniquant": ["omniquant.epochs=1"],
    "tesseraq": ["tesseraq.schedule=exponential-2-2", "tesseraq.iters=2"],
}


def recipe_of(name):
    return load_recipe(name, scheme=parse_scheme("W4A16g8"), settings=QUICK.get(name, ()))


def ids_of(rows=8, length=16):
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(1))


def saved(folder, family, dtype, **more):
    return save_tiny(folder / "m", families.config_of(family, vocab_size=300, **more), dtype)


def loaded(folder, dtype):
    return T.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def kept_by_transformers(model):
    return {n for n, t in model.state_dict().items() if t.dtype == torch.float32}


def kept_here(source):
    return source.inventory.precision.wide(source.compute)


@pytest.mark.parametrize("family", KEPT, ids=lambda f: f"{f}: {KEPT[f][0]}")
def test_what_stays_in_float32_is_what_transformers_keeps(tmp_path, family):
    dtype = KEPT[family][1]
    folder = saved(tmp_path, family, dtype)
    wanted = kept_by_transformers(loaded(folder, dtype))
    assert wanted and kept_here(ModelStream(folder, compute=dtype)) == wanted


@pytest.mark.parametrize("family", NOT_KEPT)
def test_nothing_else_does(tmp_path, family):
    dtype = NOT_KEPT[family]
    folder = saved(tmp_path, family, dtype)
    assert not kept_by_transformers(loaded(folder, dtype))
    assert not kept_here(ModelStream(folder, compute=dtype))
    assert not kept_here(ModelStream(folder, compute=torch.float32))


@pytest.mark.parametrize("family", ["deepseek_v4", "flint", "gpt_oss", "hy_v4"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_logits_are_those_of_transformers(tmp_path, family, dtype):
    """But for an order of sums: to half of what a rounding of the logits themselves is."""
    if (family, dtype) == ("deepseek_v4", HALF):
        pytest.skip("transformers itself cannot run it")
    folder, ids = saved(tmp_path, family, dtype, num_hidden_layers=4), ids_of(1)
    with torch.no_grad():
        wanted = loaded(folder, dtype)(ids).logits.float()
    source, recipe = ModelStream(folder, compute=dtype), recipe_of("rtn")
    last = opened_last(source, recipe, ids)
    error = (source.head(last) - wanted).norm() / wanted.norm()
    assert float(error) < torch.finfo(dtype).eps / 2


def opened_last(source, recipe, ids):
    """What leaves the last block."""
    model = model_of(source, recipe, ids)
    streams, kwargs = model.entered(ids), source.block_kwargs(ids.shape[1])
    for i in range(len(source)):
        block = model.begin(i, streams, kwargs[i])
        left = block.context.left
        beside = streams.beside.after(block.context.place, left, left)
        streams = replace(streams, x=block.target, xq=block.target, beside=beside)
    return streams.x


@pytest.mark.parametrize("family", ROUTED)
def test_tokens_go_to_the_experts_that_transformers_chooses(tmp_path, family):
    """By biases that are far larger than their differences."""
    more = dict(num_experts=32, n_routed_experts=32, num_local_experts=32)
    folder = saved(tmp_path, family, BRAIN, **more)
    tensors = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        if name.endswith(ROUTED[family]):
            tensors[name] = 8 + 0.05 * torch.randn(len(t), generator=torch.manual_seed(0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    seen = {"transformers": [], "here": []}

    def told(where):
        return lambda _, args: seen[where].append(args[1].flatten(0, -2).sort(-1).values)

    source = ModelStream(folder, compute=BRAIN)
    at = next(i for i in range(len(source)) if source.graph(i).mixtures)
    model, mixture = loaded(folder, BRAIN), source.graph(at).mixtures[0]
    layer = model.get_submodule(source.block_name(at))
    layer.get_submodule(mixture).register_forward_pre_hook(told("transformers"))
    arrived = []
    layer.register_forward_pre_hook(lambda _, args: arrived.append(args[0]))
    ids = ids_of()
    with torch.no_grad():
        model(ids)
    block = opened(source, recipe_of("rtn"), ids, at)
    assert isinstance(block.module.get_submodule(mixture), Experts)
    block.module.get_submodule(mixture).register_forward_pre_hook(told("here"))
    with torch.no_grad():
        block.forward(arrived[0])
    theirs, ours = (torch.cat(seen[k]) for k in ("transformers", "here"))
    assert (theirs == ours).all(-1).double().mean() > 0.99


@pytest.mark.parametrize("compute", [BRAIN, torch.float32])
@pytest.mark.parametrize("name", ["awq", "gptq", "smoothquant", "omniquant", "tesseraq"])
def test_methods_run_the_router_as_it_is_kept(tmp_path, name, compute):
    """In steps with gradients, on submodules alone and where a method computes in another dtype."""
    source = ModelStream(saved(tmp_path, "ernie4_5_moe", BRAIN), compute=compute)
    at = next(i for i in range(len(source)) if source.graph(i).mixtures)
    recipe = recipe_of(name)
    block = opened(source, recipe, ids_of(), at)
    seen = {"mlp.gate": set(), "self_attn.o_proj": set()}
    for part, dtypes in seen.items():
        block.module.get_submodule(part).register_forward_pre_hook(
            lambda module, _, dtypes=dtypes: dtypes.add(module.weight.dtype)
        )
    done = apply_methods(block, recipe)
    assert done.coded.keys() == set(block.graph.linears)
    assert seen["mlp.gate"] == {torch.float32}
    assert compute in seen["self_attn.o_proj"]


def test_gradients_pass_through_mixed_dtypes(tmp_path):
    source = ModelStream(saved(tmp_path, "ernie4_5_moe", BRAIN), compute=BRAIN)
    at = next(i for i in range(len(source)) if source.graph(i).mixtures)
    block = opened(source, recipe_of("rtn"), ids_of(), at)
    trained = ["self_attn.q_proj.weight", "mlp.gate.weight"]
    found = {}
    for compute in (BRAIN, torch.float32):
        own = block.computing(compute)
        moved = {k: w + 0.1 * w.roll(1) for k, w in own.weights.items() if w.is_floating_point()}
        weights = {**own.weights, **moved}
        found[compute] = Reconstruction(own, 4).gradients(weights, trained, torch.arange(4))[1]
    for name, ours, exact in zip(trained, *found.values(), strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 0.1, name


def test_numbers_that_are_no_floats_stay_as_they_are(tmp_path):
    source = ModelStream(saved(tmp_path, "deepseek_v4", BRAIN), compute=BRAIN)
    weights = {k: w for k, w in source.block_weights(0).items() if not w.is_floating_point()}
    assert weights
    block = opened(source, recipe_of("rtn"), ids_of())
    cast = block.context.cast(block.weights)
    assert all(torch.equal(cast[k], w) and cast[k].dtype == w.dtype for k, w in weights.items())
