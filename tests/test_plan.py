"""Plans from config.json alone: published sizes, parameter counts, bytes."""

import json

import pytest
import transformers as T
from helpers import FAMILIES

from lowbit.errors import LowbitError
from lowbit.plan import make_plan, read_config
from lowbit.presets import load_recipe
from lowbit.scheme import parse_scheme


def recipe(scheme):
    return load_recipe("tesseraq", scheme=parse_scheme(scheme))


def llama(hidden, inner, layers, heads, vocab):
    return T.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        vocab_size=vocab, tie_word_embeddings=False, max_position_embeddings=4096,
    )


def test_sizes_of_the_large_llamas():
    big = make_plan(llama(8192, 28672, 80, 64, 128256), recipe("W2A16g128"))
    assert big.original / 2**30 == pytest.approx(131.4, abs=0.1)
    assert big.artifact / 2**30 == pytest.approx(21, abs=0.5)
    huge = make_plan(llama(16384, 53248, 126, 128, 128256), recipe("W2A16g128"))
    assert huge.original / 2**30 == pytest.approx(756, abs=1)
    # 114 is published with 16-bit zero points (2.25 bits per weight); packed ones take 2.14.
    assert huge.bits_per_weight == pytest.approx(2 + 18 / 128, abs=1e-3)
    assert (huge.artifact + huge.quantized * (2.25 - huge.bits_per_weight) / 8) / 2**30 == pytest.approx(113.3, abs=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts_are_the_models(family):
    config = FAMILIES[family]()
    model = T.AutoModelForCausalLM.from_config(config)
    assert make_plan(config, recipe("W2A16g16")).parameters == sum(p.numel() for p in model.parameters())


def test_bad_input(tmp_path):
    with pytest.raises(LowbitError, match=r"no config\.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llamma"}))
    with pytest.raises(LowbitError, match="cannot be read"):
        read_config(str(tmp_path))
    with pytest.raises(LowbitError, match="does not divide"):
        make_plan(FAMILIES["llama"](), recipe("W2A16g24"))
    with pytest.raises(LowbitError, match="mixture of experts"):
        make_plan(T.MixtralConfig(num_hidden_layers=1), recipe("W2A16g16"))


@pytest.mark.parametrize("change", [{"model_type": "falcon", "head_dim": 8}, {"num_attention_heads": "eight"}, {"model_type": "nonsense"}])
def test_configs_that_transformers_cannot_read(tmp_path, change):
    config = {**llama(64, 128, 2, 8, 300).to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowbitError, match="config.json cannot be read as a model config"):
        read_config(str(tmp_path))
