"""The block stream computes what transformers computes, and rewrites keep the function, for every
family.
"""

import pytest
import torch
import transformers as T
from helpers import FAMILIES, begin, save_tiny

from lowbit.errors import LowbitError
from lowbit.grid import Affine
from lowbit.methods._scale_search import best_scale, collect_inputs
from lowbit.methods.awq import scale_candidates
from lowbit.model.model import Streams
from lowbit.model.rewrite import fold
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_whole_models(tmp_path, family):
    save_tiny(tmp_path, family, torch.float32, max_shard_size="60KB")
    stream = ModelStream(tmp_path)
    ids = torch.randint(3, 280, (3, 40))
    x = stream.embed(ids)
    for i, kwargs in enumerate(stream.block_kwargs(40)):
        x = begin(stream, i, Recipe(Affine(4)), Streams(x, x, 3), kwargs, 0).target
    whole = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stream.head(x), whole(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_a_factor_keeps_the_function(tmp_path, family):
    save_tiny(tmp_path, family, torch.float32)
    stream = ModelStream(tmp_path, compute=torch.float64)
    x = stream.embed(torch.randint(3, 280, (4, 32)))
    block = begin(stream, 0, Recipe(Affine(2, 16)), Streams(x, x, 4), stream.block_kwargs(32)[0], 0)
    before = block.forward(x.double())
    folded = 0
    for site in block.graph.sites:
        if site.source is not None:
            seen = collect_inputs(block, [site], 4)[site.reads[0]]
            factor, _ = best_scale(block, site, seen, scale_candidates(seen.mean, 4))
            block = fold(block, site, factor * torch.linspace(0.5, 2, len(factor)).double())
            folded += 1
    if folded:
        changed = sum(
            not torch.equal(block.weights[k], v) for k, v in stream.block_weights(0).items()
        )
        assert changed > folded
    torch.testing.assert_close(block.forward(x.double()), before, rtol=1e-6, atol=1e-6)


def test_another_family_than_the_tensors_are_of_is_refused(tmp_path):
    T.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    T.MixtralConfig(num_hidden_layers=1).save_pretrained(tmp_path / "moe")
    for folder, word in (
        ("gpt2", "no block of .* has a linear that can be quantized"),
        ("moe", "'model.embed_tokens.weight' of .* has shape .* config.json wants"),
    ):
        save_tiny(tmp_path / "ok")
        (tmp_path / folder / "model.safetensors").write_bytes(
            (tmp_path / "ok" / "model.safetensors").read_bytes()
        )
        with pytest.raises(LowbitError, match=word):
            ModelStream(tmp_path / folder)


def test_a_float_model_that_overflows_is_named(tmp_path):
    model = T.LlamaForCausalLM(FAMILIES["llama"]())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e38)
    model.save_pretrained(tmp_path)
    stream = ModelStream(tmp_path)
    x = stream.embed(torch.randint(3, 280, (3, 16)))
    with pytest.raises(
        LowbitError,
        match="'model.layers.0' of the float model gives activations whose squares are not finite",
    ):
        for i, kwargs in enumerate(stream.block_kwargs(16)):
            x = begin(stream, i, Recipe(Affine(4)), Streams(x, x, 3), kwargs, 0).target
