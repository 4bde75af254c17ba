"""Perplexity, KL and top-1 agreement: equal to the definition written out in float64, and no wrong
model goes unnoticed.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EVALUATED
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.errors import LowbitError
from lowbit.evaluate import Evaluation, Tally, continue_text, evaluate, load_causal_lm

VOCAB = 37


def llama(seed: int, vocab: int = VOCAB) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(0)


@pytest.fixture(scope="module")
def other() -> Any:
    return llama(1)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """A sharded checkpoint."""
    path = tmp_path / "model"
    model.save_pretrained(path, max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [e / sum(exps) for e in exps]


def by_definition(logits: Tensor, ids: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """(nll, kl, top1) in plain Python floats: position t predicts token t + 1, the last predicts
    nothing.
    """
    nll = kl = same = 0.0
    count = 0
    for w in range(len(ids)):
        for t in range(ids.shape[1] - 1):
            given, wanted = logits[w, t].double().tolist(), reference[w, t].double().tolist()
            p, q = softmax(given), softmax(wanted)
            nll -= math.log(p[int(ids[w, t + 1])])
            kl += sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True) if b > 0)
            same += given.index(max(given)) == wanted.index(max(wanted))
            count += 1
    return nll / count, kl / count, same / count


def check(found: Evaluation, expected: tuple[float, float, float]) -> None:
    nll, kl, top1 = expected
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.top1 == top1


# --- against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
def test_percentiles_and_errors_are_numpys(windows: Tensor, rows: int) -> None:
    torch.manual_seed(3)
    ids = windows[:rows]
    logits, reference = (torch.randn(rows, 12, VOCAB, dtype=torch.float64) for _ in range(2))
    p, q = (t[:, :-1].log_softmax(-1) for t in (logits, reference))
    kl = (q.exp() * (q - p)).sum(-1).flatten().numpy()
    nll = -p.gather(-1, ids[:, 1:, None]).flatten().numpy()
    same = (p.argmax(-1) == q.argmax(-1)).flatten().double().numpy()
    tally = Tally()
    tally.add(logits.float(), ids, reference.float())
    found = tally.result()
    n = len(kl)
    assert found.kl_median == pytest.approx(np.percentile(kl, 50), rel=1e-5)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-5)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-5)
    assert found.kl_error == pytest.approx(kl.std(ddof=1) / n**0.5, rel=1e-5)
    assert found.top1_error == pytest.approx(same.std(ddof=1) / n**0.5, rel=1e-6)
    error = np.exp(nll.mean()) * nll.std(ddof=1) / n**0.5
    assert found.perplexity_error == pytest.approx(error, rel=1e-5)


def test_a_single_token_has_no_error() -> None:
    tally = Tally()
    tally.add(torch.randn(1, 2, VOCAB), torch.zeros(1, 2, dtype=torch.int64))
    found = tally.result()
    assert found.perplexity_error is None and found.kl is None and found.kl_p99 is None


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 4 * VOCAB, 1 << 24])
def test_a_tally_is_the_definition(
    monkeypatch: pytest.MonkeyPatch, windows: Tensor, scale: float, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr("lowbit.evaluate.tally.SUMMED", at_once)
    torch.manual_seed(int(scale))
    logits = (scale * torch.randn(5, 12, VOCAB)).to(dtype)
    reference = (logits + 0.3 * scale * torch.randn(5, 12, VOCAB)).to(dtype)
    tally = Tally()
    tally.add(logits[:2], windows[:2], reference[:2])
    tally.add(logits[2:], windows[2:], reference[2:])
    found = tally.result()
    check(found, by_definition(logits, windows, reference))
    assert (found.tokens, found.windows, found.length) == (5 * 11, 5, 12)


def test_an_evaluation_is_the_definition(model: Any, other: Any, windows: Tensor) -> None:
    with torch.no_grad():
        expected = by_definition(model(windows).logits, windows, other(windows).logits)
    check(evaluate(model, windows, other), expected)


def test_uniform_logits_have_the_vocabulary_as_perplexity(windows: Tensor) -> None:
    tally = Tally()
    tally.add(torch.zeros(5, 12, VOCAB), windows)
    assert tally.result().perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_a_model_is_at_no_distance_from_itself(model: Any, windows: Tensor) -> None:
    found = evaluate(model, windows, model)
    assert found.kl == 0.0 and found.top1 == 1.0


def test_kl_is_of_the_reference_to_the_model(model: Any, other: Any, windows: Tensor) -> None:
    one, two = evaluate(model, windows, other), evaluate(other, windows, model)
    assert one.kl
    assert two.kl
    assert one.kl > 0
    assert two.kl > 0
    assert one.kl != pytest.approx(two.kl, rel=1e-3)
    assert one.top1 == two.top1


def test_without_a_reference_there_is_no_distance(model: Any, other: Any, windows: Tensor) -> None:
    alone, beside = evaluate(model, windows), evaluate(model, windows, other)
    assert alone.kl is None and alone.top1 is None
    assert (alone.nll, alone.tokens) == (beside.nll, beside.tokens)


@pytest.mark.parametrize("batch", [1, 2, 3, 100, 0])
def test_the_batch_changes_nothing(model: Any, other: Any, windows: Tensor, batch: int) -> None:
    found, expected = evaluate(model, windows, other, batch=batch), evaluate(model, windows, other)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert (found.top1, found.tokens) == (expected.top1, expected.tokens)


def test_the_batch_shrinks_to_what_fits_and_progress_is_told(
    monkeypatch: pytest.MonkeyPatch, model: Any, windows: Tensor
) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, windows, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(5, 5)]
    for limit, expected in (
        (2 * 12 * VOCAB, [(2, 5), (4, 5), (5, 5)]),
        (1, [(i, 5) for i in range(1, 6)]),
    ):
        seen.clear()
        monkeypatch.setattr("lowbit.evaluate.perplexity._LOGITS_AT_ONCE", limit)
        found = evaluate(model, windows, progress=lambda done, of: seen.append((done, of)))
        assert seen == expected and found.batch == expected[0][0]


def test_the_same_evaluation_twice_is_the_same(model: Any, other: Any, windows: Tensor) -> None:
    assert evaluate(model, windows, other) == evaluate(model, windows, other)


def test_as_dict_has_these_keys_and_goes_through_json(model: Any, windows: Tensor) -> None:
    found = evaluate(model, windows).as_dict()
    assert list(found) == [*EVALUATED]
    assert json.loads(json.dumps(found)) == found


# --- numbers at the edge --------------------------------------------------------------------------


def test_a_token_that_neither_model_allows_does_not_count() -> None:
    logits, reference = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    ids = torch.tensor([[0, 1, 2]])
    tally, smaller = Tally(), Tally()
    smaller.add(logits[..., :4], ids, reference[..., :4])
    logits[..., 4] = reference[..., 4] = -math.inf
    tally.add(logits, ids, reference)
    assert tally.result().kl == pytest.approx(smaller.result().kl, rel=1e-6)


def test_a_token_that_only_the_model_rules_out_is_infinitely_far() -> None:
    logits, ids = torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]])
    forbids = logits.clone()
    forbids[..., 4] = -math.inf
    tally = Tally()
    tally.add(forbids, ids, logits)
    assert tally.result().kl == math.inf


@pytest.mark.parametrize("which", ["model", "reference"])
def test_not_a_number_stays_one(which: str) -> None:
    logits, reference, ids = torch.zeros(1, 3, 5), torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]])
    (logits if which == "model" else reference)[0, 1, 0] = math.nan
    tally = Tally()
    tally.add(logits, ids, reference)
    found = tally.result()
    assert found.kl is not None and math.isnan(found.kl)
    assert math.isnan(found.perplexity) == (which == "model")


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[..., 4] = 1e4
    tally = Tally()
    tally.add(logits, torch.tensor([[0, 1, 2]]))
    assert tally.result().perplexity == math.inf and tally.result().nll == pytest.approx(1e4)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 12), (3, 1), (12,)])
def test_windows_that_predict_nothing_are_refused(model: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(LowbitError, match="nothing to evaluate"):
        evaluate(model, torch.zeros(shape, dtype=torch.int64))


def test_an_empty_tally_has_no_result() -> None:
    with pytest.raises(LowbitError, match="nothing to evaluate"):
        Tally().result()


def test_a_token_outside_the_vocabulary_is_refused(model: Any) -> None:
    with pytest.raises(LowbitError, match=f"token id {VOCAB}, the vocabulary ends at {VOCAB - 1}"):
        evaluate(model, torch.tensor([[0, VOCAB]]))


def test_a_reference_with_another_vocabulary_is_refused(model: Any, windows: Tensor) -> None:
    with pytest.raises(
        LowbitError, match=f"reference has {VOCAB + 3} tokens in its vocabulary, the model {VOCAB}"
    ):
        evaluate(model, windows, llama(0, VOCAB + 3))


def test_windows_that_do_not_belong_together_are_refused() -> None:
    ids, logits = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 5)
    tally = Tally()
    tally.add(logits, ids)
    for args, says in (
        ((logits[:, :3], ids), "do not belong to"),
        ((logits[:1], ids), "do not belong to"),
        ((logits, ids, logits[..., :4]), "is it the same vocabulary?"),
        ((logits, ids, logits), "all or none a reference"),
        ((logits[:, :3], ids[:, :3]), "one length"),
    ):
        with pytest.raises(LowbitError, match=says):
            tally.add(*args)
    assert tally.result().windows == 2


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_model_loads_in_the_dtype_that_is_asked_for(
    model: Any, windows: Tensor, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    half = llama(0).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), "cpu", dtype)
    assert loaded.dtype == expected and not loaded.training
    found = evaluate(loaded, windows, half)
    assert found.kl is not None and found.kl < 1e-2


def test_a_sharded_checkpoint_is_the_model_that_was_saved(
    model: Any, windows: Tensor, folder: Path
) -> None:
    assert evaluate(load_causal_lm(str(folder), "cpu"), windows, model).kl == 0.0


def refused(where: object, dtype: str = "auto") -> str:
    with pytest.raises(LowbitError) as e:
        load_causal_lm(str(where), "cpu", dtype)
    return str(e.value)


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "is a file" in refused(folder / "config.json")
    assert "unknown dtype 'bfloat': did you mean 'bfloat16'?" in refused(folder, "bfloat")
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert "no config.json" in refused(tmp_path / "bare")


@pytest.mark.parametrize("kind", ["nonsense", "t5"])
def test_an_unsupported_family_is_refused(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    assert str(folder) in refused(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shard.unlink()
    assert shard.name in refused(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-40])
    assert shard.name in refused(folder)


def test_a_missing_tensor_is_named_and_not_made_up(tmp_path: Path) -> None:
    llama(0).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.1.mlp.down_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    assert "tensor 'model.layers.1.mlp.down_proj.weight' is missing" in refused(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    llama(0).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"][:8].clone()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    said = refused(tmp_path)
    assert "tensor 'model.norm.weight'" in said
    assert "is (8,), its config.json wants (" in said
    assert "\n" not in said


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    broken, whole = llama(0), llama(0)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    ids = torch.randint(3, 36, (2, 8), generator=torch.Generator().manual_seed(0))
    for model, reference, whose in ((broken, None, "the model"), (whole, broken, "the reference")):
        with pytest.raises(LowbitError, match=f"{whose} computes logits that are not numbers"):
            evaluate(model.eval(), ids, reference)
    with pytest.raises(LowbitError, match="the model computes logits that are not numbers"):
        continue_text(broken.eval(), lambda text, **_: {"input_ids": ids[:1]}, "def", 4)
