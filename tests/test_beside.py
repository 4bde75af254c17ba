"""Blocks that are given more than the hidden state: what is found, that going from block to block
computes what the model does, whatever rows run together, and what is refused.
"""

import pytest
import torch
import transformers as T
from families import BESIDE, config_of
from helpers import TEXT, model_of, needs_of, opened, run, tiny_tokenizer
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.grid import Affine
from lowbit.methods._reconstruct import Reconstruction
from lowbit.model import block as of_block
from lowbit.model import context
from lowbit.model.beside import Item, held_at_most
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
    "hy_v4": [(0, (1,), (1,)), (2, (1,), (3,))],
    "deepseek_v4": [(None, ("input_ids",), (0,))],
}
FOUND["gemma3n"] = FOUND["gemma4 with shared keys"]


def mean_so_far(v):
    """(rows, length, channels): of the tokens up to each."""
    count = torch.arange(1, v.shape[1] + 1, dtype=v.dtype, device=v.device)
    return v.cumsum(1) / count[:, None]


class Block(nn.Module):
    """Adds what it makes of its own values, or of an earlier block's."""

    def __init__(self, width, reuses):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.value = None if reuses else nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, shared=None, more=None):
        if self.value is not None:
            shared["values"] = self.value(self.norm(x))
        out = mean_so_far(shared["values"])
        if isinstance(more, torch.Tensor) and more.is_floating_point():
            out = out + more
        return x + self.out(out)


class Config(T.PretrainedConfig):
    model_type = "lowbit_passing"

    def __init__(self, hidden_size=64, num_hidden_layers=2, variant="reused", **more):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.variant, self.vocab_size = variant, 300
        super().__init__(**more)


class Model(T.PreTrainedModel, T.GenerationMixin):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Module()
        self.body.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        own = config.variant == "own"
        blocks = [Block(config.hidden_size, i > 0 and not own) for i in range(2)]
        self.body.blocks = nn.ModuleList(blocks)
        self.body.last = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, use_cache=None, **_):
        x, shared = self.body.embed(input_ids), {}
        given = {
            "embedding": lambda: (first, first),
            "sum": lambda: (None, x + first),
            "other rows": lambda: (x.mean(0, keepdim=True).expand_as(x), None),
            "all rows": lambda: (input_ids.flatten(), None),
            "number": lambda: (None, int(input_ids.sum())),
        }.get(self.config.variant, lambda: (None, None))
        first = x
        for i, block in enumerate(self.body.blocks):
            x = block(x, shared, given()[i])
        return self.head(self.body.last(x))


@pytest.fixture(scope="module")
def passing():
    T.AutoConfig.register("lowbit_passing", Config)
    T.AutoModelForCausalLM.register(Config, Model)
    yield lambda variant: Config(variant=variant)
    T.CONFIG_MAPPING._extra_content.pop("lowbit_passing")
    T.AutoModelForCausalLM._model_mapping._extra_content.pop(Config)


@pytest.mark.parametrize("variant, source", [("own", "value"), ("reused", None)])
def test_what_a_later_block_reads_takes_no_factor(passing, variant, source):
    graph = described(passing(variant)).graph(0)
    site = graph.site_of("out")
    assert (site.source and site.source.module) == source
    assert bool(graph.dropped) == (source is None)
    assert graph.site_of("value").source.module == "norm"  # which later blocks do not see


@pytest.mark.parametrize("variant, turned", [("own", True), ("reused", True), ("embedding", False)])
def test_a_stream_that_other_blocks_read_as_it_entered_keeps_its_basis(passing, variant, turned):
    found = described(passing(variant))
    assert found.graph(0).rotatable and found.frame.open != turned


def test_one_tensor_is_carried_once_for_all_who_read_it(passing):
    embedded, shared = described(passing("embedding")).items
    assert embedded == Item(None, ("more",), ((0, ("more",)), (1, ("more",))), 64)
    assert shared == Item(0, ("shared", "values"), ((1, ("shared", "values")),), 64)


@pytest.mark.parametrize(
    "variant, said",
    [
        (
            "sum",
            r"block 1 .* given 'more', which is made of what earlier blocks compute, but is no",
        ),
        ("other rows", r"block 0 .* given 'more', which depends on the tokens of other rows"),
        ("all rows", r"block 0 .* given 'more', which depends on all rows together"),
        (
            "number",
            r"block 1 .* given 'more', which depends on more than its input and is no tensor",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused_in_a_sentence(passing, variant, said):
    with pytest.raises(LowbitError, match=said + ".* Nothing was written"):
        described(passing(variant))


@pytest.fixture(scope="module", params=BESIDE)
def saved(request, tmp_path_factory):
    """A folder with a random model in float32, and the model itself in float64."""
    return save(request.param, tmp_path_factory.mktemp("model"))


def save(name, folder):
    torch.manual_seed(0)
    config = config_of(name)
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = T.AutoModelForCausalLM.from_config(config, **eager).float().eval()
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
    block = opened(stream, Recipe(Affine(3, 16)), IDS, stream.described.items[0].last)
    with pytest.raises(ValueError, match=r"layers\.\d' reads \[.*\] and is given \[\]"):
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


def test_what_lies_beside_the_streams_is_planned(saved):
    stream = ModelStream(saved[0])
    left, _ = walked(stream, "rtn")
    items = stream.described.items
    # Of a block's own, the float model's and the quantized model's; of the tokens one for both.
    beside = [
        sum(t.nbytes for held in (s.beside.x, s.beside.xq) for t in held.values())
        - sum(t.nbytes for n, t in s.beside.x.items() if items[n].maker is None)
        for s in left
    ]
    planned = held_at_most(items, len(stream), IDS.shape[1], 4) * len(IDS)
    assert 0 <= max(beside) <= planned
    recipe = load_recipe("rtn", scheme=Affine(3, 16))
    memory = needs_of(stream.config, recipe, 128, 16, torch.device("cpu"), stream.dtype)
    assert memory.beside == held_at_most(items, len(stream), 16, 4) * 128
    numbers = left[0].x[0].numel()  # of a row, all its streams
    assert memory.stream == 128 * numbers * stream.dtype.itemsize
    assert memory.streams == 3 * memory.stream + memory.beside


def test_the_sum_of_what_lies_beside_a_row():
    tokens = Item(None, ("a",), ((0, ("a",)), (3, ("a",))), 10)
    keys = Item(1, ("b", 0), ((2, ("b", 0)), (3, ("b", 0))), 100)
    chosen = Item(0, (1,), ((1, ("c",)),), 1, square=True, size=8)
    assert held_at_most([tokens], 4, 16, 2) == 10 * 16 * 2
    assert held_at_most([tokens, keys], 4, 16, 2) == (10 + 2 * 100) * 16 * 2
    assert held_at_most([chosen, tokens], 4, 16, 2) == 10 * 16 * 2 + 2 * 16 * 16 * 8
    assert held_at_most([], 4, 16, 2) == 0
