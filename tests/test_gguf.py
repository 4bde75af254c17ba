"""GGUF: blocks against the gguf package's dequantizer, the container against its reader, whole
models by transformers and, where an interpreter has it (LOWBIT_LLAMACPP_PYTHON names one), by
llama.cpp.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import families
import gguf as package
import helpers
import numpy as np
import pytest
import torch
import transformers as T
from gguf.quants import dequantize
from helpers import TEXT, save_tiny, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.files import PROOF
from lowbit.artifact.proof import GGUF_DECODER, compare_logits, runtime_logits, verify
from lowbit.cli import app
from lowbit.errors import LowbitError, VerificationError
from lowbit.export.gguf import tokens
from lowbit.export.gguf.families import FAMILIES as KNOWN
from lowbit.export.gguf.model import Architecture, Spot
from lowbit.export.gguf.types import chosen, decoded, held, rounded
from lowbit.formats import gguf
from lowbit.formats.ggml import BLOCKS, pack_affine, pack_k, unpack_affine, unpack_k
from lowbit.grid import Affine, KQuant, KQuantParams, QTensor

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

PYTHON = os.environ.get("LOWBIT_LLAMACPP_PYTHON", sys.executable)
RUNS = importlib.util.find_spec("llama_cpp") is not None or sys.executable != PYTHON
KINDS = ("q2_k", "q3_k", "q4_k", "q6_k")


def by_package(rows, kind):
    return dequantize(rows.numpy(), package.GGMLQuantizationType[kind.upper()])


def random_blocks(kind, seed, rows=6, columns=512):
    g, grid = torch.Generator().manual_seed(seed), KQuant(kind)
    subs, supers = columns // grid.group_size, columns // 256
    least = -grid.most - 1 if grid.symmetric else 0
    unit, unit_min = (torch.randn(rows, supers, generator=g).half().float() for _ in range(2))
    scale = torch.randint(least, grid.most + 1, (rows, subs), generator=g).float()
    minimum = torch.randint(0, grid.most + 1, (rows, subs), generator=g).float()
    if grid.symmetric:
        unit_min, minimum = torch.zeros_like(unit_min), torch.zeros_like(minimum)
    codes = torch.randint(0, grid.top + 1, (rows, columns), generator=g, dtype=torch.uint8)
    return QTensor(grid, codes, KQuantParams(unit, scale, unit_min, minimum))


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 9999))
def test_k_quants_bit_for_bit_as_the_gguf_package_decodes_them(kind, seed):
    q = random_blocks(kind, seed)
    rows = pack_k(q)
    assert rows.shape == (6, BLOCKS[kind.upper()].row_bytes(512))
    assert np.array_equal(by_package(rows, kind), q.decode().numpy())
    assert unpack_k(rows, q.grid).same_as(q) is None


def weight(bits, group, symmetric, seed=0, rows=8, columns=512):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    grid = Affine(bits, group, symmetric)
    params = grid.stored(grid.fit(w), torch.float16)
    return QTensor(grid, grid.encode(w, params), params)


@settings(max_examples=20, deadline=None)
@given(
    case=st.sampled_from([("Q4_0", 4), ("Q4_0", 2), ("Q8_0", 8), ("Q8_0", 5)]),
    group=st.sampled_from([None, 32, 64]),
    seed=st.integers(0, 999),
)
def test_symmetric_grids_are_exact_by_the_gguf_package(case, group, seed):
    kind, bits = case
    q = weight(bits, group, True, seed)
    rows = pack_affine(q, BLOCKS[kind])
    assert np.array_equal(by_package(rows, kind), q.decode().numpy())
    assert torch.equal(unpack_affine(rows, BLOCKS[kind], q.grid).codes, q.codes)
    assert held(q, BLOCKS[kind], "w").extra == 0


def test_q4_1_rounds_the_minimum_alone():
    q = weight(4, 32, False)
    rows = pack_affine(q, BLOCKS["Q4_1"])
    found = held(q, BLOCKS["Q4_1"], "w")
    assert np.allclose(
        by_package(rows, "Q4_1"), decoded(found.rows, BLOCKS["Q4_1"]).numpy(), atol=1e-7
    )
    step = float(q.params.scale.max())
    assert (
        np.abs(by_package(rows, "Q4_1") - q.decode().numpy()).max() < 0.006 * step
        and 0 < found.extra < 1e-4
    )


@pytest.mark.parametrize("group", [64, 128, None])
def test_q2_0_byte_by_byte(group):
    """The package does not know the type yet: read as ggml's structure says, d * (q - 1) with two
    bits each, lowest first.
    """
    q = weight(2, group, True)
    blocks = pack_affine(q, BLOCKS["Q2_0"]).numpy().reshape(8, -1, 18)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float64)
    codes = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3).reshape(8, -1, 64)
    assert np.array_equal((d * (codes - 1.0)).reshape(8, -1), q.decode(torch.float64).numpy())
    assert held(q, BLOCKS["Q2_0"], "w").extra == 0


@pytest.mark.parametrize(
    "bits, group, kind, most",
    [
        (2, 128, "Q2_K", 0.006),
        (2, 64, "Q2_K", 0.012),
        (2, 16, "Q2_K", 0.05),
        (4, 128, "Q4_K", 0.004),
        (4, 32, "Q4_K", 0.03),
        (3, 64, "Q4_K", 0.004),
    ],
)
def test_codes_stay_and_scales_are_refitted(bits, group, kind, most):
    """Bounds are a few times what a search over Gaussian weights leaves; see docs/results.md for
    the figures.
    """
    q = weight(bits, group, False, rows=64)
    found = held(q, BLOCKS[kind], "w")
    assert np.allclose(
        by_package(found.rows, kind), decoded(found.rows, BLOCKS[kind]).numpy(), rtol=0, atol=1e-7
    )
    assert 0 < found.extra < most


@pytest.mark.parametrize("multiples", [(1, 2, 3, 4), (4, 1, 1, 2), (3, 3, 3, 3)])
def test_scales_that_are_multiples_of_one_number_fit_exactly(multiples):
    q = weight(2, 64, False)
    scale = torch.tensor(multiples).float().repeat(8, 2) * 2.0**-7
    q = QTensor(q.grid, q.codes, type(q.params)(scale, q.params.zero_point))
    assert held(q, BLOCKS["Q2_K"], "w").extra == 0


@pytest.mark.parametrize(
    "bits, group, kind",
    [
        (2, 64, "Q2_K"),
        (4, 32, "Q4_K"),
        (3, 16, "Q3_K"),
        (2, 32, "Q3_K"),
        (4, 32, "Q4_1"),
        (4, 64, "Q8_0"),
    ],
)
def test_the_extra_error_is_that_of_the_weights(bits, group, kind):
    """From sums over codes, against the difference of the decoded weights."""
    q = weight(bits, group, kind in ("Q3_K", "Q8_0"), rows=16)
    found, before = (
        held(q, BLOCKS[kind], "w"),
        q.grid.decode(
            q.codes, type(q.params)(q.params.scale.double(), q.params.zero_point.double())
        ),
    )
    dense = float(
        (decoded(found.rows, BLOCKS[kind]) - before).square().mean()
        / (q.params.scale.double().square().mean() / 12)
    )
    assert found.extra == pytest.approx(dense, rel=1e-3, abs=1e-12)


def test_the_refit_beats_rounding_each_scale():
    q = weight(2, 64, False, rows=64)
    grid = KQuant("q2_k")
    scale = q.params.scale.double().repeat_interleave(4, 1)
    offset = scale * q.params.zero_point.double().repeat_interleave(4, 1)

    def plain(t):
        unit = t.view(64, 2, 16).amax(-1) / 15
        return unit.half().double(), (t.view(64, 2, 16) / unit[..., None]).round().clamp(
            0, 15
        ).flatten(1)

    params = KQuantParams(*plain(scale), *plain(offset))
    naive = (grid.decode(q.codes, params) - q.decode(torch.float64)).square().mean()
    fitted = (
        (decoded(held(q, BLOCKS["Q2_K"], "w").rows, BLOCKS["Q2_K"]) - q.decode(torch.float64))
        .square()
        .mean()
    )
    assert fitted < 0.5 * naive


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
    spread=st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_a_fit_is_no_worse_than_its_neighbours(kind, seed, spread):
    """Moving any unit by one step of float16 in either direction, codes nearest again, does not
    make much of a better fit.
    """
    grid = KQuant(kind)
    w = torch.randn(4, 512, generator=torch.Generator().manual_seed(seed)) * spread
    params = grid.fit(w)
    error = lambda p: (grid.decode(grid.encode(w, p), p) - w).square().sum(1)  # noqa: E731
    best = error(params)
    for factor in (0.96, 1.04):
        moved = KQuantParams(
            (params.unit * factor).half().float(), params.scale, params.unit_min, params.min
        )
        assert bool((error(moved) > 0.98 * best).all())
    assert (
        torch.isfinite(best).all()
        and float(best.sum() / w.square().sum()) < {2: 0.13, 3: 0.04, 4: 0.012, 6: 0.001}[grid.bits]
    )


def test_importance_moves_the_error_where_it_costs_least():
    grid, g = KQuant("q2_k"), torch.Generator().manual_seed(0)
    w, importance = torch.randn(32, 512, generator=g), torch.rand(512, generator=g).pow(4) * 20
    cost = lambda p: float(((grid.decode(grid.encode(w, p), p) - w).square() * importance).sum())  # noqa: E731
    assert cost(grid.fit(w, importance)) < 0.85 * cost(grid.fit(w))


def test_zeros_and_single_values_are_kept():
    for kind in KINDS:
        grid = KQuant(kind)
        for value in (0.0, 0.5, -0.5):
            w = torch.full((2, 256), value)
            params = grid.fit(w)
            assert torch.allclose(grid.decode(grid.encode(w, params), params), w, rtol=0.04), (
                kind,
                value,
            )


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
)
def test_the_container_by_the_gguf_package(seed, name, tmp_path_factory):
    path, q = tmp_path_factory.mktemp("g") / "f.gguf", random_blocks("q4_k", seed)
    vector = torch.randn(7)
    entries = [
        gguf.Entry("a.weight", (6, 512), BLOCKS["Q4_K"]),
        gguf.Entry("b.weight", (7,), BLOCKS["F32"]),
    ]
    said = {
        "general.architecture": "llama",
        "general.name": name,
        "x.int": 7,
        "x.real": 0.5,
        "x.yes": True,
        "x.texts": [name, "b"],
        "x.ints": [-1, 2],
        "x.reals": [0.25, -1.0],
    }
    with gguf.Writer(path, said, entries) as file:
        file.add("b.weight", vector.view(torch.uint8))
        file.add("a.weight", pack_k(q))
    theirs = package.GGUFReader(path)
    assert {k: theirs.fields[k].contents() for k in said} == said
    found = {t.name: t for t in theirs.tensors}
    assert np.array_equal(
        dequantize(found["a.weight"].data, found["a.weight"].tensor_type), q.decode().numpy()
    )
    assert found["b.weight"].data.tolist() == vector.tolist() and list(found["a.weight"].shape) == [
        512,
        6,
    ]
    ours = gguf.Reader(path)
    assert (
        ours.metadata == said
        and torch.equal(ours.raw("a.weight"), pack_k(q))
        and ours.entries["b.weight"].shape == (7,)
    )
    cut = path.with_suffix(".cut")
    cut.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        LowbitError, match=r"not a readable GGUF file: it ends before '[ab].weight' does"
    ):
        gguf.Reader(cut)


@pytest.mark.parametrize(
    "grid, columns, asked, words",
    [
        (
            Affine(2, 32),
            352,
            None,
            r"does not fit into Q2_K: its blocks hold 256 inputs, which does not divide 352. --to gguf:q4_1 puts the same codes into 5 bits",
        ),
        (
            Affine(2, 32, True),
            512,
            None,
            r"does not fit into Q2_0: it has a scale for every 64 inputs, which does not divide groups of 32",
        ),
        (
            Affine(3, 64),
            512,
            None,
            r"no type of GGUF holds asymmetric 3-bit codes in 3 bits. Quantize with 'sym' or with scheme gguf:q3_k",
        ),
        (Affine(8), 512, None, r"is on W8, which no type of GGUF holds"),
        (
            Affine(4, 64),
            512,
            "q4_0",
            r"Q4_0 does not hold the codes of 'w', which is on W4g64: it can be q4_k, q4_1",
        ),
        (
            KQuant("q2_k"),
            512,
            "q4_k",
            r"Q4_K does not hold the codes of 'w', which is on gguf:q2_k",
        ),
        (
            Affine(4, 16),
            512,
            "q4_k",
            r"does not fit into Q4_K: it has a scale for every 32 inputs, which does not divide groups of 16",
        ),
        (
            Affine(4, 64),
            640,
            "q4_k",
            r"its blocks hold 256 inputs, which does not divide 640; of the types that hold its codes, q4_1 would fit\.",
        ),
        (
            Affine(4, 32, True),
            640,
            "q6_k",
            r"which does not divide 640; of the types that hold its codes, q4_0 and q8_0 would fit\.",
        ),
        (Affine(4, 64), 640, "q8_0", r"which is on W4g64: it can be q4_1\."),
        (
            KQuant("q2_k"),
            640,
            "q2_k",
            r"divide 640; of the types that hold its codes, none would fit\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_never_put_into_something_larger(
    grid, columns, asked, words
):
    with pytest.raises(LowbitError, match=words):
        chosen(grid, columns, asked, "w")


@pytest.mark.parametrize(
    "grid, columns, kind",
    [
        (Affine(2, 64, True), 320, "Q2_0"),
        (Affine(2, 64), 512, "Q2_K"),
        (Affine(3, 64, True), 512, "Q3_K"),
        (Affine(4, 32, True), 352, "Q4_0"),
        (Affine(4, 64), 512, "Q4_K"),
        (Affine(4, 32), 352, "Q4_1"),
        (Affine(5, None, True), 512, "Q6_K"),
        (Affine(8, None, True), 352, "Q8_0"),
        (KQuant("q3_k"), 256, "Q3_K"),
    ],
)
def test_the_type_that_fits_is_found(grid, columns, kind):
    assert chosen(grid, columns, None, "w").name == kind


def test_embeddings_in_other_types():
    w = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    for asked, most in (("f32", 0), ("f16", 1e-7), ("bf16", 1e-5), ("q8_0", 1e-4), ("q6_k", 5e-4)):
        kind, found = rounded(w, asked, "e")
        assert found.extra <= most and kind.name == asked.upper()
        assert np.allclose(
            by_package(found.rows, asked), decoded(found.rows, kind).numpy(), atol=1e-6
        )


# --- whole models ---------------------------------------------------------------------------------


def wide(monkeypatch):
    monkeypatch.setitem(helpers.LLAMA, "hidden_size", 256)
    monkeypatch.setitem(helpers.LLAMA, "intermediate_size", 512)


def artifact(model, out, scheme, recipe="rtn", options=()):
    lowbit.quantize(
        str(model),
        scheme,
        recipe,
        out=out,
        calib=str(model / "text.txt"),
        samples=4,
        length=32,
        settings=list(options),
    )
    return out


def export(folder, out, *options):
    result = CliRunner().invoke(
        app, ["export", str(folder), "-o", str(out), "--python", PYTHON, *options]
    )
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    "family, scheme",
    [
        ("llama", "gguf:q2_k"),
        ("llama-mha", "W2A16g64"),
        ("mistral", "W3A16g64sym"),
        ("qwen2", "gguf:q3_k"),
        ("qwen3", "W4A16g32"),
    ],
)
def test_transformers_computes_from_the_file_what_was_tuned(tmp_path, monkeypatch, family, scheme):
    """Names, order of rows, metadata and every number, read by the gguf package; the tokenizer by
    llama.cpp where there is one.
    """
    wide(monkeypatch)
    made = artifact(save_tiny(tmp_path / "m", family, dtype=torch.float32), tmp_path / "a", scheme)
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    assert code == 0, text
    done = verify(tmp_path / "g", python=PYTHON, loading="blocks")
    assert done.loading == "blocks" and (RUNS or "one block in memory" in done.summary)
    exact = done.decoded_rms if RUNS else done.logits_rms
    # Units and scales are float16, the rest of this model float32.
    assert exact < 2e-4 and (RUNS or "llama.cpp not run" in done.loader)
    report = json.loads((tmp_path / "g" / "report.json").read_text())
    assert (
        report["format"] == "gguf"
        and (tmp_path / "g" / report["gguf"]["file"]).is_file()
        and not (tmp_path / "g" / "config.json").exists()
    )
    if scheme.startswith("gguf:"):
        assert {e["extra_error"] for e in report["linears"] if "skipped" not in e} == {0.0}
    reader = package.GGUFReader(tmp_path / "g" / report["gguf"]["file"])
    assert {t.name for t in reader.tensors} >= {
        "token_embd.weight",
        "blk.1.ffn_down.weight",
        "output_norm.weight",
    }


@pytest.mark.skipif(not RUNS, reason="no llama-cpp-python")
@pytest.mark.parametrize(
    "scheme, types",
    [("W2A16g64sym", "Q2_0"), ("W6A16sym", "Q6_K"), ("W8A16sym", "Q8_0"), ("W4A16g32sym", "Q4_0")],
)
def test_llama_cpp_runs_what_others_cannot_read(tmp_path, monkeypatch, scheme, types):
    wide(monkeypatch)
    made = artifact(save_tiny(tmp_path / "m", "qwen2"), tmp_path / "a", scheme)
    code, text = export(made, tmp_path / "g", "--to", "gguf", "--embeddings", "q8_0")
    assert code == 0 and "logits by llama.cpp within" in text, text
    assert list(json.loads((tmp_path / "g" / "report.json").read_text())["gguf"]["types"]) == [
        types
    ]


def test_llama_3_rotary_factors(tmp_path, monkeypatch):
    wide(monkeypatch)
    rope = dict(LLAMA3_ROPE)
    monkeypatch.setitem(
        helpers.FAMILIES, "llama", lambda: T.LlamaConfig(**helpers.LLAMA, rope_parameters=rope)
    )
    made = artifact(save_tiny(tmp_path / "m", dtype=torch.float32), tmp_path / "a", "gguf:q4_k")
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    file = next((tmp_path / "g").glob("*.gguf"))
    reader = gguf.Reader(file)
    low, high = 32 / 1.0, 32 / 4.0
    expected = []
    # The rule of Llama 3.1: long waves are stretched, short ones stay, a ramp between.
    for i in range(32):
        wave = 2 * np.pi * 1e4 ** (2 * i / 64)
        smooth = (32 / wave - 1.0) / (4.0 - 1.0)
        expected.append(
            1.0 if wave < high else 8.0 if wave > low else 1 / ((1 - smooth) / 8.0 + smooth)
        )
    assert np.allclose(
        reader.raw("rope_freqs.weight").view(torch.float32).flatten().numpy(), expected, rtol=1e-5
    )
    if RUNS:
        assert code == 0 and "logits by llama.cpp" in text, text


@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen2", "gemma3_text"])
def test_the_model_of_the_file_is_what_the_gguf_package_decodes(tmp_path, monkeypatch, family):
    """Where numbers moved: the new proof against the file, read by transformers as a whole; the
    tuned model's logits are others.
    """
    wide(monkeypatch)
    config = config_of(family) if family == "gemma3_text" else family
    made = artifact(save_tiny(tmp_path / "m", config), tmp_path / "a", "W4A16g32")
    code, text = export(made, tmp_path / "g", "--to", "gguf", "--embeddings", "q8_0")
    assert code == 0 and "proof made anew" in text, text
    last = (proof := load_file(tmp_path / "g" / PROOF))["logits"].shape[1]
    found = runtime_logits(tmp_path / "g", proof["ids"], "gguf", last, reader=GGUF_DECODER)
    assert compare_logits(proof["logits"], found["logits"])[0] < 1e-5
    assert compare_logits(load_file(made / PROOF)["logits"], found["logits"])[0] > 1e-3
    assert "blocks" not in found
    parts = runtime_logits(
        *(tmp_path / "g", proof["ids"], "gguf", last), reader=GGUF_DECODER, loading="blocks"
    )
    assert torch.equal(parts["logits"], found["logits"]) and int(parts["blocks"]) > 1


def test_a_damaged_file_is_found(tmp_path, monkeypatch):
    wide(monkeypatch)
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a", "gguf:q2_k")
    assert export(made, tmp_path / "g", "--to", "gguf")[0] == 0
    file = next((tmp_path / "g").glob("*.gguf"))
    raw = bytearray(file.read_bytes())
    raw[-5000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match=r"tensor '.*' in .* is not what was written"):
        verify(tmp_path / "g", loader=False)
    file.write_bytes(raw[:1000])
    with pytest.raises(VerificationError, match="not a readable GGUF file"):
        verify(tmp_path / "g", loader=False)


def test_a_wrong_order_of_rows_is_found(tmp_path, monkeypatch):
    wide(monkeypatch)
    made = artifact(save_tiny(tmp_path / "m"), tmp_path / "a", "gguf:q4_k")
    monkeypatch.setattr(
        "lowbit.export.gguf.model.Architecture.rows", lambda self, full, count: None
    )
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    assert (
        code == 1
        and "logits differ" in text
        and not (tmp_path / "g").exists()
        and not list(tmp_path.glob("*.partial"))
    )


@pytest.mark.parametrize(
    "family, scheme, recipe, options, words",
    [
        (
            "gemma",
            "W4A16g32",
            "rtn",
            [],
            f"GGUF export knows {', '.join(KNOWN)}, not the model family 'gemma'",
        ),
        ("llama", "W2A16", "claq", [], "is on W2 codebook per column, which no type of GGUF holds"),
        ("llama", "W8A8sym", "rtn", [], "quantizes activations, which gguf cannot say"),
        ("llama", "W4A16g32", "rtn", ["--to", "gguf:q5_9"], "no block type 'q5_9'"),
        (
            "llama",
            "W4A16g32",
            "rtn",
            ["--embeddings", "q2_k"],
            "--embeddings takes f32, f16, bf16, q8_0, q6_k",
        ),
        (
            "llama",
            "W4A16g32",
            "rtn",
            ["--embeddings", "q6_k"],
            "which blocks of Q6_K do not divide",
        ),
        (
            "llama",
            "W4A16g32",
            "rtn",
            ["--to", "mlx", "--embeddings", "q6_k"],
            "--embeddings is for --to gguf",
        ),
        ("llama", "W4A16g32", "rtn", ["--to", "awq:q4"], "cannot export to 'awq:q4'"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path, family, scheme, recipe, options, words):
    made = artifact(save_tiny(tmp_path / "m", family), tmp_path / "a", scheme, recipe)
    code, text = export(
        made, tmp_path / "g", *(options if "--to" in options else ["--to", "gguf", *options])
    )
    assert code == 2 and words in text, text
    assert not (tmp_path / "g").exists() and not (tmp_path / "g.partial").exists()


# --- more families --------------------------------------------------------------------------------

WIDE = dict(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=256,
    head_dim=64,
)
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e3}
MODELS = {
    "gemma3_text": dict(
        query_pre_attn_scalar=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL},
    ),
    "phi3": dict(sliding_window=None),
    "granite": dict(
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.3,
        attention_multiplier=0.1,
        attention_bias=True,
    ),
    "smollm3": {},
    "glm4": {},
    "mixtral": dict(sliding_window=None, num_hidden_layers=2),
    "qwen3_moe": dict(norm_topk_prob=True, num_hidden_layers=2),
}


def config_of(family, **more):
    known = vars(T.CONFIG_MAPPING[family]())
    wide = {k: v for k, v in WIDE.items() if k in known}
    return families.config_of(family, **{**wide, **MODELS[family], **more})


def quantized(tmp_path, family, scheme, options=()):
    """An artifact of a family, verified."""
    model = save_tiny(tmp_path / "m", config_of(family), dtype=torch.float32)
    return artifact(model, tmp_path / "a", scheme, options=options)


@pytest.mark.parametrize(
    "family, scheme",
    [
        ("gemma3_text", "W4A16g32"),
        ("phi3", "gguf:q4_k"),
        ("granite", "W8A16g32sym"),
        ("smollm3", "W4A16g32sym"),
        ("glm4", "gguf:q3_k"),
        ("mixtral", "W8A16g32sym"),
        ("qwen3_moe", "gguf:q4_k"),
    ],
)
def test_llama_cpp_computes_what_was_tuned(tmp_path, monkeypatch, family, scheme):
    """By transformers from the file alone where it reads such files, and by llama.cpp."""
    made = quantized(tmp_path, family, scheme)
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    assert code == 0, text
    done = verify(tmp_path / "g", python=PYTHON)
    assert not RUNS or (done.reader == "llama.cpp" and done.loader == "passed")
    decoded = family in ("gemma3_text", "phi3", "qwen3_moe")
    assert decoded == ((done.decoded_rms if RUNS else done.logits_rms) is not None)
    if decoded:
        assert (done.decoded_rms if RUNS else done.logits_rms) < 2e-4
    elif not RUNS:
        assert f"of '{family}' models" in done.loader and "llama.cpp not run" in done.loader


def test_the_text_model_of_a_wrapper(tmp_path):
    """Alone, as a model of its own kind."""
    config = families.wrapper_of("gemma3", "gemma3_text")
    text = config.get_text_config()
    text.vocab_size, text.query_pre_attn_scalar = 300, text.head_dim
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_config(config).bfloat16()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "text.txt").write_text(TEXT)
    made = artifact(tmp_path / "m", tmp_path / "a", "W8A16g32sym")
    code, said = export(made, tmp_path / "g", "--to", "gguf")
    assert code == 0, said
    assert "the file has the text model of 'gemma3' alone" in " ".join(said.split())
    done = verify(tmp_path / "g", python=PYTHON)
    rms = done.decoded_rms if RUNS else done.logits_rms
    assert rms is not None and rms < 1e-2 and done.loader != "failed"
    report = json.loads((tmp_path / "g" / "report.json").read_text())
    assert any("vision" in name for name in report["left_out"])


@pytest.mark.skipif(not RUNS, reason="no llama-cpp-python")
@pytest.mark.parametrize(
    "family, what, wrong",
    [
        ("mixtral", "spot", lambda s, full, own: Spot(own.tensor, own.part and 5 - own.part)),
        ("granite", "rows", lambda s, full, own: None),
        ("smollm3", "rows", lambda s, full, own: None),
    ],
)
def test_a_wrong_order_is_found_by_llama_cpp(tmp_path, monkeypatch, family, what, wrong):
    made = quantized(tmp_path, family, "W8A16g32sym")
    right = getattr(Architecture, what)

    def spoilt(self, full, *count):
        return wrong(self, full, right(self, full, *count))

    monkeypatch.setattr(Architecture, what, spoilt)
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    assert code == 1 and "logits differ" in text and not (tmp_path / "g").exists(), text


@pytest.mark.skipif(not RUNS, reason="no llama-cpp-python")
@pytest.mark.parametrize(
    "family, key",
    [
        ("gemma3_text", "attention.sliding_window"),
        ("gemma3_text", "attention.sliding_window_pattern"),
        ("gemma3_text", "rope.freq_base_swa"),
        ("gemma3_text", "rope.scaling.factor"),
        ("granite", "attention.scale"),
        ("granite", "embedding_scale"),
        ("granite", "residual_scale"),
        ("glm4", "rope.dimension_count"),
    ],
)
def test_a_key_that_is_left_out_is_found_by_llama_cpp(tmp_path, monkeypatch, family, key):
    made = quantized(tmp_path, family, "W8A16g32sym")
    right = Architecture.of

    def spoilt(config):
        known = right(config)
        del known.metadata[f"{known.name}.{key}"]
        return known

    monkeypatch.setattr(Architecture, "of", spoilt)
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    assert code == 1 and "logits differ" in text and not (tmp_path / "g").exists(), text


def test_experts_lie_in_one_tensor_and_routers_in_float32(tmp_path, monkeypatch):
    made = quantized(tmp_path, "qwen3_moe", "W4A16g32sym")
    code, text = export(made, tmp_path / "g", "--to", "gguf", "--embeddings", "q8_0")
    assert code == 0, text
    reader = gguf.Reader(next((tmp_path / "g").glob("*.gguf")))
    found = {n: (e.shape, e.kind.name) for n, e in reader.entries.items() if "blk.1.ffn" in n}
    assert found == {
        "blk.1.ffn_norm.weight": ((256,), "F32"),
        "blk.1.ffn_gate_inp.weight": ((5, 256), "F32"),
        "blk.1.ffn_gate_exps.weight": ((5, 256, 256), "Q4_0"),
        "blk.1.ffn_up_exps.weight": ((5, 256, 256), "Q4_0"),
        "blk.1.ffn_down_exps.weight": ((5, 256, 256), "Q4_0"),
    }


def test_experts_of_several_types_are_refused(tmp_path, monkeypatch):
    override = "overrides.*.experts.1.up_proj=W8A16g32sym"
    made = quantized(tmp_path, "qwen3_moe", "W4A16g32sym", [override])
    code, text = export(made, tmp_path / "g", "--to", "gguf")
    words = "experts of 'blk.0.ffn_up_exps.weight' would be in"
    assert code == 2 and words in text and "give them the same scheme" in text, text
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    "family, keys",
    [
        (
            "gemma3_text",
            {
                "attention.sliding_window": 8,
                "attention.sliding_window_pattern": 2,
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 1e3,
                "rope.scaling.type": "linear",
                "context_length": 128,
            },
        ),
        ("phi3", {"attention.sliding_window": 0}),
        (
            "granite",
            {
                "attention.scale": 0.1,
                "embedding_scale": 3.0,
                "residual_scale": 0.3,
                "logit_scale": 2.0,
            },
        ),
        ("smollm3", {"rope.dimension_count": 64}),
        ("glm4", {"rope.dimension_count": 32}),
        ("mixtral", {"expert_count": 5, "expert_used_count": 2}),
        ("qwen3_moe", {"expert_count": 5, "expert_feed_forward_length": 256}),
    ],
)
def test_the_keys_of_a_family(family, keys):
    known = Architecture.of(config_of(family))
    assert {k: known.metadata[f"{known.name}.{k}"] for k in keys} == keys


@pytest.mark.parametrize(
    "family, change, words",
    [
        ("gemma3_text", dict(query_pre_attn_scalar=128), "scales scores by the root of 64"),
        ("gemma3_text", dict(attn_logit_softcapping=30.0), "does not cap attention scores"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "does not look ahead"),
        (
            "gemma3_text",
            dict(layer_types=["full_attention", "sliding_attention"] * 2),
            "repeats windows with a period",
        ),
        ("gemma3_text", dict(hidden_activation="silu"), "gates with GELU by tanh in 'gemma3'"),
        ("phi3", dict(head_dim=32), "wants heads as wide as the model"),
        ("granite", dict(residual_multiplier=0.0), "a multiplier of 0"),
        ("smollm3", dict(no_rope_layers=[1, 0, 1, 0]), "rotates all but every 4th block"),
        (
            "smollm3",
            dict(rope_parameters=dict(LLAMA3_ROPE)),
            "not among those that GGUF export knows of 'smollm3': default, linear",
        ),
        ("qwen3_moe", dict(norm_topk_prob=False), "sum to 1"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), "wants experts in every block"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, change, words):
    with pytest.raises(LowbitError, match=words):
        Architecture.of(config_of(family, **change))


@pytest.mark.parametrize(
    "family, full, words",
    [
        ("glm4", "model.layers.0.mlp.down_proj.bias", "no place in 'glm4'"),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj.bias", "no place in 'qwen3moe'"),
        ("gemma3_text", "model.layers.0.adapter.weight", "no place in 'gemma3'"),
    ],
)
def test_parameters_without_a_place_are_refused(family, full, words):
    with pytest.raises(LowbitError, match=words):
        Architecture.of(config_of(family)).spot(full)


def test_both_names_of_an_expert_are_one_spot():
    known = Architecture.of(config_of("mixtral"))
    for name in ("mlp.experts.3.gate_proj", "block_sparse_moe.experts.3.w1"):
        assert known.spot(f"model.layers.1.{name}.weight") == Spot("blk.1.ffn_gate_exps.weight", 3)


# --- tokenizers -----------------------------------------------------------------------------------

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer(folder, kind):
    regex = {"llama-bpe": LLAMA_3, "smaug-bpe": LLAMA_3, "qwen2": QWEN_2, "tekken": TEKKEN}.get(
        kind
    )
    tok = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if regex:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif kind == "smollm":
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    if kind == "nfkc":
        tok.normalizer = normalizers.NFKC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [
        helpers.TEXT[:2000],
        *tokens.SAMPLES,
        "It's 1234567 o'clock\n\n  We'LL see HelloWorld naïve Привет мир",
    ] * 3
    tok.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    T.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "smollm"])
def test_the_splitting_rule_is_recognised(tmp_path, kind):
    found = tokens.read(tokenizer(tmp_path, kind), 640)
    said = found.metadata
    assert (
        said["tokenizer.ggml.pre"] == kind
        and said["tokenizer.ggml.model"] == "gpt2"
        and said["tokenizer.chat_template"] == "{{ messages }}"
    )
    assert (
        len(said["tokenizer.ggml.tokens"]) == 640
        and said["tokenizer.ggml.tokens"][639] == "[PAD639]"
        and said["tokenizer.ggml.token_type"][639] == 5
    )
    assert (
        said["tokenizer.ggml.token_type"][1] == 3
        and said["tokenizer.ggml.bos_token_id"] == 1
        and said["tokenizer.ggml.add_bos_token"] is False
    )


def cut_by_llama_cpp(path, texts):
    """Ids of texts by the tokenizer of a file."""
    code = (
        "import json,sys,llama_cpp; m=llama_cpp.Llama(sys.argv[1],vocab_only=True,verbose=False); "
        "print(json.dumps([m.tokenize(t.encode(),add_bos=True) for t in json.loads(sys.argv[2])]))"
    )
    done = subprocess.run(
        [PYTHON, "-c", code, str(path), json.dumps(texts)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not RUNS, reason="no llama-cpp-python")
@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "smollm"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path, kind):
    folder = tokenizer(tmp_path, kind)
    own = T.AutoTokenizer.from_pretrained(folder)
    found = tokens.read(folder, 600)
    path = tmp_path / "v.gguf"
    with gguf.Writer(path, {"general.architecture": "llama", **found.metadata}, []):
        pass
    texts = [
        *tokens.SAMPLES,
        "It's 1234567 o'clock\n\n  We'LL see HelloWorld\t x\r\n",
        helpers.TEXT[:300],
        "   leading, trailing   ",
        "naïve Привет 1 22 333 4444",
    ]
    assert cut_by_llama_cpp(path, texts) == [own(t).input_ids for t in texts]


@pytest.mark.parametrize(
    "kind, words", [("nfkc", "normalizes text by"), ("prefix", "splits text by")]
)
def test_tokenizers_that_gguf_cannot_express(tmp_path, kind, words):
    with pytest.raises(LowbitError, match=words):
        tokens.read(tokenizer(tmp_path, kind), 600)


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(LowbitError, match="has no tokenizer.json"):
        tokens.read(tmp_path, 10)
    tok = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    T.PreTrainedTokenizerFast(tokenizer_object=tok).save_pretrained(tmp_path)
    with pytest.raises(LowbitError, match="of type WordLevel, which GGUF export does not know"):
        tokens.read(tmp_path, 10)
    unknown = tokenizer(tmp_path, "qwen2")
    path = Path(unknown) / "tokenizer.json"
    path.write_text(path.read_text().replace(r"\\p{N}|", r"\\p{N}{1,2}|"))
    with pytest.raises(
        LowbitError, match="by a rule that is not among those of llama.cpp known here"
    ):
        tokens.read(tmp_path, 640)
    with pytest.raises(LowbitError, match="the model's vocabulary ends at 99"):
        tokens.read(tokenizer(tmp_path, "gpt-2"), 100)


def test_a_sentencepiece_tokenizer(tmp_path):
    """BPE with bytes to fall back on and spaces as U+2581: scores fall with the merges."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    pieces = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"]
    vocab |= {p: 259 + i for i, p in enumerate(pieces)}
    tok = Tokenizer(
        models.BPE(
            vocab,
            [("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tok.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    T.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    said = tokens.read(tmp_path, 265).metadata
    assert (
        said["tokenizer.ggml.model"] == "llama"
        and said["tokenizer.ggml.add_space_prefix"] is True
        and "tokenizer.ggml.merges" not in said
    )
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    # Of its first merge.
    assert (
        scores["ab"] > scores["\u2581a"] > scores["\u2581ab"] > scores["a"]
        and scores["\u2581ab"] == -2.0
    )
    types = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x41>"], types["ab"]) == (2, 3, 6, 1)


def gemma_tokenizer(folder):
    """Spaces become U+2581 before a split at spaces, which then finds none."""
    bytes_ = {f"<0x{i:02X}>": 3 + i for i in range(256)}
    letters = sorted({c for t in tokens.SAMPLES for c in t.replace(" ", "\u2581")})
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_}
    merges = [("o", "n"), ("c", "e"), ("\u2581", "a"), ("on", "ce"), ("\u2581", "t")]
    for piece in [*letters, *(a + b for a, b in merges)]:
        vocab.setdefault(piece, len(vocab))
    tok = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "\u2581")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    T.PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(vocab)


def test_a_split_at_spaces_that_are_gone_changes_nothing(tmp_path):
    found = tokens.read(tmp_path, gemma_tokenizer(tmp_path))
    said = found.metadata
    assert said["tokenizer.ggml.model"] == "llama" and not found.remarks
    assert said["tokenizer.ggml.add_space_prefix"] is False
    if RUNS:
        path = tmp_path / "v.gguf"
        with gguf.Writer(path, {"general.architecture": "gemma3", **said}, []):
            pass
        assert cut_by_llama_cpp(path, list(found.samples)) == list(found.samples.values())
