"""What each runtime says to a plan: every rule by which it refuses, and what it is given where it
accepts.
"""

import json
from dataclasses import replace

import pytest
import transformers as T
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid import Affine
from lowbit.grid.names import parse_scheme
from lowbit.model.graph import Described, Frame, Graph
from lowbit.plan import make_plan
from lowbit.plan.targets import TARGETS, Planned, check_target, demand, verdicts
from lowbit.recipe.presets import load_recipe

COMMON = dict(
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    vocab_size=320,
    max_position_embeddings=128,
)
CONFIGS = {
    "llama": lambda **more: T.LlamaConfig(
        **{**COMMON, "intermediate_size": 1536, "num_key_value_heads": 2, **more}
    ),
    "mistral": lambda **more: T.MistralConfig(
        **{
            **COMMON,
            "intermediate_size": 1536,
            "num_key_value_heads": 2,
            "sliding_window": 64,
            **more,
        }
    ),
    "qwen3": lambda **more: T.Qwen3Config(
        **{**COMMON, "intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64, **more}
    ),
    "phi3": lambda **more: T.Phi3Config(
        **{**COMMON, "intermediate_size": 1536, "num_key_value_heads": 2, "pad_token_id": 0, **more}
    ),
    "gemma": lambda **more: T.GemmaConfig(
        **{**COMMON, "intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64, **more}
    ),
    "bitnet": lambda **more: T.BitNetConfig(
        **{**COMMON, "intermediate_size": 1536, "num_key_value_heads": 2, **more}
    ),
    "opt": lambda **more: T.OPTConfig(
        **{**COMMON, "ffn_dim": 1536, "word_embed_proj_dim": 512, **more}
    ),
}
FULL = ("activations.symmetric=true", "activations.full_range=true", "activations.clip=1")


def say(target, scheme, recipe="rtn", *settings, family="llama", devices=1, **config):
    """The verdict on a model of 512 and 1536 inputs, with 8 heads of 64 and, OPT apart, 2 of keys
    and values.
    """
    chosen = load_recipe(recipe, scheme=parse_scheme(scheme), settings=settings)
    return make_plan(CONFIGS[family](**config), chosen, tensor_parallel=devices).verdict(target)


def refuses(verdict, *words):
    text = " ".join(verdict.reasons)
    assert not verdict.accepts and all(w in text for w in words), verdict
    assert not (verdict.format or verdict.weights or verdict.export or verdict.requires)
    with pytest.raises(LowbitError, match="will not load this"):
        demand(verdict)


def accepts(verdict, format_, requires="", export=None):
    assert verdict.accepts and verdict.format == format_ and requires in verdict.requires, verdict
    if export is not None:
        assert verdict.export == (f"lowbit export OUT -o DIR --to {export}" if export else "")
    demand(verdict)


# --- vLLM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, version",
    [
        ("W2A16g64sym", "0.25"),
        ("W3A16g64sym", "0.25"),
        ("W7A16g64sym", "0.25"),
        ("W4A16g128", "0.25"),
        ("W8A16", "0.25"),
        ("W2A16g64", "0.33"),
        ("W3A16g64", "0.33"),
        ("W5A16g64", "0.33"),
        ("W6A16", "0.33"),
        ("W7A16g32", "0.33"),
    ],
)
def test_vllm_takes_two_to_eight_bits_as_quantized(scheme, version):
    accepts(say("vllm", scheme), "compressed-tensors", f"vLLM {version} or newer", "")


def test_vllm_says_where_the_kernels_run():
    assert "CPU and ROCm take 4 and 8 bits only" in " ".join(say("vllm", "W2A16g64").notes)
    assert "CPU and ROCm take 4 and 8 bits too" in " ".join(say("vllm", "W4A16g64").notes)
    assert "Hopper" in " ".join(say("vllm", "W2A16g8").notes) and "Hopper" not in " ".join(
        say("vllm", "W2A16g16").notes
    )


def test_vllm_refuses_one_bit():
    refuses(say("vllm", "W1A16g64"), "2 to 8 bits")


@pytest.mark.parametrize("size", [4, 48, 96])
def test_vllm_takes_groups_of_a_power_of_two_from_8_on(size):
    refuses(
        say("vllm", f"W4A16g{size}", hidden_size=768, num_attention_heads=12),
        f"W4g{size}",
        "power of two from 8 on",
    )


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_fused_linears_must_share_a_grid(target):
    for name, fused in (("v_proj", "q_proj, k_proj, v_proj"), ("gate_proj", "gate_proj, up_proj")):
        refuses(
            say(target, "W4A16g64sym", "rtn", f"overrides.*.{name}=W4A16g128sym"),
            f"one layer of {fused}",
            "the same scheme",
        )
    accepts(
        say(target, "W4A16g64sym", "rtn", "overrides.*.down_proj=W8A16g128sym"),
        "compressed-tensors",
    )
    accepts(
        say(target, "W4A16g64sym", "rtn", "overrides.*.layers.1.*=W8A16g64sym"),
        "compressed-tensors",
    )


def test_a_group_size_must_divide_a_devices_share_of_the_inputs():
    accepts(say("vllm", "W4A16g128", devices=2), "compressed-tensors")
    accepts(say("vllm", "W4A16", devices=4), "compressed-tensors")
    refuses(
        say("vllm", "W4A16g128", devices=8),
        "64 of the 512 inputs of 'model.layers.0.self_attn.o_proj'",
        "groups of 128",
        "may be 1, 2, 4.",
    )
    refuses(say("vllm", "W4A16g256", devices=4), "128 of the 512 inputs", "may be 1, 2.")
    # q, k, v, gate and up are divided by their outputs: their groups need not fit a share.
    accepts(
        say(
            "vllm",
            "W4A16g64sym",
            "rtn",
            *(f"overrides.*.{n}_proj=W4A16g512sym" for n in ("q", "k", "v", "gate", "up")),
            devices=4,
        ),
        "compressed-tensors",
    )


def test_heads_must_divide_among_the_devices():
    refuses(
        say("vllm", "W4A16g64", devices=3), "8 attention heads", "3 devices", "may be 1, 2, 4, 8."
    )
    refuses(
        say(
            "vllm",
            "W4A16g64",
            devices=4,
            num_key_value_heads=6,
            num_attention_heads=24,
            hidden_size=1536,
        ),
        "6 key and value heads",
    )
    # Two of keys and values, repeated.
    accepts(say("vllm", "W4A16g64", devices=4), "compressed-tensors")
    accepts(say("vllm", "W4A16g64", family="opt", devices=4), "compressed-tensors")


def test_a_devices_share_of_the_inputs_must_end_with_a_word():
    refuses(
        say("vllm", "W3A16g8sym", devices=8, intermediate_size=1472),
        "184 of the 1472 inputs of 'model.layers.0.mlp.down_proj'",
        "inside a word",
    )
    accepts(say("vllm", "W4A16g8sym", devices=8, intermediate_size=1472), "compressed-tensors")


@pytest.mark.parametrize(
    "family, linear", [("llama", "self_attn.k_proj"), ("phi3", "self_attn.qkv_proj")]
)
def test_a_devices_share_of_zero_points_must_end_with_a_word(family, linear):
    # 84 outputs of 2 bits.
    one = dict(
        family=family,
        devices=2,
        num_attention_heads=8,
        num_key_value_heads=1,
        hidden_size=672,
        head_dim=84,
    )
    refuses(say("vllm", "W2A16", **one), f"84 outputs of 'model.layers.0.{linear}'", "zero points")
    # Only asymmetric weights have them in the file.
    accepts(say("vllm", "W2A16sym", **one), "compressed-tensors")


def test_vllm_takes_activations_that_compressed_tensors_carries():
    accepts(say("vllm", "W8A8sym", "smoothquant"), "compressed-tensors", "0.33", "")
    accepts(say("vllm", "W4A4sym", "rtn", *FULL), "compressed-tensors", "0.33", "")
    assert "8.0" in " ".join(say("vllm", "W8A8sym", "smoothquant").notes)
    refuses(say("vllm", "W8A8", "rtn"), "under symmetric weights", "activations.full_range=true")
    refuses(say("vllm", "W4A6sym", "rtn", *FULL), "4 or 8 bits")
    refuses(say("vllm", "W8A8sym", "llm-int8"), "crossquant-deploy")
    refuses(say("vllm", "W8A4sym", "rtn", *FULL), "weights of at most 4 bits")
    # Transformers would err.
    accepts(
        say("vllm", "W8A8sym", "smoothquant", family="opt"),
        "compressed-tensors",
        "0.33",
        "compressed-tensors",
    )


def test_vllm_takes_rotations_that_the_export_can_name():
    accepts(
        say("vllm", "W4A16g64", "quarot", "quarot.across_heads=false"),
        "compressed-tensors",
        "0.33",
        "compressed-tensors",
    )
    accepts(
        say("vllm", "W4A16g64", "quarot", "quarot.online=false"), "compressed-tensors", "0.25", ""
    )
    refuses(say("vllm", "W4A16g64", "quarot"), "across heads", "--set quarot.across_heads=false")
    refuses(
        say("vllm", "W4A16g64", "quarot", "quarot.across_heads=false", family="opt"),
        "a bias",
        "--set quarot.online=false",
    )
    refuses(
        say("vllm", "W4A16g64", "quarot", "quarot.across_heads=false", devices=2), "one device only"
    )
    accepts(
        say("vllm", "W4A16g64", "quarot", "quarot.online=false", devices=2), "compressed-tensors"
    )
    assert say("vllm", "W4A16g64", "quarot", "quarot.across_heads=false").notes == (
        "tensor parallel degrees that fit: 1",
    )


# --- what only this library reads -----------------------------------------------------------------


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp", "mlx"])
def test_servers_take_uniform_weights_and_no_cache(target):
    refuses(
        say(target, "W2A16", "claq"),
        "is on W2 codebook per column",
        "would fit" if target == "llama.cpp" else "uniform weights",
    )
    refuses(say(target, "W4A16KV4g64"), "keys and values", "leave KV4 out")
    grid = load_recipe("claq-or", scheme=parse_scheme("W2A16"))
    planned = make_plan(CONFIGS["llama"](), replace(grid, grid=Affine(4, 64))).verdict(target)
    refuses(planned, "claq.outlier_bits=0")


@pytest.mark.parametrize("target", ["sglang", "llama.cpp", "mlx"])
def test_other_servers_take_no_activations_and_no_rotations(target):
    refuses(
        say(target, "W8A8g64sym", "rtn", *FULL), "no quantized activations", "A16 instead of A8"
    )
    refuses(say(target, "W4A16g64", "quarot"), "quarot.online=false")
    assert say(target, "W4A16g64", "quarot", "quarot.online=false").accepts


def test_a_kind_of_grid_that_nobody_knows_is_answered_by_all():
    class Other:
        bits, group_size = 2, 16

        def __str__(self):
            return "a strange grid"

    config = CONFIGS["llama"]()
    own = load_recipe("rtn", scheme=parse_scheme("W4A16"))
    shapes = {"model.layers.0.self_attn.q_proj": (512, 512)}
    planned = Planned(
        replace(own, grid=Other()),
        shapes,
        Described(Frame("model", "model.layers"), (Graph(()),), (0,)),
        config,
        beyond="a strange grid",
    )
    said = {v.runtime.lower(): v for v in verdicts(planned)}
    assert list(said) == list(TARGETS) and said["transformers"].accepts
    for target in ("vllm", "sglang", "llama.cpp", "mlx"):
        refuses(said[target], "a strange grid")


# --- SGLang ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, format_",
    [
        ("W4A16g64", "compressed-tensors"),
        ("W4A16", "compressed-tensors"),
        ("W8A16g128sym", "compressed-tensors"),
        ("W8A16g64", "gptq_v2"),
        ("W2A16g64sym", "gptq"),
        ("W3A16g64sym", "gptq"),
        ("W4A16g256sym", "gptq"),
        ("W2A16g64", "gptq_v2"),
        ("W3A16", "gptq_v2"),
        ("W2A16g16", "gptq_v2"),
    ],
)
def test_sglang_gets_gptq_where_its_compressed_tensors_ends(scheme, format_):
    accepts(
        say("sglang", scheme), format_, "0.5.23", "" if format_ == "compressed-tensors" else format_
    )


@pytest.mark.parametrize("bits", [1, 5, 6, 7])
def test_sglang_refuses_other_bits(bits):
    refuses(say("sglang", f"W{bits}A16g64"), "GPTQ with 2, 3, 4 and 8 bits")


@pytest.mark.parametrize(
    "scheme", ["W4A16g16", "W3A16g16sym", "W8A16g16", "W2A16g8", "W2A16g192", "W4A16g96"]
)
def test_sglang_refuses_groups_that_its_kernels_do_not_step_through(scheme):
    refuses(
        say("sglang", scheme, hidden_size=768, num_attention_heads=12),
        "step through",
        "g64 or g128",
    )


def test_gptq_packs_32_at_a_time():
    refuses(say("sglang", "W2A16", intermediate_size=1000), "packs 32 weights at a time")


def test_sglang_finds_no_exceptions_among_fused_linears():
    settings = ["overrides.*.layers.1.self_attn.?_proj=W4A16g64sym"]
    refuses(
        say("sglang", "W2A16g64sym", "rtn", *settings),
        "most linears are W2g64sym",
        "o_proj and down_proj",
    )
    accepts(
        say(
            "sglang",
            "W2A16g64sym",
            "rtn",
            "overrides.*.down_proj=W4A16g64sym",
            "overrides.*.o_proj=W3A16g64sym",
        ),
        "gptq",
    )
    accepts(say("vllm", "W2A16g64sym", "rtn", *settings), "compressed-tensors")


def test_sglang_divides_among_devices():
    accepts(say("sglang", "W2A16g64", devices=8), "gptq_v2")
    refuses(say("sglang", "W2A16g128", devices=8), "groups of 128", "may be 1, 2, 4.")
    refuses(say("sglang", "W4A16g64", devices=3), "8 attention heads")
    # GPTQ packs zero points along the outputs of symmetric weights too.
    mixed = ("W3A16sym", "rtn", "overrides.*.down_proj=W8A16sym")
    refuses(
        say("sglang", *mixed, devices=4, intermediate_size=1056),
        "264 outputs of 'model.layers.0.mlp.gate_proj'",
        "3-bit zero points",
    )
    accepts(say("vllm", *mixed, devices=4, intermediate_size=1056), "compressed-tensors")


# --- llama.cpp ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, kind",
    [
        ("W2A16g64sym", "Q2_0"),
        ("W2A16g128sym", "Q2_0"),
        ("W2A16sym", "Q2_0"),
        ("W2A16g16", "Q2_K"),
        ("W2A16g128", "Q2_K"),
        ("W1A16g64", "Q2_K"),
        ("W3A16g16sym", "Q3_K"),
        ("W4A16g32sym", "Q4_0"),
        ("W4A16g32", "Q4_K"),
        ("W4A16", "Q4_K"),
        ("W8A16g32sym", "Q8_0"),
        ("W8A16sym", "Q8_0"),
        ("W5A16g32sym", "Q6_K"),
        ("W6A16g64sym", "Q6_K"),
        ("W7A16g64sym", "Q8_0"),
    ],
)
def test_llama_cpp_gets_the_block_type_that_the_export_chooses(scheme, kind):
    verdict = say("llama.cpp", scheme)
    accepts(verdict, "gguf", "", "gguf")
    assert verdict.weights.startswith(f"{kind} (")
    assert (
        ("August 2026" in verdict.requires)
        == (kind == "Q2_0")
        == any("type 42" in n for n in verdict.notes)
    )


@pytest.mark.parametrize(
    "scheme, words, better",
    [
        ("W2A16g8", "fits into no type", "W2A16g64"),
        ("W3A16g64", "--to gguf:q4_k", "W3A16g64sym"),
        ("W4A16g16", "groups of 16", "W4A16g64"),
        ("W8A16g64", "no type", "W8A16g64sym"),
        ("W5A16g64", "no type", "W5A16g64sym"),
        ("W2A16g32sym", "--to gguf:q4_0 puts the same codes into 4.5 bits", "W2A16g64sym"),
        ("W4A16g16sym", "6.5625 bits", "W4A16g64sym"),
    ],
)
def test_llama_cpp_refuses_what_no_type_holds_and_names_what_would_fit(scheme, words, better):
    refuses(say("llama.cpp", scheme), words, f"Scheme {better} would fit.")


@pytest.mark.parametrize(
    "scheme, words", [("W4A16g32", "Q4_1"), ("W4A16g32sym", "Q4_0"), ("W2A16g64sym", "Q2_0")]
)
def test_rows_are_made_of_whole_blocks(scheme, words):
    # No multiples of 256.
    narrow = say(
        "llama.cpp",
        scheme,
        hidden_size=448,
        num_attention_heads=7,
        num_key_value_heads=1,
        intermediate_size=1216,
    )
    accepts(narrow, "gguf")
    assert narrow.weights.startswith(words) and ";" not in narrow.weights


@pytest.mark.parametrize(
    "scheme, words",
    [
        ("W2A16g64", "Scheme W2A16g64sym would fit."),
        ("W3A16g64sym", "Scheme W4A16g64sym would fit."),
    ],
)
def test_no_larger_type_is_taken_unasked(scheme, words):
    refuses(
        say(
            "llama.cpp",
            scheme,
            hidden_size=448,
            num_attention_heads=7,
            num_key_value_heads=1,
            intermediate_size=1216,
        ),
        "256 inputs",
        words,
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_act": "gelu"}, "gates with SiLU"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic'",
        ),
    ],
)
def test_llama_cpp_refuses_models_that_it_computes_otherwise(change, words):
    refuses(say("llama.cpp", "W4A16g32", **change), words, "another runtime")


@pytest.mark.parametrize(
    "kind, bits", [("q2_k", "2.625"), ("q3_k", "3.4375"), ("q4_k", "4.5"), ("q6_k", "6.5625")]
)
def test_k_quants_are_llama_cpps_own(kind, bits):
    verdict = say("llama.cpp", f"gguf:{kind}")
    accepts(verdict, "gguf", export="gguf")
    assert verdict.weights == f"{kind.upper()} ({bits} bits, exact)"
    accepts(say("transformers", f"gguf:{kind}"), "lowbit", "this library", "")
    for target in ("vllm", "sglang", "mlx"):
        refuses(say(target, f"gguf:{kind}"), f"is on gguf:{kind}, and")


def test_llama_cpp_holds_different_types_in_one_file():
    verdict = say("llama.cpp", "W2A16g64sym", "rtn", "overrides.*.v_proj=W4A16g32sym")
    accepts(verdict, "gguf", "August 2026")
    assert (
        "Q2_0 (2.25 bits, exact) in 12 linears; Q4_0 (4.5 bits, exact) in 2 linears"
        in verdict.weights
    )


@pytest.mark.parametrize("family", ["gemma", "bitnet", "opt"])
def test_gguf_is_written_of_families_that_llama_cpp_computes_alike(family):
    refuses(
        say("llama.cpp", "W4A16g32", family=family),
        f"'{family}'",
        "llama, mistral, qwen2, qwen3, gemma3_text, phi3",
        "another runtime",
    )
    accepts(say("llama.cpp", "W4A16g32", family="qwen3"), "gguf")


def test_llama_cpps_remarks_on_a_model_are_passed_on():
    assert any("64 tokens back" in n for n in say("llama.cpp", "W4A16g32", family="mistral").notes)


# --- MLX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, words",
    [
        ("W2A16g32", "2-bit, groups of 32"),
        ("W3A16g64sym", "3-bit, groups of 64"),
        ("W5A16g128", "groups of 128"),
        ("W6A16g96", "groups of 32"),
        ("W8A16", "groups of 128"),
    ],
)
def test_mlx_takes_groups_of_32_64_128_and_multiples(scheme, words):
    verdict = say("mlx", scheme, hidden_size=768, num_attention_heads=12)
    accepts(verdict, "mlx", "mlx-lm", "mlx")
    assert words in verdict.weights and any("repeated" in n for n in verdict.notes) == (
        scheme in ("W6A16g96", "W8A16")
    )


@pytest.mark.parametrize(
    "scheme, words",
    [
        ("W4A16g16", "32, 64 and 128"),
        ("W4A16g48", "32, 64 and 128"),
        ("W7A16g64", "2, 3, 4, 5, 6, 8 bits"),
        ("W1A16g64", "2, 3, 4, 5, 6, 8 bits"),
    ],
)
def test_mlx_refuses_other_groups_and_bits(scheme, words):
    refuses(say("mlx", scheme, hidden_size=768, num_attention_heads=12), words)


@pytest.mark.parametrize(
    "family, taken",
    [("phi3", True), ("gemma", True), ("qwen3", True), ("opt", False), ("bitnet", False)],
)
def test_mlx_knows_most_families(family, taken):
    verdict = say("mlx", "W4A16g64", family=family)
    assert verdict.accepts == taken
    if not taken:
        refuses(verdict, f"'{family}'")


# --- transformers ---------------------------------------------------------------------------------


def test_transformers_takes_everything():
    accepts(say("transformers", "W4A16g64"), "compressed-tensors", "0.15", "")
    accepts(say("transformers", "W3A16g64"), "compressed-tensors", "0.17", "")
    verdict = say("transformers", "W4A4KV4", "quarot")
    accepts(verdict, "lowbit", "this library", "")
    assert "import lowbit" in verdict.notes[0] and "decoded" in verdict.notes[1]
    assert "stay packed" in say("transformers", "W2A16", "claq").notes[1]


# --- the command ----------------------------------------------------------------------------------


def plan(tmp_path, *options, family="llama"):
    CONFIGS[family]().save_pretrained(tmp_path)
    result = CliRunner().invoke(
        app, ["plan", str(tmp_path), "--recipe", "rtn", *options], env={"COLUMNS": "200"}
    )
    return result.exit_code, " ".join(result.output.split())


def test_the_plan_shows_every_runtime_with_its_command(tmp_path):
    code, text = plan(tmp_path, "--scheme", "W2A16g64", "--json", str(tmp_path / "plan.json"))
    assert code == 0, text
    for word in (
        "transformers",
        "vLLM 0.33 or newer",
        "as quantized, no export",
        "gptq_v2",
        "--to",
        "gguf",
        "mlx",
        "Q2_K",
    ):
        assert word in text, word
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (
        [r["runtime"].lower() for r in data["runtimes"]] == list(TARGETS)
        and data["target"] is None
        and data["tensor_parallel"] == 1
    )
    assert set(data["runtimes"][0]) == {
        "runtime",
        "accepts",
        "format",
        "weights",
        "export",
        "requires",
        "reasons",
        "notes",
    }


def test_a_target_is_told_at_length(tmp_path):
    code, text = plan(
        tmp_path,
        "--scheme",
        "W2A16g64sym",
        "--target",
        "SGLang",
        "--tensor-parallel",
        "2",
        "--json",
        str(tmp_path / "plan.json"),
    )
    assert (
        code == 0
        and "lowbit export OUT -o DIR --to gptq" in text
        and "2-bit symmetric, groups of 64" in text
    )
    assert "llama.cpp" not in text
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (
        data["target"] == "sglang" and data["tensor_parallel"] == 2 and len(data["runtimes"]) == 5
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (("--scheme", "W3A16g64", "--target", "llama.cpp"), "--to gguf:q4_k"),
        (("--scheme", "W4A16g16", "--target", "mlx"), "32, 64 and 128"),
        (
            ("--scheme", "W4A16g128", "--target", "vllm", "--tensor-parallel", "8"),
            "may be 1, 2, 4.",
        ),
        (("--scheme", "W5A16g64sym", "--target", "sglang"), "GPTQ with 2, 3, 4 and 8"),
        (("--scheme", "W4A16g64", "--target", "vlm"), "did you mean 'vllm'?"),
        (
            ("--scheme", "W4A16g64", "--target", "mlx", "--tensor-parallel", "2"),
            "leave it out for 'mlx'",
        ),
        (
            ("--scheme", "W4A16g64", "--tensor-parallel", "0"),
            "--tensor-parallel 0: give a whole number from 1",
        ),
        (("--scheme", "W4A16g7", "--target", "vllm"), "does not divide"),
    ],
)
def test_what_will_not_load_is_refused_with_exit_2(tmp_path, options, words):
    code, text = plan(tmp_path, *options, "--json", str(tmp_path / "plan.json"))
    assert code == 2 and text.startswith("error:") and words in text, text
    assert text.count(". ") <= 2 and not (tmp_path / "plan.json").exists()


def test_devices_count_only_for_servers_that_divide_linears():
    said = {
        v.runtime: v
        for v in make_plan(
            CONFIGS["llama"](),
            load_recipe("rtn", scheme=parse_scheme("W4A16g128")),
            tensor_parallel=8,
        ).runtimes
    }
    assert {n for n, v in said.items() if not v.accepts} == {"vLLM", "SGLang"}
    assert check_target("MLX") == "mlx"
