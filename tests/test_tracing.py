"""Graphs that tracing finds, against those written down by hand, at many sizes."""

import json
import math
from dataclasses import fields

import pytest
import torch
import transformers as T
from families import config_of
from hand_graphs import FAMILIES as BY_HAND
from hand_graphs import QKV, attention, described, entering, norm
from helpers import FAMILIES, opened, save_tiny
from torch import nn

from lowbit.errors import LowbitError
from lowbit.grid.names import parse_scheme
from lowbit.model import tracing
from lowbit.model.graph import Site
from lowbit.model.rewrite import checked
from lowbit.model.stream import ModelStream
from lowbit.model.tracing.blocks import limits
from lowbit.model.tracing.norms import is_centred, offset_of
from lowbit.model.tracing.shrink import divisor
from lowbit.model.tracing.tiny import build_tiny
from lowbit.plan import read_config
from lowbit.recipe import load_recipe

TWO = dict(num_hidden_layers=2, vocab_size=512)


def sizes(hidden, inner, heads, groups, head=None, **more):
    """The sizes of a published model, two blocks of it."""
    own = {} if head is None else dict(head_dim=head)
    return dict(
        TWO,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **own,
        **more,
    )


def falcon(hidden, heads, **more):
    return T.FalconConfig(**TWO, hidden_size=hidden, num_attention_heads=heads, **more)


PUBLISHED = {
    "Llama-2-7B": lambda: T.LlamaConfig(**sizes(4096, 11008, 32, 32)),
    "Llama-3-8B": lambda: T.LlamaConfig(**sizes(4096, 14336, 32, 8)),
    "Llama-3.2-3B": lambda: T.LlamaConfig(**sizes(3072, 8192, 24, 8, 128)),
    "SmolLM2-135M": lambda: T.LlamaConfig(**sizes(576, 1536, 9, 3)),
    "Mistral-Small-24B": lambda: T.MistralConfig(**sizes(5120, 32768, 32, 8, 128)),
    "Qwen2.5-0.5B": lambda: T.Qwen2Config(**sizes(896, 4864, 14, 2)),
    "Qwen2.5-7B": lambda: T.Qwen2Config(**sizes(3584, 18944, 28, 4)),
    "Qwen3-0.6B": lambda: T.Qwen3Config(**sizes(1024, 3072, 16, 8, 128)),
    "Qwen3-14B": lambda: T.Qwen3Config(**sizes(5120, 17408, 40, 8, 128)),
    "gemma-2b": lambda: T.GemmaConfig(**sizes(2048, 16384, 8, 1, 256)),
    "gemma-2-9b": lambda: T.Gemma2Config(**sizes(3584, 14336, 16, 8, 256)),
    "gemma-2-27b": lambda: T.Gemma2Config(**sizes(4608, 36864, 32, 16, 128)),
    "gemma-3-270m": lambda: T.Gemma3TextConfig(**sizes(640, 2048, 4, 1, 256)),
    "gemma-3-27b": lambda: T.Gemma3TextConfig(
        **sizes(5376, 21504, 32, 16, 128, query_pre_attn_scalar=168, sliding_window=1024)
    ),
    "phi-3-mini": lambda: T.Phi3Config(**sizes(3072, 8192, 32, 32), pad_token_id=0),
    "phi-4-mini": lambda: T.Phi3Config(
        **sizes(3072, 8192, 24, 8, partial_rotary_factor=0.75), pad_token_id=0
    ),
    "phi-2": lambda: T.PhiConfig(**sizes(2560, 10240, 32, 32, partial_rotary_factor=0.4)),
    "BitNet-2B": lambda: T.BitNetConfig(**sizes(2560, 6912, 20, 5)),
    "OLMo-2-7B": lambda: T.Olmo2Config(**sizes(4096, 11008, 32, 32)),
    "OLMo-2-32B": lambda: T.Olmo2Config(**sizes(5120, 27648, 40, 8)),
    "glm-4-9b": lambda: T.GlmConfig(**sizes(4096, 13696, 32, 2, 128), pad_token_id=0),
    "GLM-4-0414-32B": lambda: T.Glm4Config(**sizes(6144, 23040, 48, 8, 128), pad_token_id=0),
    "granite-3.3-2b": lambda: T.GraniteConfig(
        **sizes(
            2048,
            8192,
            32,
            8,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
        )
    ),
    "opt-125m": lambda: T.OPTConfig(
        **TWO, hidden_size=768, ffn_dim=3072, num_attention_heads=12, word_embed_proj_dim=768
    ),
    "opt-350m": lambda: T.OPTConfig(
        **TWO,
        hidden_size=1024,
        ffn_dim=4096,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "galactica": lambda: T.OPTConfig(  # GELU: fc2 folds nowhere
        **TWO,
        hidden_size=768,
        ffn_dim=3072,
        num_attention_heads=12,
        word_embed_proj_dim=768,
        activation_function="gelu",
    ),
    "falcon-7b": lambda: falcon(4544, 71),
    "falcon-rw-1b": lambda: falcon(2048, 32, multi_query=False, parallel_attn=True),
    "LFM2-1.2B": lambda: T.Lfm2Config(
        **{**sizes(2048, 12288, 32, 8), "num_hidden_layers": 3},
        layer_types=["conv", "conv", "full_attention"],
    ),
    "Qwen3-Next-80B": lambda: T.Qwen3NextConfig(
        **sizes(2048, 5120, 16, 2, 256),
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
    ),
    "DeepSeek-V3": lambda: T.DeepseekV3Config(
        **sizes(7168, 18432, 128, 128), first_k_dense_replace=2
    ),
    "Nemotron-H-8B": lambda: T.NemotronHConfig(
        vocab_size=512,
        hidden_size=4096,
        intermediate_size=21504,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
    ),
}
ODD = {  # hidden sizes that no power of two divides, one head, heads a few channels wide
    "llama-one-head": lambda: T.LlamaConfig(**sizes(96, 132, 1, 1)),
    "llama-60": lambda: T.LlamaConfig(**sizes(60, 100, 6, 2)),
    "llama-wide-heads": lambda: T.LlamaConfig(**sizes(96, 200, 6, 6, 24)),
    "llama-untied-groups": lambda: T.LlamaConfig(**sizes(192, 320, 12, 4, 48)),
    "llama-biases": lambda: T.LlamaConfig(
        **sizes(128, 192, 4, 2), attention_bias=True, mlp_bias=True
    ),
    "phi3-grouped": lambda: T.Phi3Config(**sizes(120, 168, 6, 3), pad_token_id=0),
    "qwen3-narrow-heads": lambda: T.Qwen3Config(**sizes(80, 112, 5, 1, 8)),
    "glm-groups": lambda: T.GlmConfig(**sizes(144, 216, 6, 6, 24), pad_token_id=0),
    "gemma3-one-head": lambda: T.Gemma3TextConfig(**sizes(72, 96, 1, 1, 40)),
    "lfm2-biases": lambda: T.Lfm2Config(
        **sizes(64, 96, 4, 2), layer_types=["conv", "full_attention"], conv_bias=True
    ),
    "lfm2-72": lambda: T.Lfm2Config(
        **sizes(72, 96, 3, 1),
        layer_types=["full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    ),
}
CONFIGS = {**FAMILIES, **PUBLISHED, **ODD}


@pytest.mark.parametrize("name", CONFIGS)
def test_traced_is_what_was_written_by_hand(name):
    config = CONFIGS[name]()
    found, wanted = tracing.described(config), described(config)
    assert found.frame == wanted.frame
    assert found.of_layers == wanted.of_layers
    for graph, hand in zip(found.kinds, wanted.kinds, strict=True):
        for part in fields(hand):
            assert getattr(graph, part.name) == getattr(hand, part.name), part.name


def test_every_family_by_hand_is_compared():
    assert {CONFIGS[n]().model_type for n in CONFIGS} == set(BY_HAND)


@pytest.mark.parametrize("groups", [8, 64])
def test_attention_with_sinks(groups):
    """gpt-oss: a sink in the softmax changes no channel of the values."""
    config = config_of(
        "gpt_oss", **sizes(2880, 2880, 64, groups, 64), layer_types=["full_attention"] * 2
    )
    hand = attention(config, entering(QKV, norm("input_layernorm"), "self_attn"))
    (graph,) = tracing.described(config).kinds
    assert graph.sites[:2] == hand.pop("sites")
    for part, value in hand.items():
        assert getattr(graph, part) == value, part


# --- bad input ------------------------------------------------------------------------------------


class OwnConfig(T.PretrainedConfig):
    """A model type that transformers does not know."""

    model_type = "lowbit_own"

    def __init__(self, hidden_size=64, num_hidden_layers=2, variant="plain", **more):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.variant, self.vocab_size = variant, 300
        super().__init__(**more)


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.variant, width = config.variant, config.hidden_size
        made = nn.LayerNorm if config.variant == "looks ahead" else nn.RMSNorm
        self.norm, self.second = made(width), made(width)
        if self.variant == "tied norms":
            self.second.weight = self.norm.weight
        if self.variant == "norm of a norm":
            self.second = Behind(width)
        if self.variant == "norm of heads":
            self.second = OfHeads(width)
        self.up, self.gate, self.other = (nn.Linear(width, 2 * width, bias=False) for _ in range(3))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x, **_):
        n = self.norm(x)
        if self.variant == "half-way":
            self.down(n)
        if self.variant == "looks ahead":
            n = n + n.flip(1)
        m = n if self.variant == "one norm" else self.second(x)
        if self.variant == "norm twice":
            m = self.norm(x + n)
        if self.variant == "norm of a norm":
            n = m = self.second(n)
        return x + self.down(self.up(n) * self.gate(m) + self.other(m))


class Behind(nn.Module):
    """Has a gain, and hands on what it is given."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x


class OfHeads(nn.RMSNorm):
    """Takes rows of tokens, and no vectors."""

    def forward(self, x):
        return super().forward(x) * x.shape[2]


class Apart(nn.Module):
    """Holds blocks, and no embedding."""

    def __init__(self, made):
        super().__init__()
        self.blocks = nn.ModuleList(made)


class OwnModel(T.PreTrainedModel, T.GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        made = [OwnBlock(config) for _ in range(config.num_hidden_layers)]
        self.blocks = nn.Sequential(*made) if config.variant == "no list" else nn.ModuleList(made)
        if config.variant == "apart":
            self.inner = Apart(made)
            self.blocks = None
        if config.variant == "two lists":
            self.more = nn.ModuleList(OwnBlock(config) for _ in made)
        self.last = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.variant == "buffer":
            self.register_buffer("angles", torch.ones(4), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        if hasattr(module, "angles"):
            module.angles.fill_(self.config.theta)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return None if self.config.variant == "no head" else self.head

    def forward(self, input_ids=None, use_cache=None, **_):
        x, variant = self.embed(input_ids), self.config.variant
        blocks = list(self.blocks or self.inner.blocks)
        if variant == "two lists":
            blocks += self.more
        if variant == "again":
            blocks = blocks * 2
        if variant == "backwards":
            blocks = blocks[::-1]
        if variant == "left out":
            blocks = blocks[:-1]
        first = x
        for block in blocks:
            y = block(x, beside=first) if variant == "beside" else block(x)
            x = x + 0.5 * (y - x) if variant == "half added" else y
            x = 0.5 * x if variant == "scaled" else x
        return self.head(self.last(x))


@pytest.fixture(scope="module")
def own():
    T.AutoConfig.register("lowbit_own", OwnConfig)
    T.AutoModelForCausalLM.register(OwnConfig, OwnModel)
    yield lambda variant, **more: OwnConfig(variant=variant, **more)
    T.CONFIG_MAPPING._extra_content.pop("lowbit_own")
    T.AutoModelForCausalLM._model_mapping._extra_content.pop(OwnConfig)


def test_a_family_of_nobody_is_traced(own):
    (graph,) = tracing.described(own("plain")).kinds
    assert graph.sites == (
        Site(("up",), norm("norm"), "up", residual=True),
        Site(("gate", "other"), norm("second"), "", residual=True),
        Site(("down",), None, "down"),
    )
    assert graph.writers == ("down",) and not graph.dropped


@pytest.mark.parametrize(
    "variant, kept",
    [
        ("one norm", {("up", "gate", "other"): "norm"}),
        ("norm twice", {("up",): None, ("gate", "other"): None}),
        ("tied norms", {("up",): None, ("gate", "other"): None}),
        ("norm of a norm", {("up", "gate", "other"): "norm"}),
    ],
)
def test_two_norms_with_one_output_are_folded_once_or_not_at_all(own, variant, kept):
    (graph,) = tracing.described(own(variant)).kinds
    found = {s.reads: s.source and s.source.module for s in graph.sites[:-1]}
    assert found == kept
    assert bool(graph.dropped) == (None in kept.values())


@pytest.mark.parametrize(
    "family, more, linear, source, heads",
    [
        ("olmo", {"clip_qkv": 8.0}, "self_attn.o_proj", None, False),
        ("olmo", {"clip_qkv": None}, "self_attn.o_proj", "self_attn.v_proj", True),
        ("hy_v4", {"swiglu_limit": 10.0}, "mlp.experts.1.down_proj", None, False),
        (
            *("hy_v4", {"swiglu_limit": 1e9}),
            *("mlp.experts.1.down_proj", "mlp.experts.1.up_proj", False),
        ),
        ("deepseek_v4", {}, "mlp.shared_experts.down_proj", None, False),
    ],
)
def test_what_a_limit_cuts_is_not_folded(family, more, linear, source, heads):
    """The narrow copy's own numbers are far below the limits of real models."""
    graph = tracing.described(config_of(family, num_key_value_heads=4, **more)).kinds[-1]
    (site,) = (s for s in graph.sites if linear in s.reads)
    assert (site.source and site.source.module) == source
    assert (graph.heads is not None) == heads


@pytest.mark.parametrize(
    "values, kinds",
    [
        ([1.0, 1.0, 1.0], 1),
        ([math.inf, math.inf, 7.0], 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 1),  # follows from the place
        ([0.1, 0.2, 0.3, 0.4, 0.4], 4),
    ],
)
def test_blocks_with_other_limits_are_of_another_kind(values, kinds):
    blocks = [torch.nn.Sequential(torch.nn.Identity()) for _ in values]
    for block, value in zip(blocks, values, strict=True):
        block[0].limit = value
    assert len(set(limits(blocks))) == kinds


@pytest.mark.parametrize("factor, said", [(1.0, False), (1.001, False), (1.1, True)])
def test_a_rewrite_that_changes_the_block_is_remarked(tmp_path, factor, said):
    stream = ModelStream(save_tiny(tmp_path, dtype=torch.float32))
    ids = torch.randint(3, 280, (2, 8), generator=torch.Generator().manual_seed(0))
    block = opened(stream, load_recipe("rtn", scheme=parse_scheme("W4A16g16")), ids, 0)
    name = "mlp.down_proj.weight"
    done = checked(block, block.with_weights({name: block.weights[name] * factor}))
    assert (done.notes["fold_error"] > 0) == (factor > 1)
    assert any("computes something else" in r for r in done.notes.get("trouble", ())) == said


@pytest.mark.parametrize(
    "config, said",
    [
        (lambda own: own("no list"), r"'lowbit_own' model in which no list of blocks was found"),
        (lambda own: own("plain", num_hidden_layers=0), r"'lowbit_own' model without a single"),
        (lambda own: own("half-way"), r"narrow copy does not run, .*: 'blocks.0.down' says mat1"),
        (lambda own: own("buffer"), r"cannot compute the buffers of .* AttributeError .*'theta'"),
        (lambda own: own("looks ahead"), r"whose blocks look at tokens to come"),
        (lambda own: own("again"), r"that runs block 0 2 times in a pass"),
        (lambda own: own("left out"), r"that runs block 1 0 times in a pass"),
        (lambda own: own("backwards"), r"gives block 1 something else than what block 0 returns"),
        (lambda own: own("half added"), r"gives block 1 something else than what block 0 returns"),
        (lambda own: own("scaled"), r"gives block 1 something else than what block 0 returns"),
        (
            lambda own: own("apart"),
            r"whose blocks lie in 'inner', and its input embedding does not",
        ),
        (lambda own: own("no head"), r"'lowbit_own' model without an output head"),
        (lambda own: own("two lists"), r"with blocks in 'blocks' .* outside of it \('more.0'\)"),
        (
            lambda own: config_of("hrm_text"),
            r"in 'model.L_module.layers' and .* \('model.H_module.layers.0'\)",
        ),
        *(
            (lambda own, kind=kind: config_of(kind), r"whose blocks look at tokens to come")
            for kind in ("roberta-prelayernorm", "xlm-roberta-xl", "megatron-bert")
        ),
        (
            lambda own: config_of("megatron-bert", is_decoder=True),
            r"whose blocks lie in 'bert.encoder', and its input embedding does not",
        ),
        (
            lambda own: T.DeepseekV2Config(num_hidden_layers=2),
            r"cannot be found: 'model.layers.\d.mlp.gate' says TypeError topk",
        ),
        (
            lambda own: config_of(
                "zamba2",
                num_hidden_layers=4,
                layers_block_type=["linear_attention", "hybrid"] * 2,
                num_mem_blocks=1,
                n_mamba_heads=4,
                mamba_headdim=32,
            ),
            r"block 3 of 'zamba2' has the weights of block 1 \('shared_transformer\..*'\)",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused_in_a_sentence(own, config, said):
    with pytest.raises(LowbitError, match=said):
        tracing.described(config(own))


def test_what_fails_under_study_is_named(own, monkeypatch):
    """A block that runs inside its model, and not when something in it is changed."""

    def forward(self, x, **_):
        n = self.norm(x)
        if not torch.equal(self.norm(x), n * 1.0) or self.calls > 3:
            raise IndexError("no more")
        self.calls += 1
        return x + self.down(self.up(n))

    monkeypatch.setattr(OwnBlock, "calls", 0, raising=False)
    monkeypatch.setattr(OwnBlock, "forward", forward)
    with pytest.raises(LowbitError, match=r"cannot be found: 'blocks.0' says no more"):
        tracing.described(own("plain", hidden_size=128))


def test_what_fails_while_readers_are_sought_is_named(own, monkeypatch):
    """A block that runs inside its model, and not by itself on what it is given there."""
    calls = []

    def forward(self, x, beside=None):
        calls.append(self)
        if len(calls) > 1 + 2 * 2:  # one of a kind, then both on two rows of tokens
            raise IndexError("no more")
        return x + self.down(self.up(self.norm(x)) + self.gate(beside))

    monkeypatch.setattr(OwnBlock, "forward", forward)
    with pytest.raises(LowbitError, match=r"cannot be found: 'blocks.0' says no more"):
        tracing.described(own("beside"))


def test_a_norm_of_heads_is_none_of_the_stream():
    norm = OfHeads(8)
    assert offset_of(norm) is None and not is_centred(norm, 8)
    assert offset_of(nn.RMSNorm(8)) == 0.0 and offset_of(Behind(8)) is None


def test_blocks_with_norms_of_heads_are_traced(own):
    (graph,) = tracing.described(own("norm of heads")).kinds
    assert graph.linears == ("up", "gate", "other", "down")
    (graph,) = tracing.described(config_of("xlstm", num_hidden_layers=2)).kinds
    assert "ffn.proj_down" in graph.linears


def test_a_stream_that_is_halved_with_what_is_added_to_it_is_none_that_changes():
    """RWKV in half precision, which computes the same."""
    sizes = dict(vocab_size=300, hidden_size=64, num_hidden_layers=4)
    every, never = (
        tracing.described(T.RwkvConfig(**sizes, rescale_every=often)) for often in (2, 0)
    )
    assert every == never and every.frame.plain


def test_narrow_copies_that_a_class_refuses_are_made_wider():
    """Gemma 3 checks that hidden channels divide into heads: 5376 / 16 into 32 do not."""
    config = CONFIGS["gemma-3-27b"]()
    assert divisor(config) == 16 and build_tiny_of(config).by == 8


def build_tiny_of(config):
    return build_tiny(config, "gemma", "model.layers", (0, 0))


@pytest.mark.parametrize("said", ["my_new", None])
def test_a_config_that_asks_for_its_own_code_is_refused(tmp_path, said):
    made = {"auto_map": {"AutoConfig": "configuration_my.MyConfig"}, "architectures": ["MyNew"]}
    (tmp_path / "config.json").write_text(json.dumps({**made, "model_type": said}))
    (tmp_path / "configuration_my.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(LowbitError, match=r"\(auto_map: configuration_my.MyConfig\).*stays off"):
        read_config(str(tmp_path))
