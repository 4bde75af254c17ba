"""What is known of a model without its data, counted by hand; hooks that live for one pass."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as T
from families import config_of, wrapper_of
from helpers import COMMON, FAMILIES, LLAMA, save_tiny
from torch import nn
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid import InputQuantizer, PerToken
from lowbit.grid.names import parse_scheme
from lowbit.model.checkpoint import Checkpoint
from lowbit.model.declared import check_declared
from lowbit.model.hooks import AllSeen, quantized_inputs, watched
from lowbit.model.outline import Outline
from lowbit.model.stream import ModelStream
from lowbit.plan import make_plan, read_config
from lowbit.recipe import load_recipe

H, F, V = 64, 96, 300  # hidden, inner, vocabulary


def llama_linears(kv):
    return {
        **{f"self_attn.{n}_proj": (H if n in "qo" else kv, H) for n in "qkvo"},
        "mlp.gate_proj": (F, H),
        "mlp.up_proj": (F, H),
        "mlp.down_proj": (H, F),
    }


OPT = {
    **{f"self_attn.{n}": (H, H) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "fc1": (F, H),
    "fc2": (H, F),
}
QKV = {f"self_attn.{n}_proj" for n in "qkv"}
OUTLINES = {  # family: linears, biased, rest of a block, outside, tied head
    "llama": (llama_linears(32), set(), 2 * H, V * H + H, V * H),
    "llama-mha": (llama_linears(64), set(), 2 * H, 2 * V * H + H, 0),
    "mistral": (llama_linears(32), set(), 2 * H, 2 * V * H + H, 0),
    "qwen2": (llama_linears(32), QKV, 2 * H + H + 32 + 32, 2 * V * H + H, 0),
    "qwen3": (llama_linears(32), set(), 2 * H + 2 * 16, 2 * V * H + H, 0),
    "gemma": (llama_linears(32), set(), 2 * H, V * H + H, V * H),
    "phi3": (
        {
            "self_attn.qkv_proj": (3 * H, H),
            "self_attn.o_proj": (H, H),
            "mlp.gate_up_proj": (2 * F, H),
            "mlp.down_proj": (H, F),
        },
        set(),
        2 * H,
        2 * V * H + H,
        0,
    ),
    "bitnet": (llama_linears(32), set(), 2 * H + H + F, 2 * V * H + H, 0),
    # positions are two more than asked for; biases of six linears, two norms of two
    "opt": (OPT, set(OPT), 5 * H + F + 4 * H, V * H + 130 * H + 2 * H, V * H),
    "opt-post-norm": (OPT, set(OPT), 5 * H + F + 4 * H, V * 32 + 130 * H + 2 * 32 * H, V * 32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_every_family(family):
    outline = Outline.of(FAMILIES[family]())
    linears, biased, rest, outside, tied = OUTLINES[family]
    (kind,) = outline.kinds
    assert dict(kind.linears) == linears and kind.biased == biased
    assert (kind.rest, outline.outside, outline.tied_head) == (rest, outside, tied)
    assert outline.rest == 2 * rest and outline.of_layers == (0, 0)
    assert outline.blocks == 2 and outline.centred == family.startswith("opt")
    assert not outline.rotated and not outline.online and not outline.kv


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_linears_is_that_of_the_forward_pass(family):
    """Every linear of a block is in one site, and its submodules run in that order."""
    (kind,) = Outline.of(FAMILIES[family]()).kinds
    sites = [name for site in kind.graph.sites for name in site.reads]
    assert len(sites) == len(set(sites)) and set(sites) == set(kind.linears)
    assert kind.graph.linears == tuple(sites)
    widths = [{kind.linears[n][1] for n in site.reads} for site in kind.graph.sites]
    assert all(len(w) == 1 for w in widths)  # linears of a site read the same input


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_shapes_are_named_in_full_and_no_block_is_built_twice(layers):
    outline = Outline.of(T.LlamaConfig(**{**LLAMA, "num_hidden_layers": layers}))
    assert outline.blocks == layers and len(outline.shapes) == 7 * layers
    for i in range(layers):
        assert outline.shapes[f"model.layers.{i}.mlp.down_proj"] == (H, F)
    assert outline.outside == 2 * V * H + H  # whatever the number of blocks


@pytest.mark.parametrize(
    "tied, rotated, stored",
    [
        (True, False, V * H + H),
        (True, True, 2 * V * H + H),  # in another basis, the head is one of its own
        (False, False, 2 * V * H + H),
        (False, True, 2 * V * H + H),
    ],
)
def test_a_tied_head_is_stored_once_unless_rotated(tied, rotated, stored):
    outline = Outline.of(T.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    assert replace(outline, rotated=rotated).stored_outside == stored


@pytest.mark.parametrize(
    "said, dtype",
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        ("float16", torch.float16),
        (None, torch.bfloat16),
    ],
)
def test_the_dtype_is_what_the_config_says(said, dtype):
    assert Outline.of(T.LlamaConfig(**LLAMA, dtype=said)).dtype == dtype


def test_a_config_is_left_as_it_was():
    config = T.Qwen2Config(**LLAMA)
    before = config.to_dict()
    Outline.of(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "config",
    [T.GPT2Config(n_embd=64, n_head=4), T.BertConfig(**{**COMMON, "intermediate_size": 96})],
    ids=lambda c: c.model_type,
)
def test_other_families_are_refused_by_name(config):
    with pytest.raises(LowbitError, match=config.model_type):
        Outline.of(config)


NOT_READ = {  # what config.json says -> what is refused whatever the weights are
    "transforms": (
        {"quantization_config": {"transform_config": {"config_groups": {"R4": {}}}}},
        "computed with transforms around its linears",
    ),
    "transforms of the text model": (
        {"text_config": {"quantization_config": {"transform_config": {"config_groups": {"R": 1}}}}},
        "computed with transforms around its linears",
    ),
    "sparse": (
        {"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}},
        "is stored sparse",
    ),
    "rounded at load": ({"quantization_config": {"quant_method": "bitnet"}}, "three values"),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "is a LlamaForSequenceClassification",
    ),
}


@pytest.mark.parametrize("said, words", NOT_READ.values(), ids=NOT_READ)
def test_a_plan_refuses_what_no_weights_could_change(said, words):
    with pytest.raises(LowbitError, match=words):
        check_declared({**T.LlamaConfig(**LLAMA).to_dict(), **said}, "m")
    if "text_config" not in said:
        with pytest.raises(LowbitError, match=words):
            Outline.of(T.LlamaConfig(**LLAMA, **said))


def test_a_plan_refuses_forms_that_are_not_known(tmp_path):
    said = r"'model\.layers\.0\.mlp\.input_linear\.weight' is a 3-D parameter of a form"
    config = config_of("jetmoe")
    with pytest.raises(LowbitError, match=said):
        Outline.of(config)
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--scheme", "W4A16g8"])
    assert result.exit_code == 2 and re.search(said, " ".join(result.output.split()))


def test_a_plan_says_what_the_run_will_say(tmp_path):
    """Of recurrent_gemma's gates, in one block of two."""
    more = dict(num_hidden_layers=2, block_types=["recurrent", "attention"], lru_width=64)
    folder = save_tiny(tmp_path / "m", config_of("recurrent_gemma", vocab_size=300, **more))
    (said,) = ModelStream(folder).remarks
    assert "more of more than two dimensions stay in the model's own dtype" in said
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    outline = Outline.of(read_config(str(folder)))
    assert outline.remarks[0] == said
    assert "(quantization_config says fp8): quantize reads them" in outline.remarks[1]
    options = ["plan", str(folder), "--scheme", "W4A16g8", "--recipe", "rtn"]
    result = CliRunner().invoke(app, [*options, "--json", str(tmp_path / "p.json")])
    assert json.loads((tmp_path / "p.json").read_text())["remarks"] == list(outline.remarks)
    assert result.output.count(" note ") == 2
    assert Outline.of(T.LlamaConfig(**LLAMA)).remarks == ()


TOWERS = ("vision", "visual", "projector")


@pytest.mark.parametrize(
    "family, text",
    [
        ("gemma3", "gemma3_text"),  # ties its head in either config
        ("mistral3", "mistral"),  # in the larger one
        ("qwen3_vl", "qwen3_vl_text"),
        ("qwen3_5", "qwen3_5_text"),
        ("llava", "mixtral"),
    ],
)
def test_what_lies_around_a_text_model_is_counted(family, text, tmp_path):
    config = wrapper_of(family, text)
    model = T.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    found = Checkpoint(tmp_path).stored()
    towers = sum(t.numel for n, t in found.items() if any(word in n for word in TOWERS))
    assert towers and Outline.of(config).around == towers
    recipe = load_recipe("rtn", scheme=parse_scheme("W4A16g8sym"))
    plan = make_plan(config, recipe, 8, 32)
    assert plan.parameters == sum(t.numel for t in found.values())
    assert plan.as_dict()["around"] == towers
    alone = replace(plan, outline=replace(plan.outline, around=0))
    assert plan.artifact - alone.artifact == 2 * towers
    assert plan.check_memory - alone.check_memory == 5 * towers
    assert plan.memory == alone.memory  # a run copies them piece by piece
    assert Outline.of(config.get_text_config()).around == 0


def test_what_cannot_be_built_around_a_text_model_is_not_counted(monkeypatch):
    monkeypatch.setattr("lowbit.model.outline.whole_model", lambda config: None)
    assert Outline.of(wrapper_of("gemma3", "gemma3_text")).around == 0


# --- hooks ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two linears that read one input, and one that reads theirs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.passed = 0

    def forward(self, x):
        y = self.c(self.a(x) + self.b(x))
        self.passed += 1
        return y


class Counted(PerToken):
    """Counts what passes it."""

    calls = 0

    def __call__(self, x):
        type(self).calls += 1
        return super().__call__(x)


def hooks(net):
    return sum(len(m._forward_pre_hooks) for m in net.modules())


@pytest.mark.parametrize("names", [[], ["a"], ["b"], ["c"], ["a", "b"], ["a", "b", "c"]], ids=str)
def test_inputs_pass_their_quantizers_within_and_not_after(names):
    net, x, grid = Net(), torch.randn(4, 8), PerToken(3)
    plain = net(x)

    def met(name, value):
        return grid(value) if name in names else value

    inner = met("a", x) @ net.a.weight.T + met("b", x) @ net.b.weight.T
    expected = met("c", inner) @ net.c.weight.T
    with quantized_inputs(net, {n: InputQuantizer(grid=grid) for n in names}):
        torch.testing.assert_close(net(x), expected)
    assert torch.equal(net(x), plain) and hooks(net) == 0


@pytest.mark.parametrize("shared, calls", [(True, 1), (False, 2)])
def test_linears_that_share_a_quantizer_share_its_work(shared, calls):
    net, x = Net(), torch.randn(4, 8)
    one = InputQuantizer(grid=Counted(4))
    Counted.calls = 0
    with quantized_inputs(net, {"a": one, "b": one if shared else InputQuantizer(grid=one.grid)}):
        net(x)
    assert Counted.calls == calls
    with quantized_inputs(net, {"a": one}):
        net(x)
        net(x + 1)  # another input is quantized anew
    assert Counted.calls == calls + 2


@pytest.mark.parametrize(
    "names, shown",
    [("a", "a"), ("b", "b"), ("c", "c"), ("ca", "ac"), ("bc", "bc"), ("abc", "abc")],
)
def test_a_pass_ends_where_the_last_of_them_is_called(names, shown):
    net, x, seen = Net(), torch.randn(4, 8), []
    with watched(net, names, lambda name, call: seen.append((name, call))) as left:
        for _ in range(2):
            left.update(names)
            with pytest.raises(AllSeen):
                net(x)
            assert not left
    assert "".join(name for name, _ in seen) == shown * 2 and net.passed == 0
    inner = net.a(x) + net.b(x)
    for name, call in seen:
        torch.testing.assert_close(call.args[0], inner if name == "c" else x)
    net(x)
    assert net.passed == 1 and len(seen) == 2 * len(shown) and hooks(net) == 0


@pytest.mark.parametrize("where", ["quantized", "watched"])
def test_no_hook_outlives_an_error(where):
    net = Net()

    def broken(*_):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        if where == "quantized":
            with quantized_inputs(net, {"a": InputQuantizer(grid=PerToken(4))}):
                broken()
        else:
            with watched(net, ["a", "c"], broken) as left:
                left.update(["a", "c"])
                net(torch.randn(2, 8))
    assert hooks(net) == 0
    both = {"a": InputQuantizer(), "nowhere": InputQuantizer()}
    with pytest.raises(AttributeError, match="nowhere"), quantized_inputs(net, both):
        pass
    assert hooks(net) == 0
