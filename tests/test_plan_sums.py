"""The sums of a plan against numbers counted by hand on a small Llama, and what it refuses before
any work.

The model: 3 blocks of width 64, 96 inside the MLP, 4 heads of 16, 2 of keys and values, 300 tokens,
a head of its own. A block's linears are q and o (64, 64), k and v (32, 64), gate and up (96, 64),
down (64, 96): 30720 weights in 448 rows; its two norms have 128 parameters. Outside are two tables
of 300 x 64 and a norm: 38464.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as T
from families import config_of
from helpers import FAMILIES

from lowbit.errors import LowbitError
from lowbit.grid import MXFP4, Affine, Codebook, CrossQuant, KQuant, LLMInt8, PerToken
from lowbit.grid.names import parse_scheme
from lowbit.methods import RTN
from lowbit.methods._hessian import _steps
from lowbit.methods.cost import Layer, Rows, Work
from lowbit.model.calibration import Calibration
from lowbit.plan import HELD_OUT, calibration_of, make_plan, read_config
from lowbit.plan.memory import PROCESS, Needs
from lowbit.plan.speed import Speed, seconds
from lowbit.plan.targets import TARGETS, check_target
from lowbit.recipe import Recipe, load_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def llama(**more: object) -> T.LlamaConfig:
    usual = dict(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return T.LlamaConfig(**{**usual, **more})


def planned(scheme: str, recipe: str = "rtn", config: object = None, *settings: str, **setting):
    chosen = load_recipe(recipe, scheme=parse_scheme(scheme), settings=settings)
    return make_plan(config or llama(), chosen, **{"samples": 8, "length": 32, **setting})


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "block"),
    [
        # Codes, scales of 16 bits, zero points packed along the outputs, 7 shapes of 16 bytes.
        ("W4A16g32", 15360 + 1920 + 480 + 112),
        ("W4A16g32sym", 15360 + 1920 + 112),
        ("W2A16", 7680 + 896 + 112 + 112),
        ("W8A16sym", 30720 + 896 + 112),
        ("W1A16g32", 3840 + 1920 + 120 + 112),
        ("W3A16g32sym", 11520 + 1920 + 112),
        # A byte for 32 scales, no shapes.
        ("mxfp4", 15360 + 960),
        # 480 columns of 4 levels in 16 bits, or one book for each of 448 rows, or for 7 matrices.
        ("W2A16:column", 7680 + 480 * 4 * 2 + 112),
        ("W2A16:row", 7680 + 448 * 4 * 2 + 112),
        ("W2A16:tensor", 7680 + 7 * 4 * 2 + 112),
    ],
)
def test_bytes_of_the_linears_of_a_block(scheme: str, block: int) -> None:
    plan = planned(scheme)
    assert plan.packed == 3 * block
    assert plan.bits_per_weight == pytest.approx(8 * block / 30720)
    assert plan.artifact == 3 * block + 2 * (3 * 128 + 38464)


@pytest.mark.parametrize(
    ("kind", "bits"), [("q2_k", 2.625), ("q3_k", 3.4375), ("q4_k", 4.5), ("q6_k", 6.5625)]
)
def test_bits_of_a_k_quant_are_llama_cpps(kind: str, bits: float) -> None:
    """84, 110, 144 and 210 bytes for 256 weights, as ggml has them; 16 bytes of shape besides."""
    plan = planned(f"gguf:{kind}", "rtn", llama(hidden_size=256, intermediate_size=512))
    assert 8 * (plan.packed - 3 * 7 * 16) / plan.quantized == bits


def test_an_override_counts_where_it_applies() -> None:
    # Down in W4g32sym: 3072 + 384 + 16. In W8sym: 6144 + 128 + 16.
    plan = planned("W4A16g32sym", "rtn", None, "overrides.*.down_proj=W8A16sym")
    assert plan.packed == 3 * (17392 - 3472 + 6288)
    first = planned("W4A16g32sym", "rtn", None, "overrides.*.0.mlp.down_proj=W8A16sym")
    assert first.packed == 3 * 17392 - 3472 + 6288


@pytest.mark.parametrize(
    ("more", "outside", "stored"),
    [
        ({}, 38464, 38464),
        ({"tie_word_embeddings": True}, 19264, 19264),
        ({"vocab_size": 500}, 64064, 64064),
    ],
)
def test_parameters_outside_the_blocks(more: dict[str, object], outside: int, stored: int) -> None:
    plan = planned("W4A16g32", "rtn", llama(**more))
    assert plan.parameters == 3 * (30720 + 128) + outside
    assert plan.original == 2 * plan.parameters
    assert plan.artifact - plan.packed == 2 * (3 * 128 + stored)
    assert plan.check_memory == PROCESS + 5 * plan.parameters
    # A block, seven bytes a number while it is filled.
    assert plan.check_memory_by_block == PROCESS + 5 * outside + 7 * (30720 + 128)


def test_a_rotated_model_stores_a_head_that_was_tied() -> None:
    tied = llama(tie_word_embeddings=True, intermediate_size=128)
    plain, rotated = (planned("W4A16g32", n, tied) for n in ("rtn", "quarot"))
    assert rotated.parameters == plain.parameters
    assert rotated.artifact - plain.artifact == 2 * 300 * 64


# --- memory ---------------------------------------------------------------------------------------

BASE, CODED = 4 * (30720 + 128), 5 * 30720  # float32 weights; codes and what they decode to
STORED = 30720 + 6144  # a packed block, and the codes of its largest linear


@pytest.mark.parametrize(
    ("device", "ranks", "passing", "stream", "outer", "process"),
    [
        # 24 rows of 32 tokens, 3 x 96 + 4 x 64 numbers for each, of 4 bytes on a CPU.
        (CPU, 1, 768 * 4 * 544, 24 * 32 * 64 * 2, 38464 * 4, PROCESS),
        (CPU, 2, 384 * 4 * 544, 12 * 32 * 64 * 2, 38464 * 4, PROCESS),
        (CPU, 5, 160 * 4 * 544, 5 * 32 * 64 * 2, 38464 * 4, PROCESS),
        # In bfloat16, of which a copy of the weights is made.
        (GPU, 1, 768 * 2 * 544 + 2 * 30720, 24 * 32 * 64 * 2, 38464 * 2, 0),
    ],
)
def test_memory_of_rounding_to_nearest(device, ranks, passing, stream, outer, process) -> None:
    need = planned("W4A16g32", device=device, ranks=ranks).memory
    assert need.steps == {
        "passes": round(1.1 * (BASE + CODED + STORED + passing)),
        "rtn": round(1.1 * (BASE + 30720 + 12 * 6144)),  # codes, and one linear as it is rounded
        "quality": round(1.1 * 4 * 300 * (2 + 6) * 32),  # logits of a row twice, their sums
    }
    assert need.least == BASE + CODED
    assert (need.stream, need.copies, need.streams) == (stream, 3, 3 * stream)
    assert (need.outer, need.process, need.processes) == (outer, process, ranks)
    assert need.peak == process + need.steps["passes"] + outer + 3 * stream


@pytest.mark.parametrize(
    ("vocab", "length", "quality", "words"),
    [
        (50_000, 256, 4 * 50_000 * (2 * 256 + 6 * 256), 0),
        (50_000, 2048, 4 * 50_000 * (2 * 671 + 6 * 335), 0),
        (262_144, 256, 4 * 262_144 * (2 * 128 + 6 * 64), 760 * 212_144),
    ],
)
def test_memory_of_a_large_vocabulary(vocab, length, quality, words) -> None:
    large = llama(vocab_size=vocab, max_position_embeddings=4096)
    need = planned("W4A16g32", "rtn", large, length=length).memory
    assert need.steps["quality"] == round(1.1 * quality)
    assert need.process == PROCESS + words


def test_a_batch_that_passes_is_of_whole_rows_of_at_most_8192_tokens() -> None:
    long = llama(max_position_embeddings=10000)
    for length, tokens in ((1000, 8000), (3000, 6000), (8192, 8192), (10000, 10000)):
        need = planned("W4A16g32", "rtn", long, length=length).memory
        assert need.steps["passes"] == round(1.1 * (BASE + CODED + STORED + tokens * 4 * 544))


@pytest.mark.parametrize(
    ("rows", "asked", "mine", "most", "tokens"),
    [
        (Rows(24, 32, 2, 4), 24, 24, 100, 96),
        (Rows(24, 32, 2, 4), 100, 24, 1, 32),
        (Rows(24, 32, 2, 4, ranks=5), 24, 5, 10**9, 160),
        (Rows(24, 32, 2, 4, ranks=5), 6, 2, 64, 64),
        (Rows(3, 32, 2, 4, ranks=3), 1, 1, 10**9, 32),
    ],
)
def test_rows_are_shared_and_batches_are_whole(rows, asked, mine, most, tokens) -> None:
    assert rows.mine(asked) == mine and rows.tokens(most) == tokens


def test_sizes_of_a_layer() -> None:
    layer = Layer({"a": (64, 32), "b": (16, 96)}, 10, 1000, 32, 300)
    assert (layer.weights, layer.largest, layer.widest) == (2048 + 1536, 2048, 96)
    assert layer.activations == 96 + 112 + 10 * 32 + 2 * 96
    shared = replace(layer, shares={"b": 0.25})
    assert layer.active == 2048 + 1536 and shared.active == 2048 + 0.25 * 1536


@pytest.mark.parametrize(
    ("family", "key", "chosen", "share"),
    [
        ("qwen3_moe", "num_experts_per_tok", 2, 2 / 5),
        ("gpt_oss", "num_experts_per_tok", 1, 1 / 5),
    ],
)
def test_work_of_experts_is_of_the_tokens_that_choose_them(family, key, chosen, share) -> None:
    config = config_of(family, **{key: chosen})
    recipe = load_recipe("gptq", scheme=parse_scheme("W4A16g8"))
    shapes = make_plan(config, recipe, 8, 16).shapes_of[-1]
    found = {n: shapes.layer.share(n) for n in shapes.layer.linears}
    assert {v for n, v in found.items() if ".experts." in n} == {share}
    assert {v for n, v in found.items() if ".experts." not in n} == {1.0}
    # The Hessians of a few experts wait together: as many steps as in a dense block.
    assert _steps(shapes) == len(shapes.levels)
    weights = sum(found[n] * a * b for n, (a, b) in shapes.layer.linears.items())
    work = shapes.forward(3)
    assert work.half + work.single == 3 * 16 * (2 * weights + 4 * 16 * 64)


@pytest.mark.parametrize(
    ("need", "free", "words"),
    [
        (
            Needs({"passes": 10, "gptq": 3 << 30}, 2 << 30, 1, 3, 1, lighter={"gptq": "awq or rtn"}),
            (2 << 30) - 1,
            "at least 2.0 GiB (about 3.0 GiB in 'gptq'), and 2.0 GiB are free. What helps: a recipe "
            "that takes less (--recipe awq or rtn), ending what else takes memory on this machine, "
            "or a device with more of it (--device).",
        ),
        (
            Needs({"passes": 3 << 20}, 2 << 20, 1, 3, 1, processes=3),
            (6 << 20) - 1,
            "at least 2.0 MiB in each of 3 processes (about 3.0 MiB in 'passes'), and 6.0 MiB are "
            "free. What helps: fewer processes, ending what else",
        ),
    ],
)  # fmt: skip
def test_a_block_that_does_not_fit_is_refused_with_what_helps(need, free, words) -> None:
    need.check(CPU, lambda device: free + 1)
    need.check(CPU, lambda device: None)  # nobody tells
    with pytest.raises(LowbitError) as e:
        need.check(CPU, lambda device: free)
    assert words in str(e.value)


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Work(), 0),
        (Work(half=6), 3),
        (Work(single=6), 2),
        (Work(moved=6), 1.5),
        (Work(6, 6, 6), 6.5),
        (Work(6, 6, 6) + Work(2, 0, 4), 8.5),
        (Work(6, 6, 6) * 2, 13),
    ],
)
def test_work_is_done_one_kind_after_the_other(work: Work, expected: float) -> None:
    assert seconds(work, Speed(2, 3, 4)) == expected


def test_work_of_rounding_to_nearest() -> None:
    """Target and next input of all 24 rows, two losses of the 8 that methods learn from: 64 rows
    of 32 tokens through every block. A token takes 2 FLOPs a weight and 4 x 32 x 64 in attention;
    1760 numbers are written and read.
    """
    tokens, numbers = 64 * 32, 928 + 10 * 64 + 2 * 96
    flops, moved = tokens * (2 * 30720 + 4 * 32 * 64), 2 * tokens * 4 * numbers
    assert planned("W4A16g32").seconds(Speed(1, 1e6, 1e7)) == pytest.approx(
        3 * (flops / 1e6 + moved / 1e7)
    )
    on_gpu = planned("W4A16g32", device=GPU).seconds(Speed(1e6, 1, 1e7))
    assert on_gpu == pytest.approx(3 * (flops / 1e6 + moved / 2e7))


# --- what a run is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ("stdlib", 128, 100)),
        ({"source": "c4"}, ("c4", 128, 100)),
        ({"samples": 3}, ("stdlib", 3, 100)),
        ({"length": 100}, ("stdlib", 128, 100)),
        ({"length": 7}, ("stdlib", 128, 7)),
    ],
)
def test_calibration_is_what_was_asked_for_on_top_of_the_recipes(asked, expected) -> None:
    config = llama(max_position_embeddings=100)
    assert calibration_of(Calibration(), config, **asked) == Calibration(*expected)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"length": 101}, "--length 101 is beyond the model's context of 100 tokens."),
        ({"length": 1}, "at least 1 sample of at least 2 tokens, got 128 x 1."),
        ({"samples": 0}, "at least 1 sample of at least 2 tokens, got 0 x 100."),
        ({"source": ""}, "calibration needs a text source (--calib)"),
    ],
)
def test_calibration_that_no_model_could_have(asked, words) -> None:
    with pytest.raises(LowbitError) as e:
        calibration_of(Calibration(), llama(max_position_embeddings=100), **asked)
    assert words in str(e.value)


def test_a_config_without_a_context_leaves_the_recipes_length() -> None:
    for config in (T.PretrainedConfig(), T.PretrainedConfig(max_position_embeddings=None)):
        assert calibration_of(Calibration(length=3000), config).length == 3000


def test_rows_are_no_longer_than_the_context() -> None:
    assert planned("W4A16g32", length=2048).setting.length == 128
    assert planned("W4A16g32", samples=8).shapes.rows.count == 8 + HELD_OUT


@pytest.mark.parametrize("place", ["config.json", "other.json", "."])
def test_a_config_is_found_in_a_folder_or_as_a_file(tmp_path: Path, place: str) -> None:
    name = "config.json" if place == "." else place
    (tmp_path / name).write_text(json.dumps(llama().to_dict()))
    assert read_config(str(tmp_path / place)).hidden_size == 64


@pytest.mark.parametrize("name", ["none.json", "a/config.json", "a/b/c", "./a/b", "/a/b", "a"])
def test_a_config_that_is_not_there(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowbitError, match=rf"^no config\.json at '{re.escape(name)}'\.$"):
        read_config(name)


# --- what a plan refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "more", "words"),
    [
        (Recipe(Affine(4, 40)), {}, "group size 40 does not divide the 64 inputs of 'model.layers.0."),
        (Recipe(Affine(4, 64)), {}, "64 does not divide the 96 inputs of 'model.layers.0.mlp.down_proj'"),
        (Recipe(Affine(4, 64)), {}, "fit every linear of this model: 32, 16, 8, or a scheme without g"),
        (Recipe(MXFP4()), {"intermediate_size": 80}, "blocks of 32 inputs, which do not divide the 80"),
        (Recipe(KQuant("q4_k")), {}, "gguf:q4_k comes in blocks of 256 inputs"),
        (
            Recipe(Affine(4), overrides=(("*.o_proj", Affine(4)), ("*.w1", Affine(8)))),
            {},
            "override 2, '*.w1', matches no linear of this model; names look like "
            "'model.layers.0.self_attn.q_proj'.",
        ),
        (Recipe(Affine(4), overrides=(("*.2.*o_proj", Affine(8)),)), {}, "only if all are symmetric"),
        (Recipe(Affine(4, symmetric=True), overrides=(("*.o_proj", Affine(4)),)), {}, "add 'sym'"),
    ],
)  # fmt: skip
def test_grids_that_do_not_fit_are_refused(recipe: Recipe, more, words: str) -> None:
    with pytest.raises(LowbitError) as e:
        make_plan(llama(**more), recipe)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("activations", "family", "samples", "words"),
    [
        (None, "llama", 3, "4 processes cannot share 3 calibration rows: use fewer, or more --samples."),
        (CrossQuant(8), "llama", 8, "use one process. --set activations.columns=sequence keeps rows apart."),
        (CrossQuant(8), "opt", 8, "depends on how they are shared: use one process."),
        (CrossQuant(8, columns="sequence"), "opt", 8, "shared: use one process."),
        (LLMInt8(), "llama", 8, "depends on how they are shared: use one process."),
        (CrossQuant(8, columns="sequence"), "llama", 4, None),
        (PerToken(8), "opt", 4, None),
        (None, "llama", 4, None),
    ],
)  # fmt: skip
def test_what_four_processes_cannot_share(activations, family, samples, words) -> None:
    recipe = Recipe(Affine(8), (RTN(),), activations=activations)
    make_plan(FAMILIES[family](), recipe, samples, ranks=1)
    if words is None:
        make_plan(FAMILIES[family](), recipe, samples, ranks=4)
        return
    with pytest.raises(LowbitError) as e:
        make_plan(FAMILIES[family](), recipe, samples, ranks=4)
    assert str(e.value).endswith(words)


FULL = PerToken(8, symmetric=True, full_range=True)


@pytest.mark.parametrize(
    ("recipe", "family", "words"),
    [
        (Recipe(Affine(4, 32)), "llama", None),
        (Recipe(MXFP4()), "llama", None),
        (Recipe(Affine(8, symmetric=True), activations=FULL), "llama", None),
        (Recipe(Affine(8, symmetric=True), activations=FULL), "opt", "quantized activations of fc1"),
        (Recipe(Affine(8), activations=FULL), "llama", "these activations: compressed-tensors takes"),
        (Recipe(Affine(8, symmetric=True), activations=PerToken(8)), "llama", "these activations"),
        (
            Recipe(Affine(8, symmetric=True), activations=PerToken(6, symmetric=True, full_range=True)),
            "llama",
            "these activations",
        ),
        (
            Recipe(Affine(8, symmetric=True), activations=PerToken(8, True, 0.9, True)),
            "llama",
            "these activations",
        ),
        (Recipe(Affine(4), kv=PerToken(4)), "llama", "quantized keys and values"),
        (Recipe(Codebook(2)), "llama", "codebook"),
        (Recipe(KQuant("q4_k")), "wide", "K-quants"),
        (Recipe(Affine(4), overrides=(("*.o_proj", Codebook(4)),)), "llama", "codebook"),
    ],
)  # fmt: skip
def test_what_compressed_tensors_cannot_carry_is_said(recipe, family, words) -> None:
    wide = llama(hidden_size=256, intermediate_size=512)
    plan = make_plan(wide if family == "wide" else FAMILIES[family](), recipe)
    assert (plan.beyond is None) if words is None else (words in plan.beyond)


def test_rotations_while_it_runs_are_beyond_compressed_tensors() -> None:
    config = llama(intermediate_size=128)
    assert "quarot.online=false" in planned("W4A16g32", "quarot", config).beyond
    assert planned("W4A16g32", "quarot", config, "quarot.online=false").beyond is None


# --- runtimes -------------------------------------------------------------------------------------

GRIDS = [
    f"W{bits}A16{group}{kind}"
    for bits in range(1, 9)
    for group in ("", "g8", "g16", "g32", "g48", "g64", "g128", "g256", "g512")
    for kind in ("", "sym")
    if (bits, kind) != (1, "sym")
] + ["mxfp4", "gguf:q2_k", "gguf:q3_k", "gguf:q4_k", "gguf:q6_k", "W2A16:column", "W3A16:row"]
WIDE = dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_hidden_layers=1)
COMMON = (0, 32, 64, 128, 256, 512)  # group sizes, 0 for whole rows
REMEDY = re.compile(r"choose |would fit|write |leave|--set | takes ")


def by_rule(target: str, scheme: str) -> bool | None:
    """Whether a runtime takes a scheme by its documentation; None where rules of widths come in."""
    found = re.fullmatch(r"W(\d)A16(?:g(\d+))?(sym)?", scheme)
    if target == "transformers":
        return True
    if found is None:
        return scheme.startswith("gguf:") and target == "llama.cpp"
    bits, group = int(found[1]), int(found[2] or 0)
    if target == "vllm":
        return bits > 1 and group != 48
    if target == "sglang":
        return bits in (2, 3, 4, 8) and (group in COMMON or (bits, group) == (2, 16))
    if target == "mlx":
        return bits in (2, 3, 4, 5, 6, 8) and group in COMMON
    return None


@pytest.mark.parametrize("scheme", GRIDS)
def test_every_runtime_answers_every_grid(scheme: str) -> None:
    config = llama(**WIDE, max_position_embeddings=64)
    if "g48" in scheme:
        config = llama(**{**WIDE, "hidden_size": 384, "intermediate_size": 768})
    plan = make_plan(config, Recipe(parse_scheme(scheme).weights))
    assert [v.runtime.lower() for v in plan.runtimes] == list(TARGETS)
    for target in TARGETS:
        said = plan.verdict(target)
        expected = by_rule(target, scheme)
        assert expected is None or said.accepts == expected, said
        if said.accepts:
            assert said.format and said.weights and said.requires and not said.reasons
            assert said.export in ("", f"lowbit export OUT -o DIR --to {said.format}")
        else:
            assert not (said.format or said.weights or said.export or said.requires)
            assert said.reasons
            for reason in said.reasons:
                assert reason.endswith(".") and REMEDY.search(reason), reason


@pytest.mark.parametrize(
    ("name", "devices", "words"),
    [
        ("vllm", 1, None),
        ("vLLM", 8, None),
        ("SGLang", 2, None),
        ("MLX", 1, None),
        ("mlx", 2, "--tensor-parallel is about vLLM and SGLang; leave it out for 'mlx'."),
        ("Transformers", 2, "leave it out for 'transformers'."),
        ("llama.cpp", 2, "leave it out for 'llama.cpp'."),
        ("llamacpp", 1, "unknown target 'llamacpp': did you mean 'llama.cpp'?"),
        ("", 1, "unknown target '': known: llama.cpp, mlx, sglang, transformers, vllm."),
    ],
)
def test_names_of_targets(name: str, devices: int, words: str | None) -> None:
    if words is None:
        assert check_target(name, devices) == name.lower()
        return
    with pytest.raises(LowbitError) as e:
        check_target(name, devices)
    assert words in str(e.value)


@pytest.mark.parametrize("devices", [0, -1])
def test_a_number_of_devices_that_is_none(devices: int) -> None:
    with pytest.raises(LowbitError, match=f"at least 1; got {devices}"):
        make_plan(llama(), Recipe(Affine(4)), tensor_parallel=devices)
