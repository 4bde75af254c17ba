"""Tiny models of every family with a tokenizer, made on the spot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lowbit.methods._rounding import Adam
from lowbit.methods._rounding._adam import BETAS
from lowbit.model.beside import Beside
from lowbit.model.context import silent
from lowbit.model.model import Model, Streams
from lowbit.model.outline import Outline
from lowbit.model.ranks import ALONE
from lowbit.plan import HELD_OUT, Plan, Setting, plan_for
from lowbit.stages import Blocks, Entered
from lowbit.stages import apply_methods as _applied

TEXT = (
    "def add(a, b):\n    return a + b\n\nclass Stack:\n    def push(self, item):\n        "
    "self.items.append(item)\n" * 400
)
COMMON = dict(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA = dict(COMMON, intermediate_size=96, num_key_value_heads=2)
FAMILIES = {
    "llama": lambda: T.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-mha": lambda: T.LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 4}, tie_word_embeddings=False
    ),
    "mistral": lambda: T.MistralConfig(**LLAMA, sliding_window=16),
    "qwen2": lambda: T.Qwen2Config(**LLAMA),
    "qwen3": lambda: T.Qwen3Config(**LLAMA, head_dim=16),
    "gemma": lambda: T.GemmaConfig(**LLAMA, head_dim=16),
    "phi3": lambda: T.Phi3Config(**{**LLAMA, "num_key_value_heads": 4}),
    "bitnet": lambda: T.BitNetConfig(**LLAMA),
    "opt": lambda: T.OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64),
    "opt-post-norm": lambda: T.OPTConfig(
        **COMMON, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
}


def projected(soft, block):
    """A scalar of a block's soft weights: a random direction through all of them. And its gradients
    by (nu, v) of each bucket.
    """
    target = {k: torch.randn_like(block.weights[k]) for k in soft.keys}

    def loss():
        w = soft.weights()
        return sum((w[k].double() * target[k].double()).sum() for k in soft.keys)

    loss()
    return loss, slopes(soft, [target[k] for k in soft.keys])


def slopes(soft, gradients):
    """The gradients by (nu, v) of each bucket, read off Adam's first moments after one step from
    zero; no variable is moved.
    """
    saved = soft.snapshot()
    soft.start()
    soft.descend(gradients, Adam(1e-2).next(), 0.0)
    soft.restore(saved)
    return [
        (b._nu_moments.first / (1 - BETAS[0]), b._v_moments.first / (1 - BETAS[0]))
        for b in soft.buckets
    ]


def assert_slopes(loss, variable: torch.Tensor, grad: torch.Tensor) -> None:
    """A few elements of a gradient against central differences of ``loss()``."""
    for at in [(0, 0), (3, 0), (7, variable.shape[1] - 1), (20, variable.shape[1] // 2)]:
        keep, eps = variable[at].item(), 1e-2
        variable[at] = keep + eps
        up = loss()
        variable[at] = keep - eps
        down = loss()
        variable[at] = keep
        assert abs(float((up - down) / (2 * eps)) - float(grad[at])) < 2e-3 + 2e-2 * abs(
            float(grad[at])
        )


def tiny_tokenizer(bos: bool = True) -> T.PreTrainedTokenizerFast:
    """Bytes and no merges to speak of; with ``bos`` every text starts with id 1, as Llama
    tokenizers have it.
    """
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    if not bos:
        return T.PreTrainedTokenizerFast(tokenizer_object=tok)
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(
    folder: Path,
    family: str | T.PretrainedConfig = "llama",
    dtype: torch.dtype = torch.bfloat16,
    **options: object,
) -> Path:
    """A random model of a family, or of a configuration, with norms and biases away from their
    defaults, so that a wrong fold shows.
    """
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(
        FAMILIES[family]() if isinstance(family, str) else family
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif "embed" not in name:
                p.mul_(3)
    model.to(dtype).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


EVALUATED = (  # keys of an evaluation
    *("perplexity", "nll", "tokens", "windows", "length", "batch", "kl", "top1"),
    *("kl_median", "kl_p99", "kl_max", "perplexity_error", "kl_error", "top1_error"),
)


# --- a recipe on a model, without an artifact -----------------------------------------------------


def planned(stream, recipe, samples=8, length=24):
    """The plan of a recipe for a model that is open."""
    return plan_for(stream, recipe, samples, length)


def needs_of(config, recipe, rows, length, device, dtype, ranks=1, here=1):
    """What one process of a run holds, ``rows`` being all that pass."""
    setting = Setting(rows - HELD_OUT, length, device, dtype, ranks=ranks, here=here)
    return Plan.of(Outline.of(config), recipe, setting).memory


def model_of(stream, recipe, rows=None, **context) -> Model:
    """The model that stages begin with, on rows of tokens that matter to some of them only."""
    rows = torch.zeros(8, 24, dtype=torch.int64) if rows is None else rows
    return planned(stream, recipe, *rows.shape).model(stream, rows, **context)


def staged(stream, recipe, rows=None, seed=0, **context) -> Model:
    """The model as the stages before the blocks leave it."""
    model = model_of(stream, recipe, rows, seed=seed, **context)
    for stage in planned(stream, recipe).stages:
        model = stage(model)
    return model


def begin(stream, i, recipe, streams, kwargs, seed, announce=silent):
    """A block of a model whose stages before the blocks are made, or are none."""
    return model_of(stream, recipe, seed=seed, announce=announce).begin(i, streams, kwargs)


def apply_methods(block, recipe):
    """A block quantized by a recipe."""
    return _applied(block, recipe.methods)


class Kept:
    """A `BlockStore` that tells what is finished, and stores nothing."""

    def __init__(self, told=lambda block: None):
        self._told = told

    def finished(self, i):
        return None

    def keep(self, i, block, seconds):
        self._told(block)
        return dict

    def loaded(self, i, block):
        raise AssertionError("nothing is stored")


def run(model: Model, streams: Streams, told=lambda block: None):
    """Quantize the blocks; yields what leaves each, after ``told`` was given it."""
    entered = Entered(model.rows[:1])  # not used: the streams are given
    walk = Blocks(entered, Kept(told)).walk(model, streams)
    del streams  # as a run lets go of what entered
    for _, after in walk:
        yield after


def opened(stream, recipe, ids, i=0):
    """Block i of a model on the embeddings of rows, on the first of which methods learn; earlier
    blocks run for what they leave beside their output.
    """
    x, own = stream.entering(ids)
    kwargs = stream.block_kwargs(ids.shape[1])
    streams = Streams(x, x, min(8, len(ids)), ranks=ALONE, beside=Beside(own, own))
    for j in range(i if stream.described.items else 0):
        context = begin(stream, j, recipe, streams, kwargs[j], 0).context
        beside = streams.beside.after(context.place, context.left, context.left)
        streams = replace(streams, beside=beside)
    return begin(stream, i, recipe, streams, kwargs[i], 0)
