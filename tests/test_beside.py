"""Blocks that are given more than the hidden state: what is found, that going from block to block
computes what the model does, whatever rows run together, and what is refused.
"""

import pytest
import torch
import transformers as T
from families import BESIDE, config_of
from helpers import TEXT, model_of, opened, run, tiny_tokenizer

import lowbit
from lowbit.grid import Affine
from lowbit.methods._reconstruct import Reconstruction
from lowbit.model import block as of_block
from lowbit.model import context
from lowbit.model.model import float_blocks
from lowbit.model.stream import ModelStream
from lowbit.model.tracing import described
from lowbit.recipe import Recipe, load_recipe

IDS = torch.randint(3, 280, (6, 16), generator=torch.Generator().manual_seed(0))
PER_LAYER = [(None, ("per_layer_input",), (i,)) for i in range(4)]
FOUND = {
    "gemma4 with per-layer inputs": PER_LAYER,
    "gemma4 with shared keys": [
        *PER_LAYER,
        *(
            (i, ("shared_kv_states", kind, part), (i + 2,))
            for i, kind in enumerate(("sliding_attention", "full_attention"))
            for part in (0, 1)
        ),
    ],
    "glm_moe_dsa with shared indices": [(0, (1,), (1,)), (2, (1,), (3,))],
}


@pytest.fixture(scope="module", params=BESIDE)
def saved(request, tmp_path_factory):
    """A folder with a random model in float32, and the model itself in float64."""
    return save(request.param, tmp_path_factory.mktemp("model"))


def save(name, folder):
    torch.manual_seed(0)
    config = config_of(name)
    model = T.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in key:
                p.mul_(3)
    model.save_pretrained(folder)
    return folder, model.double()


@pytest.mark.parametrize("name", BESIDE)
def test_what_goes_beside_the_stream_is_found(name):
    items = described(config_of(name)).items
    found = [(t.maker, t.path, tuple(i for i, _ in t.readers)) for t in items]
    assert sorted(found, key=str) == sorted(FOUND[name], key=str)


def test_from_block_to_block_is_the_model(saved):
    folder, model = saved
    stream = ModelStream(folder, compute=torch.float64)
    for block in float_blocks(model_of(stream, Recipe(Affine(4, 16)), IDS), "looking"):
        target = block.target
    with torch.no_grad():
        expected = model(IDS).logits.float()
    torch.testing.assert_close(stream.head(target), expected, rtol=1e-4, atol=1e-5)


def walked(stream, methods, ids=IDS):
    """What leaves each block of a quantized model, and the blocks."""
    recipe = load_recipe(methods, scheme=Affine(3, 16))
    model = model_of(stream, recipe, ids)
    blocks = []
    left = [s for s in run(model, model.entered(ids), blocks.append)]
    return left, blocks


@pytest.mark.parametrize("tokens", [16, 48])
def test_rows_do_not_see_which_others_run_with_them(saved, monkeypatch, tokens):
    stream = ModelStream(saved[0], compute=torch.float64)
    whole, _ = walked(stream, "rtn")
    for module in (context, of_block):
        monkeypatch.setattr(module, "TOKENS_PER_PASS", tokens)
    parts, _ = walked(stream, "rtn")
    for one, other in zip(whole, parts, strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def tensors(streams):
    beside = streams.beside
    assert beside.x.keys() == beside.xq.keys()
    return [streams.x, streams.xq, *beside.x.values(), *beside.xq.values()]


def test_what_no_later_block_reads_is_let_go(saved):
    stream = ModelStream(saved[0])
    items = stream.described.items
    for i, streams in enumerate(walked(stream, "rtn")[0]):
        made = [n for n, t in enumerate(items) if (t.maker is None or t.maker <= i) and i < t.last]
        assert sorted(streams.beside.x) == made == sorted(streams.beside.xq)
        floats = [n for n in made if items[n].maker is not None and items[n].size is None]
        for n in floats:  # the quantized model's own
            assert not torch.equal(streams.beside.x[n], streams.beside.xq[n])


def test_gradients_take_the_rows_that_are_drawn(saved):
    stream = ModelStream(saved[0], compute=torch.float64)
    last = len(stream) - 1
    block = opened(stream, Recipe(Affine(3, 16)), IDS, last)
    job, trained = Reconstruction(block, 3), [f"{block.graph.linears[0]}.weight"]
    rows = torch.tensor([4, 1, 3])
    together = job.gradients(block.weights, trained, rows)
    single = [job.gradients(block.weights, trained, row[None]) for row in rows]
    loss = sum(found for found, _ in single) / 3
    gradient = sum(found[0] for _, found in single) / 3
    torch.testing.assert_close(together[0], loss)
    torch.testing.assert_close(together[1][0], gradient, rtol=1e-5, atol=1e-9)


def test_a_block_runs_with_all_that_it_reads_or_not_at_all(saved):
    stream = ModelStream(saved[0])
    block = opened(stream, Recipe(Affine(3, 16)), IDS, len(stream) - 1)
    with pytest.raises(ValueError, match=r"layers\.3' reads \[.*\] and is given \[\]"):
        block.forward(block.x)


@pytest.mark.parametrize("name", ["gemma4 with shared keys", "glm_moe_dsa with shared indices"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_killed_run_ends_with_the_same_bytes(name, blocks, tmp_path):
    folder, _ = save(name, tmp_path / "model")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT[:4000])
    options = dict(calib=str(folder / "text.txt"), samples=8, length=16, device="cpu")
    once = lowbit.quantize(str(folder), "W3A16g16", "gptq", out=tmp_path / "once", **options)
    assert once.verification.loader == "passed"
    done = []

    def stop(record):
        done.append(record)
        if len(done) == blocks:
            raise KeyboardInterrupt

    again = dict(options, out=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(str(folder), "W3A16g16", "gptq", progress=stop, **again)
    lowbit.quantize(str(folder), "W3A16g16", "gptq", **again)
    shards = sorted(p.name for p in (tmp_path / "once").glob("*.safetensors"))
    assert shards
    for shard in shards:
        one, other = (tmp_path / out / shard for out in ("once", "again"))
        assert one.read_bytes() == other.read_bytes(), shard
