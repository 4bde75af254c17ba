"""Sums of an evaluation, of tasks and of an analysis against numbers that are known, or written out
in float64; and the pages that show them.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.evaluate import Tally, window_length
from lowbit.evaluate.analyze import removal as experiment
from lowbit.evaluate.analyze.kernels import Site, grids_of, mean_kernel
from lowbit.evaluate.analyze.page import write_analysis
from lowbit.evaluate.analyze.removal import Removal, knee, removals
from lowbit.evaluate.pages import write_comparison, write_page
from lowbit.evaluate.pages.page import table as html_table
from lowbit.evaluate.pages.page import write_html
from lowbit.evaluate.tasks.prepare import Source
from lowbit.evaluate.tasks.score import TaskResult, TaskResults
from lowbit.evaluate.tasks.show import notes, table

# --- perplexity and distance ----------------------------------------------------------------------


def told(logits: Tensor, ids: Tensor, reference: Tensor | None = None):
    tally = Tally()
    tally.add(logits, ids, reference)
    return tally.result()


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("vocab", [2, 5, 1000])
def test_a_model_that_prefers_one_token(k: float, vocab: int) -> None:
    """Logit k on token 0 and 0 elsewhere: p(0) = e^k / (e^k + V - 1), and against it a reference
    that prefers token 1 as much is k (e^k - 1) / (e^k + V - 1) away.
    """
    ids = torch.tensor([[0, 0, 0, 0]])
    logits, other = torch.zeros(1, 4, vocab), torch.zeros(1, 4, vocab)
    logits[..., 0], other[..., 1] = k, k
    total = math.exp(k) + vocab - 1
    found = told(logits, ids, other)
    # Log-probabilities are float32, of numbers up to 12.
    assert found.nll == pytest.approx(math.log(total) - k, rel=1e-5, abs=5e-6)
    assert found.kl == pytest.approx(k * (math.exp(k) - 1) / total, rel=1e-5, abs=1e-9)
    assert found.top1 == (1.0 if k == 0 else 0.0)


def test_a_position_predicts_the_next_token_and_the_last_predicts_nothing() -> None:
    ids, k = torch.tensor([[3, 1, 4, 1, 5]]), 2.0
    logits = torch.zeros(1, 5, 7)
    for at, following in enumerate([1, 4, 1, 5]):
        logits[0, at, following] = k
    logits[0, 4] = -math.inf  # whatever it says
    assert told(logits, ids).nll == pytest.approx(math.log(math.exp(k) + 6) - k, rel=1e-6)


@pytest.mark.parametrize("shift", [-1e4, -3.0, 0.0, 100.0, 1e4])
def test_logits_count_up_to_a_constant(shift: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(2, 5, 7, generator=g), torch.randint(0, 7, (2, 5), generator=g)
    logits = (logits * 64).round() / 64  # so that nothing is lost where it is shifted
    moved = told(logits + shift, ids, logits)
    assert moved.nll == pytest.approx(told(logits, ids).nll, rel=1e-6)
    assert moved.kl == pytest.approx(0, abs=1e-9) and moved.top1 == 1.0


@pytest.mark.parametrize("step", [1e-6, 1e-5, 1e-4, 1e-3])
def test_a_small_distance_is_not_lost_in_rounding(step: float) -> None:
    """In float64 from the very float32 logits; KL grows with the square of the step."""
    g = torch.Generator().manual_seed(2)
    reference = 4 * torch.randn(1, 9, 500, generator=g)
    logits = reference + step * torch.randn(1, 9, 500, generator=g)
    p, q = (x[:, :-1].double().log_softmax(-1) for x in (logits, reference))
    expected = float((q.exp() * (q - p)).sum(-1).mean())
    found = told(logits, torch.zeros(1, 9, dtype=torch.int64), reference).kl
    assert found >= 0 and found == pytest.approx(expected, rel=0.05 if step < 1e-5 else 1e-2)


def test_windows_count_by_their_tokens_and_not_by_their_calls() -> None:
    g = torch.Generator().manual_seed(3)
    logits, ids = torch.randn(7, 6, 11, generator=g), torch.randint(0, 11, (7, 6), generator=g)
    reference = torch.randn(7, 6, 11, generator=g)
    whole = told(logits, ids, reference)
    for sizes in ((1,) * 7, (3, 4), (6, 1)):
        tally, at = Tally(), 0
        for n in sizes:
            tally.add(logits[at : at + n], ids[at : at + n], reference[at : at + n])
            at += n
        found = tally.result()
        assert (found.nll, found.kl, found.top1) == (whole.nll, whole.kl, whole.top1)
        assert (found.windows, found.tokens, found.batch) == (7, 35, max(sizes))
    assert told(logits, ids).batch == 7


def test_sums_of_ranks_are_those_of_one() -> None:
    """Each rank tells its own sums; a rank without a window adds nothing."""
    g = torch.Generator().manual_seed(4)
    logits, ids = torch.randn(3, 6, 11, generator=g), torch.randint(0, 11, (3, 6), generator=g)
    reference = torch.randn(3, 6, 11, generator=g)
    whole, sums = told(logits, ids, reference), []
    for part in (slice(0, 2), slice(2, 3)):
        tally = Tally()
        tally.add(logits[part], ids[part], reference[part])
        tally.merge(SimpleNamespace(everyone=lambda own: sums.append(own) or [own]))  # type: ignore[arg-type]
    merged = Tally()
    merged.add(logits[:2], ids[:2], reference[:2])
    merged.merge(SimpleNamespace(everyone=lambda own: sums))  # type: ignore[arg-type]
    found = merged.result(batch=2)
    assert (found.nll, found.kl) == pytest.approx((whole.nll, whole.kl), rel=1e-12)
    assert (found.top1, found.tokens, found.windows) == (whole.top1, 15, 3)
    assert (found.kl_p99, found.kl_max) == (whole.kl_p99, whole.kl_max)


@pytest.mark.parametrize(
    ("context", "asked", "found"),
    [
        (128, None, 128),
        (4096, None, 2048),
        (None, None, 2048),
        (128, 64, 64),
        (128, 128, 128),
        (4096, 4096, 4096),
        (128, 129, None),
    ],
)
def test_the_length_of_a_window(context: int | None, asked: int | None, found: int | None) -> None:
    config = T.PretrainedConfig(max_position_embeddings=context)
    if found is not None:
        assert window_length(config, asked) == found
        assert context is not None or window_length(T.PretrainedConfig(), asked) == found
        return
    with pytest.raises(LowbitError, match=f"^--len {asked} is beyond the model's context of "):
        window_length(config, asked, "--len")


# --- tasks ----------------------------------------------------------------------------------------


def result(
    name: str, cut: int = 0, examples: int = 40, source: Source | None = None, **metrics: float
):
    errors = {m: 0.0123 for m in metrics if m != "acc_norm"}
    return TaskResult(
        name, examples, 3, metrics, errors, cut, source or Source("f.jsonl", "ab" * 32)
    )


@pytest.mark.parametrize(
    ("each", "mean", "averaged"),
    [
        ([], None, ()),
        ([result("a", acc=0.5)], 0.5, ("a",)),
        ([result("a", acc=0.25, acc_norm=1.0), result("b", acc=0.75, examples=4)], 0.5, ("a", "b")),
        ([result("w", perplexity=9.0)], None, ()),
        ([result("w", perplexity=9.0), result("b", acc=0.1)], 0.1, ("b",)),
    ],
)
def test_every_task_counts_alike_in_the_mean(each, mean, averaged) -> None:
    found = TaskResults(tuple(each), "0.4.13")
    assert found.mean_acc == mean and found.averaged == averaged
    data = found.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data["each"]) == [r.name for r in each] and data["mean_acc"] == mean


def test_a_result_as_data() -> None:
    part = result("p", acc=0.5)
    whole = TaskResult("g", 40, 3, {"acc": 0.5, "acc_norm": 0.25}, {"acc": 0.1}, 2, Source("d", "s", "x", "y"), (part,))  # fmt: skip
    assert whole.as_dict() == {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "acc_norm": 0.25,
        "acc_norm_stderr": None,
        "examples": 40,
        "shots": 3,
        "cut": 2,
        "source": {"data": "d", "sha256": "s", "shots": "x", "shots_sha256": "y"},
        "parts": {"p": part.as_dict()},
    }
    assert part.as_dict()["source"] == {"data": "f.jsonl", "sha256": "ab" * 32}


def test_the_table_and_the_notes_of_tasks() -> None:
    hub = Source("hub: o/n", shots="s.jsonl", shots_sha256="cd" * 32)
    each = (
        result("a", acc=0.5, acc_norm=0.25),
        result("b", 2, acc=0.75, source=hub),
        result("w", perplexity=12.345),
    )
    found = TaskResults(each, "0.4.13", limit=40)
    shown = table(found)
    cells = list(zip(*([str(c.header), *map(str, c.cells)] for c in shown.columns), strict=True))
    assert (
        cells
        == [
            ("task", "acc", "acc_norm", "perplexity", "examples", "shots"),
            ("a", "50.00 +- 1.23", "25.00", "", "40", "3"),
            ("b", "75.00 +- 1.23", "", "", "40", "3"),
            ("w", "", "", "12.35 +- 0.012", "40", "3"),
            ("mean of 2", "62.50", "", "", "", ""),
        ]
        or cells[3][3] == "12.34 +- 0.012"
    )
    assert notes(found) == [
        "a: f.jsonl, sha256 abababababababab",
        "b: hub: o/n; shots s.jsonl, sha256 cdcdcdcdcdcdcdcd",
        "w: f.jsonl, sha256 abababababababab",
        "mean: acc, every task counted once, over a, b",
        "b: 2 of 40 prompts lost their beginning to fit into the model's context",
        "only the first 40 examples of each task, of each subject in a group: not what papers report",
    ]
    alone = TaskResults(each[:1], "0.4.13")
    assert len(notes(alone)) == 1 and table(alone).row_count == 1


# --- an analysis ----------------------------------------------------------------------------------


def test_the_counts_of_an_input_by_hand() -> None:
    """Maxima of the tokens are 8, 4; of the channels 8, 4, 2, 0. A4: steps of a token are 8 / 7 and
    4 / 7, of a channel 8 / 7, 4 / 7, 2 / 7: what is below half a step becomes zero.
    """
    x = torch.tensor([[[8.0, 0.5, -0.5, 0.0], [0.2, -4.0, 2.0, 0.0]]])
    site = Site(("a", "b"))
    site.add(x, grids_of([4], [1.0, 0.0], "call"))
    found = site.as_dict()
    assert (site.elements, site.zeros, found["zeros"]) == (8, 2, 0.25)
    # A token's half steps, 0.571 and 0.286: 0.5, -0.5 and 0.2 go. A channel's, 0.571, 0.286, 0.143.
    assert found["kernel"] == {
        "A4 per token": 3 / 6,
        "A4 per column": 1 / 6,
        "A4 CrossQuant 1": 3 / 6,
        "A4 CrossQuant 0": 1 / 6,
    }
    # Channels below their token's: three of the first, 2 and 0 of the second.
    assert found["smaller_channel"] == 5 / 8
    assert (found["largest"], found["outlier_channels"], found["channels"]) == (8.0, 1, 4)
    assert found["channel_spread"] == 8 / 2 and found["token_spread"] == 8 / 4
    site.add(x, grids_of([4], [1.0, 0.0], "call"))
    assert site.as_dict() == {**found, "elements": 16}


def test_an_input_that_is_zero_has_no_kernel() -> None:
    site = Site(("a",))
    site.add(torch.zeros(1, 2, 3), grids_of([8], [], "call"))
    found = site.as_dict()
    assert found["zeros"] == 1.0 and found["kernel"] == {"A8 per token": 0, "A8 per column": 0}
    assert found["channel_spread"] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(LowbitError, match="^'layers.3.q' gets activations that are not finite: "):
        Site(("layers.3.q",)).add(torch.tensor([[1.0, bad]]), [])


def test_each_linear_counts_alike_in_a_mean() -> None:
    one = Site(("a", "b", "c"), elements=10, zeros=0, kernel={"g": 5})
    two = Site(("d",), elements=1000, zeros=900, kernel={"g": 10})
    assert mean_kernel([one, two], "g") == pytest.approx((3 * 0.5 + 0.1) / 4)


@pytest.mark.parametrize(
    ("bits", "exponents", "columns", "words"),
    [
        ([1], [], "call", "activation bits must be 2 to 8 (or 16 for none), got 1."),
        ([8, 9], [], "call", "got 9."),
        ([8], [1.5], "call", "row_exponent must be in [0, 1], got 1.5."),
        ([8], [], "row", "columns must be one of call, sequence, got 'row'."),
    ],
)
def test_grids_that_are_none(bits, exponents, columns: str, words: str) -> None:
    with pytest.raises(LowbitError) as e:
        grids_of(bits, exponents, columns)
    assert str(e.value).endswith(words)


def test_the_runs_of_the_experiment() -> None:
    grids = grids_of([8], [0.15], "call")
    labels = [(r.label, r.share) for r in removals([0.2, 0.1], grids)]
    assert labels == [
        ("none", 0.0),
        *((kind, s) for kind in ("bound", "smallest", "random") for s in (0.1, 0.2)),
        ("A8 per token, quantized", 0.0),
        ("A8 per token, restored", 0.0),
        ("A8 per column, quantized", 0.0),
        ("A8 CrossQuant 0.15, quantized", 0.0),
    ]
    for share in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(LowbitError, match=r"shares to remove must be in \(0, 1\), got 0.5, "):
            removals([0.5, share], grids)


@pytest.mark.parametrize(
    ("kind", "share", "gone"),
    [
        ("bound", 1 / 3, {(0, 1), (0, 2)}),  # 1 and 3 of 100; 1 and 2 of 10 stay
        ("smallest", 1 / 3, {(0, 1), (1, 1)}),
        ("bound", 0.5, {(0, 1), (0, 2), (1, 1)}),
        ("smallest", 0.5, {(0, 1), (1, 1), (1, 2)}),
        ("smallest", 0.0, set()),
        ("none", 0.5, set()),
    ],
)
def test_which_elements_are_set_to_zero(kind: str, share: float, gone) -> None:
    x = torch.tensor([[100.0, 1.0, 3.0], [10.0, -1.0, 2.0]])
    y = Removal(kind, share)(x, torch.Generator())  # type: ignore[arg-type]
    assert {tuple(at) for at in (y != x).nonzero().tolist()} == gone
    assert bool((y[y != x] == 0).all())


@pytest.mark.parametrize(
    ("points", "tolerance", "found"),
    [
        ([], 0.01, None),
        ([(0.1, 10.0)], 0.0, None),
        ([(0.5, 12.0)], 0.1, 0.25),
        ([(0.2, 10.5), (0.4, 11.5)], 0.1, 0.3),
        ([(0.2, 9.0), (0.4, 11.0)], 0.0, 0.3),
        ([(0.2, 10.0), (0.4, math.inf)], 0.1, 0.2),
        ([(0.2, 10.0), (0.4, math.nan)], 0.1, 0.2),
    ],
)
def test_where_perplexity_bends(points, tolerance: float, found: float | None) -> None:
    assert knee(points, 10.0, tolerance) == (None if found is None else pytest.approx(found))
    assert set(experiment.KINDS) == {"bound", "smallest", "random"}


# --- pages ----------------------------------------------------------------------------------------

ROW = dict(scheme="W4A16", recipe="rtn", bits=4.25, bytes=10**6, perplexity=12.34567, kl=0.0123456, top1=0.91, seconds=12.34, blocks=[{"before": 2.0, "after": 1.0}])  # fmt: skip
FAILED = dict(scheme="W2", recipe="<b>", error="a < b & c | d")


def test_a_comparison_in_all_its_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lowbit.evaluate.pages.comparison.has_matplotlib", lambda: False)
    tasks = {
        "each": {"b": {"acc": 0.5}, "a": {"acc": 0.25}, "w": {"perplexity": 3.0}},
        "mean_acc": 0.375,
    }
    more = dict(perplexity_error=1.23, kl_error=0.001, kl_median=0.01, kl_p99=0.2, kl_max=3.14159)
    rows = [{**ROW, **more, "tasks": tasks}, {**ROW, "recipe": "awq"}, FAILED]
    write_comparison(tmp_path, rows, "t <&> u")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "comparison.csv", "comparison.json", "comparison.md", "report.html",
    ]  # fmt: skip
    assert json.loads((tmp_path / "comparison.json").read_text()) == {
        "title": "t <&> u",
        "rows": rows,
    }
    with (tmp_path / "comparison.csv").open(newline="") as f:
        cells = list(csv.reader(f))
    assert cells == [
        ["scheme", "recipe", "bits/weight", "bytes", "perplexity", "perplexity error", "KL", "KL error", "KL median", "KL 99%", "KL max", "top-1", "top-1 error", "a", "b", "w", "mean acc", "seconds"],
        ["W4A16", "rtn", "4.250", "1000000", "12.3457", "1.2", "0.01235", "0.001", "0.01", "0.2", "3.142", "0.9100", "", "0.2500", "0.5000", "", "0.3750", "12.3"],
        ["W4A16", "awq", "4.250", "1000000", "12.3457", "", "0.01235", "", "", "", "", "0.9100", "", "", "", "", "", "12.3"],
        ["W2", "<b>", "", "", "failed: a < b & c | d", *[""] * 13],
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert (
        "<p>t &lt;&amp;&gt; u</p>" in page
        and "<li>&lt;b&gt;, W2: a &lt; b &amp; c | d</li>" in page
    )
    assert "<p>Plots need matplotlib: <code>pip install 'lowbit[report]'</code>.</p>" in page
    text = (tmp_path / "comparison.md").read_text().splitlines()
    assert (
        text[0] == "t \\<\\&\\> u"
        and len({len(re.findall(r"(?<!\\)\|", x)) for x in text[2:]}) == 1
    )


def test_the_page_of_the_demo(tmp_path: Path) -> None:
    row = dict(ROW, sample="def <f>", losses=[(2.0, 1.0)], verified="as tuned", hash="ab" * 32)
    plain = dict(ROW, recipe="float", kl=None, top1=None, sample="x", losses=[])
    assert write_page(tmp_path, [plain, row], "t & u") == tmp_path / "report.html"
    page = (tmp_path / "report.html").read_text()
    assert (
        "<td>float</td><td>W4A16</td><td>4.250</td><td>1.00</td><td>12.346</td><td>-</td><td>-</td>"
        in page
    )
    assert "<td>0.0123</td><td>91.0%</td><td>12.3</td>" in page
    assert "<pre>def &lt;f&gt;</pre>" in page and "rtn: as tuned; hash abababababababab</p>" in page
    assert json.loads((tmp_path / "demo.json").read_text())["title"] == "t & u"


def test_the_page_of_an_analysis(tmp_path: Path) -> None:
    site = Site(("model.layers.0.q", "model.layers.0.k"))
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    site.add(x, grids_of([8], [], "call"))
    data = {
        "title": "a < b",
        "grids": ["A8 per token", "A8 per column"],
        "sites": [site.as_dict()],
        "mean": {"A8 per token": 0.125, "A8 per column": 0.0},
        "removals": [
            {"kind": "none", "share": 0.0, "grid": None, "perplexity": 10.0},
            {"kind": "quantized", "share": 0.0, "grid": "A8 per token", "perplexity": 10.5},
        ],
        "knees": {},
    }
    page = write_analysis(tmp_path / "new" / "place", data).read_text()
    assert "<p>a &lt; b</p>" in page and "<td>model.layers.0.q, k</td>" in page
    assert "<td>A8 per token</td><td>12.500%</td><td>10.5000</td><td></td>" in page
    assert json.loads((tmp_path / "new" / "place" / "analysis.json").read_text()) == data


def test_a_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    write_comparison(tmp_path, [ROW], "t")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|<link|src=\"(?!data:)|https?://(?!www\.w3\.org)", page)


def test_cells_are_text_and_pages_whole(tmp_path: Path, monkeypatch) -> None:
    assert html_table(["<a>"], [['"&"'], []]) == (
        "<table><tr><th>&lt;a&gt;</th></tr><tr><td>&quot;&amp;&quot;</td></tr><tr></tr></table>"
    )
    page = tmp_path / "p.html"
    write_html(page, "a</title>", ["x\udcff"])
    assert "<title>a&lt;/title&gt;</title>" in page.read_text() and "x?" in page.read_text()
    before = page.read_text()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_html(page, "other", [])
    assert page.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_random_removals_repeat_by_their_seed() -> None:
    x = torch.tensor([[random.Random(0).uniform(1, 2) for _ in range(64)]])
    one, two, three = (
        Removal("random", 0.5)(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert int((one == 0).sum()) == int((three == 0).sum()) == 32
