"""OmniQuant: the transformation keeps the function, what is learned is what is folded, official
clips are read.
"""

from dataclasses import replace

import pytest
import torch
from helpers import apply_methods, begin, save_tiny
from safetensors.torch import save_file

from lowbit.errors import LowbitError
from lowbit.grid import Affine, PerToken
from lowbit.methods import RTN, OmniQuant, TesseraQ
from lowbit.methods._learned import Learned, clipped_range, shiftable
from lowbit.methods._reconstruct import Reconstruction
from lowbit.model.model import Streams
from lowbit.model.rewrite import fold
from lowbit.model.stream import ModelStream
from lowbit.recipe import Recipe

IDS = torch.randint(3, 280, (12, 24), generator=torch.Generator().manual_seed(0))
QUICK = OmniQuant(epochs=15, clip_lr=0.05, batch=2)


def opened(folder, recipe, i=0):
    stream = ModelStream(folder)
    x = stream.embed(IDS)
    return begin(stream, i, recipe, Streams(x, x, 8), stream.block_kwargs(24)[i], 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("m"), "llama-mha", torch.float32)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("o"), "opt", torch.float32)


def test_a_shift_moves_into_the_biases(opt):
    block = opened(opt, Recipe(Affine(8)))
    expected, moved = block.forward(block.x[:4]), block
    shifted = [s for s in block.graph.sites[:-1] if s.source is not None and shiftable(block, s)]
    assert len(shifted) == 3
    for site in shifted:
        width = block.weight(site.reads[0]).shape[1]
        moved = fold(moved, site, torch.rand(width) + 0.5, torch.randn(width))
    torch.testing.assert_close(moved.forward(block.x[:4]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["llama-mha", "llama", "opt", "gemma", "phi3", "bitnet", "qwen2"]
)
def test_what_is_learned_is_what_is_folded(tmp_path, family):
    block = opened(
        save_tiny(tmp_path, family, torch.float32), Recipe(Affine(4), activations=PerToken(8))
    )
    method = OmniQuant(epochs=1)
    learned = Learned(block, method._sites(block), 0.5)
    assert learned.transforms()
    with torch.no_grad():
        for t in (*learned.clips(), *learned.transforms()):
            t.add_(0.1 * torch.randn_like(t))
        expected = block.exact().forward(block.x[:4], learned._transformed())
        torch.testing.assert_close(
            expected, block.exact().forward(block.x[:4]), rtol=1e-3, atol=1e-3
        )
        inside = learned.weights()
    decoded = RTN()(learned.folded(block)).decoded()
    for key in inside:
        apart = (inside[key] - decoded[key]).abs()
        # A rounding tie may fall either way, by one step.
        assert (apart > 1e-5).double().mean() < 0.02, key
        scale = learned.folded(block).params.get(key.removesuffix(".weight"))
        assert apart.max() <= (1e-4 if scale is None else 1.01 * scale.scale.max()), key


def test_learning_lowers_the_loss_and_leaves_weights_alone(llama):
    block = opened(llama, Recipe(Affine(2, 16)))
    done = QUICK(block)
    assert set(done.params) == set(block.graph.linears)
    assert all(torch.equal(done.weights[k], block.weights[k]) for k in block.weights)
    judge = Reconstruction(block, 4)
    assert judge.loss(RTN()(done).decoded(), 8) < 0.9 * judge.loss(RTN()(block).decoded(), 8)


def test_transformation_helps_under_quantized_activations(opt):
    block = opened(opt, Recipe(Affine(4), activations=PerToken(4)))
    loud = block.x.clone()
    loud[..., 5] *= 20
    block = block.within(x=loud, xq=loud, target=block.exact().run(loud))
    off, on = (replace(OmniQuant(epochs=4), transform=t)(block) for t in ("off", "on"))
    losses = [Reconstruction(b, 4).loss(RTN()(b).decoded(), 8) for b in (off, on)]
    assert losses[1] < losses[0]


def test_official_clips_are_read(llama, tmp_path):
    block = opened(llama, Recipe(Affine(3)), i=1)
    tensors = {}
    for name in block.graph.linears:
        for end in ("upbound_factor", "lowbound_factor"):
            tensors[f"1.{name}.weight_quantizer.{end}"] = torch.randn(len(block.weight(name)), 1)
    save_file(tensors, tmp_path / "omni.safetensors")
    done = OmniQuant(clips=str(tmp_path / "omni.safetensors"))(block)
    for name in block.graph.linears:
        w = block.weight(name).double()
        low, high = (
            torch.sigmoid(tensors[f"1.{name}.weight_quantizer.{e}"]).double()
            for e in ("lowbound_factor", "upbound_factor")
        )
        scale = (w.amax(1, keepdim=True) * high - w.amin(1, keepdim=True) * low) / 7
        torch.testing.assert_close(done.params[name].scale.double(), scale, rtol=1e-5, atol=0)
    tuned = apply_methods(
        block,
        Recipe(
            Affine(3),
            (
                OmniQuant(clips=str(tmp_path / "omni.safetensors")),
                TesseraQ(schedule="exponential-4-4", iters=4),
            ),
        ),
    )
    assert set(tuned.coded) == set(block.graph.linears)


def test_clips_of_another_model_are_named(llama, tmp_path):
    block = opened(llama, Recipe(Affine(3)))
    with pytest.raises(LowbitError, match="cannot be read"):
        OmniQuant(clips=str(tmp_path / "none.safetensors"))(block)
    save_file(
        {"0.self_attn.q_proj.weight_quantizer.lowbound_factor": torch.zeros(3, 1)},
        tmp_path / "o.safetensors",
    )
    with pytest.raises(LowbitError, match="has 3 values"):
        OmniQuant(clips=str(tmp_path / "o.safetensors"))(block)
    save_file({"1.x": torch.zeros(3, 1)}, tmp_path / "p.safetensors")
    with pytest.raises(LowbitError, match="has no tensor '0.self_attn.q_proj"):
        OmniQuant(clips=str(tmp_path / "p.safetensors"))(block)


def test_ranges_are_differentiable():
    weight, low, high = (
        torch.randn(2, 8).double(),
        *(torch.zeros(2, 2).double().requires_grad_() for _ in range(2)),
    )
    scale = clipped_range(weight, Affine(2, 4), low, high).scale
    grads = torch.autograd.grad(scale.sum(), (low, high))
    assert all(bool((g != 0).any()) for g in grads)


@pytest.mark.parametrize("options", [{"batch": 0}, {"clip_lr": 0.0}, {"alpha": 2.0}])
def test_nonsense_is_refused(options):
    with pytest.raises(LowbitError):
        OmniQuant(**options)
