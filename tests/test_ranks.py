"""Several processes share a run: they end where one does, and the user hears what happens to any of
them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from families import config_of
from helpers import LLAMA, save_tiny
from ranks_worker import tuned

import lowbit
from lowbit.errors import LowbitError, ToldElsewhere
from lowbit.machine import device_of_rank
from lowbit.methods._batches import gathered
from lowbit.methods._rounding.hardening import quantile
from lowbit.model.ranks import ALONE, RankGone, Ranks, _answered
from lowbit.run.launch import _KEPT, _Voices, joined

TESSERAQ = ["tesseraq.precision=float32", "tesseraq.schedule=exponential-4-4", "tesseraq.iters=4"]
WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def torchrun(*command):
    """What two processes have done, see `finished`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return finished(*launcher, *command)


def finished(*command):
    """The finished process, its output in ``said``, all whitespace single."""
    source = str(Path(lowbit.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,  # of four processes on few, busy cores
        check=False,
    )
    done.said = " ".join((done.stdout + done.stderr).split())
    return done


def job(folder, **what):
    path = folder / "job.json"
    path.write_text(json.dumps(what))
    return path


def arguments(model, out, **changes):
    given = dict(
        model=model,
        scheme="W2A16g16",
        recipe="tesseraq",
        out=str(out),
        calib=f"{model}/text.txt",
        samples=9,
        length=32,
        settings=TESSERAQ,
    )
    return {**given, **changes}


# --- one process of several -----------------------------------------------------------------------


def test_rows_are_dealt_in_turn():
    ranks = [Ranks(r, 3) for r in range(3)]
    for rows in range(11):
        assert sorted(i for r in ranks for i in r.mine(rows)) == list(range(rows))
        assert [r.count(rows) for r in ranks] == [len(r.mine(rows)) for r in ranks]
        assert max(r.count(rows) for r in ranks) - min(r.count(rows) for r in ranks) <= 1
        assert [i for r in ranks for i in range(rows)[r.share(rows)]] == list(range(rows))
    # The first rows of all are the first of each.
    assert all(r.mine(10)[: r.count(4)] == r.mine(4) for r in ranks)


def test_tokens_are_found_where_their_rows_are():
    length, rows = 5, 7
    tokens = torch.arange(rows * length).view(rows, length)
    picked = torch.randperm(rows * length)[:12]
    held = [tokens[list(Ranks(r, 3).mine(rows))].flatten() for r in range(3)]
    local = [Ranks(r, 3).tokens(picked, length) for r in range(3)]
    found = torch.cat([h[at] for h, at in zip(held, local, strict=True)])
    assert sorted(found.tolist()) == sorted(picked.tolist())
    own = [t for t in picked.tolist() if t // length % 3 == 1]
    assert held[1][local[1]].tolist() == own  # in the order drawn
    assert ALONE.tokens(picked, length) is picked


def test_alone_nothing_is_exchanged():
    t = torch.ones(2)
    ALONE.sum_(t)
    ALONE.max_(t)
    ALONE.agree("nothing", {"a": 1}, "")
    assert (
        t.tolist() == [1, 1]
        and ALONE.broadcast(5) == 5
        and ALONE.total(2, 3.5) == [2, 3.5]
        and ALONE.first
    )
    assert [
        s.tolist()
        for s in gathered(ALONE, torch.tensor([2, 0]), [torch.arange(3)], torch.device("cpu"))
    ] == [[2, 0]]
    with joined("cpu", print) as ranks:
        assert ranks is ALONE


def test_errors_of_communication_become_ours_and_lack_of_memory_does_not():
    with pytest.raises(RankGone, match="closed"), _answered():
        raise RuntimeError("Connection closed by peer\nmore")
    with pytest.raises(torch.OutOfMemoryError), _answered():
        raise torch.OutOfMemoryError("out of memory")


class Store(dict):
    """torchrun's store, as far as it is used."""

    def add(self, key, amount):
        self[key] = self.get(key, 0) + amount
        return self[key]

    def check(self, keys):
        return all(k in self for k in keys)

    def set(self, key, value):
        self[key] = value


def raised(voices, error):
    with pytest.raises(LowbitError) as found, voices.heard():
        raise error
    return found.value


def test_one_rank_tells_the_user(monkeypatch):
    monkeypatch.setattr("lowbit.run.launch._GRACE", 0.1)
    voices = [_Voices(store, r, 3, print) for store in [Store()] for r in range(3)]
    errors = [raised(v, LowbitError("bad input.")) for v in voices]  # the same everywhere
    assert str(errors[0]) == "bad input." and [type(e) for e in errors[1:]] == [ToldElsewhere] * 2
    voices = [_Voices(store, r, 3, print) for store in [Store()] for r in range(3)]
    assert str(raised(voices[2], LowbitError("bad disk."))) == "rank 2 of 3: bad disk."
    assert isinstance(raised(voices[0], RankGone("closed")), ToldElsewhere)
    voices = [_Voices(store, r, 3, print) for store in [Store({"alive/2": ""})] for r in range(3)]
    assert "rank 1 of 3 is gone (closed)" in str(
        raised(voices[0], RankGone("[a/b.cc:5] closed. GLHF"))
    )
    memory = raised(_Voices(Store(), 1, 2, print), torch.OutOfMemoryError("no"))
    assert "rank 1 of 2 is out of memory" in str(memory)


def test_one_thread_of_a_rank_speaks_at_a_time(monkeypatch):
    """The end of another rank arrives twice, as a closed connection and as torchrun's signal:
    whoever is second waits for the first.
    """
    monkeypatch.setattr("lowbit.run.launch._GRACE", 0.1)
    said, ended, voices = [], threading.Event(), None
    monkeypatch.setattr("lowbit.run.launch.os._exit", lambda code: ended.set())
    near, far = socket.socketpair()
    voices = _Voices(Store(), 0, 2, said.append)
    threading.Thread(target=voices._listen, args=(near,), daemon=True).start()
    far.send(bytes([signal.SIGTERM]))
    while not voices._ending:
        time.sleep(0.001)
    assert isinstance(raised(voices, RankGone("closed")), ToldElsewhere)
    assert ended.is_set() and said == ["rank 1 of 2 is gone (all were told to end). " + _KEPT]


def test_what_cannot_be_shared_is_refused(model, tmp_path, monkeypatch):
    two = Ranks(0, 2)
    for changes, said in (
        (dict(samples=1, recipe="rtn", settings=[]), "2 processes cannot share 1 calibration rows"),
        (
            dict(scheme="W8A8g16", recipe="crossquant", settings=[]),
            "use one process. --set activations.columns=sequence keeps rows apart",
        ),
        (dict(scheme="W8A8g16", recipe="llm-int8", settings=[]), "use one process"),
    ):
        with pytest.raises(LowbitError, match=said):
            lowbit.quantize(**arguments(model, tmp_path / "out", **changes), ranks=two)
    monkeypatch.setattr("lowbit.machine.pick_device", torch.device)
    for name, said in (
        ("cuda:0", "one GPU for all"),
        ("xpu", "not on 'xpu'"),
        ("cuda", "has no GPU, there are 0"),
    ):
        with pytest.raises(LowbitError, match=said):
            device_of_rank(name, 0)


# --- two processes --------------------------------------------------------------------------------

# (scheme, recipe, settings, computed in float64)
CELLS = [
    ("W2A16g16", "rtn", [], False),
    ("W2A16g16", "gptq", [], False),
    ("W2A16g16", "awq", ["awq.clip_tokens=100"], False),
    ("W2A16g16", "tesseraq", TESSERAQ, False),
    # A row a step: the second rank's part is empty.
    (
        "W2A16g16",
        "omniquant",
        ["omniquant.epochs=1"],
        False,
    ),
    ("W4A4g16", "omniquant", ["omniquant.epochs=1", "omniquant.batch=3"], False),
    (
        "W4A8g16",
        "crossquant-deploy",
        ["crossquant.rows=1", "crossquant.search=true", "crossquant.search_rows=1"],
        False,
    ),
    # A pass over the model before the first block, as below.
    (
        "W4A8g16",
        "crossquant-deploy",
        ["crossquant.fold=group"],
        True,
    ),
    ("W2A16", "claq-ap", ["claq.allocation=greedy", "claq.scope=model"], True),
    ("W4A8g16", "smoothquant+gptq", ["smoothquant.rows=1", "gptq.rows=1"], True),
    ("W2A16g16", "gptq+tesseraq", [*TESSERAQ, "tesseraq.rounds=2", "tesseraq.batch=3"], True),
    ("W2A16g16", "omniquant", ["omniquant.epochs=1", "omniquant.batch=2"], True),
]
# On which model.
CELLS = [("llama", *cell) for cell in CELLS]
CELLS += [
    (name, "W3A16g16", "gptq+tesseraq", [*TESSERAQ, "tesseraq.batch=3"], True)
    for name in ("gemma4 with shared keys", "glm_moe_dsa with shared indices")
]


@pytest.fixture(scope="module")
def models(model, tmp_path_factory):
    return {
        name: model
        if name == "llama"
        else str(save_tiny(tmp_path_factory.mktemp("model"), config_of(name), torch.float32))
        for name in dict.fromkeys(name for name, *_ in CELLS)
    }


@pytest.fixture(scope="module")
def twice(model, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cells = [(models[name], *cell) for name, *cell in CELLS]
    differ = [
        arguments(model, folder / "out"),
        arguments(model, folder / "out", settings=[*TESSERAQ[:-1], "tesseraq.iters=3"]),
    ]
    done = torchrun(
        WORKER, job(folder, do="tune", cells=cells, differ=differ, out=str(folder / "out.pt"))
    )
    assert done.returncode == 0, done.said
    assert not list(folder.glob("out*.partial"))
    return torch.load(folder / "out.pt", weights_only=False), [
        (folder / f"out.pt.{r}").read_text() for r in range(2)
    ]


@pytest.mark.parametrize(
    "number",
    range(len(CELLS)),
    ids=lambda i: "-".join([*CELLS[i][:3], *["wide"] * CELLS[i][4]]),
)
def test_two_ranks_end_where_one_does(models, twice, number):
    # Sums of other parts round otherwise: in float32 a code near a tie may flip, and GPTQ carries
    # it along its row. One rank that takes its rows in other batches differs as much. In float64
    # there is no tie so near among so few weights.
    name, *cell = CELLS[number]
    one, two = tuned(models[name], *cell), twice[0][number]
    assert one["codes"].keys() == two["codes"].keys()
    differing = sum(int((q != two["codes"][n]).sum()) for n, q in one["codes"].items())
    assert differing <= (0 if cell[-1] else 5e-3 * sum(q.numel() for q in one["codes"].values()))
    assert two["float"].perplexity == pytest.approx(one["float"].perplexity, rel=1e-6)
    assert two["quantized"].perplexity == pytest.approx(one["quantized"].perplexity, rel=1e-3)
    assert (
        two["quantized"].tokens == one["quantized"].tokens
        and two["quantized"].windows == one["quantized"].windows
    )
    for a, b in zip(one["notes"], two["notes"], strict=True):
        assert b["loss_before"] == pytest.approx(a["loss_before"], rel=1e-3) and b[
            "loss_after"
        ] == pytest.approx(a["loss_after"], rel=1e-2)


# --- four processes: work by the weight is dealt out ----------------------------------------------

# (model, scheme, recipe, settings): computed in float64, where no tie hides what was divided.
DEALT = [
    ("wide", "gguf:q4_k", "gptq", ["gptq.act_order=true"]),
    ("small", "W2A16", "claq-ap", ["claq.outlier_bits=0.28"]),
    ("small", "W2A16g16", "awq+gptq", ["awq.exponents=4", "awq.clip_tokens=100"]),
    ("small", "W2A16g16", "awq+tesseraq", [*TESSERAQ, "tesseraq.batch=3", "awq.scales=false"]),
    # A level table a row, divided; one for a whole matrix, which is not.
    ("small", "W2A16:row", "gptq+tesseraq", [*TESSERAQ, "tesseraq.rounds=2"]),
    ("small", "W2A16:tensor", "tesseraq", TESSERAQ),
    ("qwen3_moe", "W3A16g8", "awq+gptq", ["awq.exponents=2"]),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    experts = config_of("qwen3_moe")
    experts.vocab_size, experts.num_hidden_layers = 300, 1
    small = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})
    configs = {"wide": llama_of_256(), "small": small, "qwen3_moe": experts}
    return {
        name: str(save_tiny(tmp_path_factory.mktemp("model"), config, torch.float32))
        for name, config in configs.items()
    }


def llama_of_256():
    """Wide enough for K-quants, with linears of fewer rows than four ranks take in 64s."""
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=128)
    return transformers.LlamaConfig(vocab_size=300, **sizes, **heads, bos_token_id=1)


@pytest.fixture(scope="module")
def four(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    cells = [(wide[name], *cell, True) for name, *cell in DEALT]
    done = finished(WORKER, job(folder, do="deal", cells=cells, out=str(folder / "out.pt")), 4)
    assert done.returncode == 0, done.said[-2000:]
    return [torch.load(f"{folder / 'out.pt'}.{r}", weights_only=False) for r in range(4)]


@pytest.mark.parametrize("number", range(len(DEALT)), ids=lambda i: "-".join(DEALT[i][:3]))
def test_four_ranks_find_what_one_does_and_divide_the_work(wide, four, number):
    name, *cell = DEALT[number]
    one, all_ = tuned(wide[name], *cell, True), [found[number] for found, _ in four]
    for found in all_:
        for linear, q in one["coded"].items():
            assert torch.equal(found["codes"][linear], q.codes), linear
            # What was received is what was made: the same bits on all ranks.
            assert all_[0]["coded"][linear].same_as(found["coded"][linear]) is None
        assert found["notes"][0].get("trouble") == one["notes"][0].get("trouble")
    # Each rank says what it does itself: together everything, and once what is not cut: experts, of
    # which there are more than ranks, and what has levels by columns.
    for what in ("codes of", "clip of"):
        alone = worked_on(one["announced"], what)
        said = sum((worked_on(found["announced"], what) for found in all_), Counter())
        assert set(said) == set(alone)
        for linear in alone:
            uncut = "experts" in linear or "claq" in cell[1]
            assert said[linear] == alone[linear] if uncut else said[linear] >= alone[linear]


# Two machines of two: steps are made on each of them, all else among all.
MACHINES = [
    ("small", "W2A16g16", "gptq+tesseraq", [*TESSERAQ, "tesseraq.rounds=2", "tesseraq.batch=3"]),
    ("small", "W2A16:row", "tesseraq", TESSERAQ),
]


@pytest.fixture(scope="module")
def machines(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    cells = [(wide[name], *cell, True) for name, *cell in MACHINES]
    task = job(folder, do="deal", cells=cells, out=str(folder / "out.pt"))
    done = finished(WORKER, task, 4, 2)
    assert done.returncode == 0, done.said[-2000:]
    return [torch.load(f"{folder / 'out.pt'}.{r}", weights_only=False)[0] for r in range(4)]


@pytest.mark.parametrize("number", range(len(MACHINES)), ids=lambda i: "-".join(MACHINES[i][:3]))
def test_machines_that_make_the_same_steps_end_alike(wide, machines, number):
    name, *cell = MACHINES[number]
    one = tuned(wide[name], *cell, True)
    for found in machines:
        for linear, q in one["coded"].items():
            assert torch.equal(found[number]["codes"][linear], q.codes), linear
            first = machines[0][number]["coded"][linear]
            assert first.same_as(found[number]["coded"][linear]) is None


def worked_on(announced, what):
    """Linear -> how often work on it was announced."""
    lists = [a.split(f": {what} ")[1].split(", ") for a in announced if f": {what} " in a]
    return Counter(name for names in lists for name in names)


def test_every_rank_has_every_result_of_pieces_done_once(four):
    for _, dealt in four:
        assert [i for i, _ in dealt["found"]] == list(range(6))
        made, value = dealt["found"][3][1], dealt["value"]
        assert made["none"][1] is None
        for a, b in (
            (made["wide"], value["wide"]),
            *zip(made["pair"], value["pair"], strict=True),
            *((made["none"][i], value["none"][i]) for i in (0, 2)),
        ):
            assert a.dtype == b.dtype and torch.equal(a, b)
        # Whoever it was, all say the same: of the first piece that failed.
        assert dealt["failed"] == "piece 2 cannot be done."
    assert sorted(i for _, dealt in four for i in dealt["worked"]) == list(range(6))
    assert [len(dealt["worked"]) for _, dealt in four] == [1, 1, 2, 2]


def test_a_quantile_over_ranks_is_that_of_all_values(four):
    for _, dealt in four:
        for values, q, found in dealt["quantiles"]:
            assert torch.equal(found, quantile(values, q)), q


def test_a_dead_rank_is_named_and_another_number_of_ranks_goes_on(model, tmp_path):
    out = tmp_path / "out"
    done = torchrun(WORKER, job(tmp_path, do="quantize", dies=1, arguments=arguments(model, out)))
    assert (
        done.returncode != 0
        and "rank 1 of 2 is gone" in done.said
        and "with any number of ranks" in done.said
    )
    assert "lowbit/" not in done.said.split("Traceback", 1)[-1]  # torchrun prints one of its own
    # Raised by the other rank, or said by it if torchrun ended it first.
    assert done.said.count("rank 1 of 2 is gone") == 1
    assert {p.name for p in out.with_name("out.partial").glob("shard-*.json")} >= {
        "shard-00000.json",
        "shard-00001.json",
    }
    resumed = []
    made = lowbit.quantize(**arguments(model, out), progress=lambda d: resumed.append(d.resumed))
    assert (
        resumed == [True, False]
        and made.verification.loader == "passed"
        and made.report["ranks"] == 1
    )


class Stop(Exception):
    pass


def test_a_run_of_one_goes_on_with_two_by_the_command(model, tmp_path):
    out = tmp_path / "out"

    def stop(done):
        raise Stop

    with pytest.raises(Stop):
        lowbit.quantize(**arguments(model, out), progress=stop)
    options = [
        "--scheme",
        "W2A16g16",
        "--calib",
        f"{model}/text.txt",
        "--samples",
        "9",
        "--length",
        "32",
        *(x for s in TESSERAQ for x in ("--set", s)),
    ]
    done = torchrun("-m", "lowbit", "quantize", model, "-o", out, *options)
    assert done.returncode == 0, done.said
    # Rank 0 alone speaks.
    assert done.said.count("1/2 (resumed)") == 1 and done.said.count("verified:") == 1
    report = json.loads((out / "report.json").read_text())
    assert (
        report["ranks"] == 2 and len(report["blocks"]) == 2 and not list(tmp_path.glob("*.partial"))
    )
    again = lowbit.quantize(**arguments(model, out))  # the same run, whatever the number of ranks
    assert again.repeated and again.verification.loader == "passed"


def test_ranks_that_differ_say_in_what(twice):
    said = (
        "the run differs between ranks: recipe.tesseraq.iters is 4 on rank 0, 3 on rank 1. Start "
        "all of them with the same command, files and versions."
    )
    assert twice[1] == [said, said]


def test_an_error_of_one_rank_ends_all_and_is_told_once(model, tmp_path):
    done = torchrun(
        WORKER,
        job(
            tmp_path,
            do="quantize",
            raises=1,
            arguments=arguments(model, tmp_path / "out", recipe="rtn", settings=[]),
        ),
    )
    assert done.returncode != 0
    assert (
        done.said.count("LowbitError: ") == 1
        and "LowbitError: rank 1 of 2: there is something wrong here." in done.said
    )


def test_a_block_that_differs_is_named():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.distributed.all_gather_object",
            lambda out, value, group: out.__setitem__(
                slice(None), [value, {**value, "b.weight": "f" * 32}]
            ),
        )
        with pytest.raises(
            LowbitError,
            match=r"the tuned 'layers.3' differs between ranks: b.weight is 000000000000... on rank 0, ffffffffffff... on rank 1. Same\?",
        ):
            Ranks(0, 2).agree("the tuned 'layers.3'", {"a": "1", "b.weight": "0" * 32}, "Same?")


def test_polish_of_two_ranks_ends_where_that_of_one_does(model, tmp_path):
    """Three rows a step, and one in another: a rank without rows waits for no other."""
    settings = ["polish.tokens=288", "polish.lr=1e-2", "polish.checks=1"]
    for batch in (3, 1):
        own = [*settings, f"polish.batch={batch}"]
        whole = lowbit.quantize(
            **{**arguments(model, tmp_path / f"a{batch}"), "recipe": "rtn+polish", "settings": own}
        )
        command = ["--recipe", "rtn+polish", "--scheme", "W2A16g16", "--calib", f"{model}/text.txt"]
        command += ["--samples", "9", "--length", "32", *(x for s in own for x in ("--set", s))]
        out = tmp_path / f"b{batch}"
        done = torchrun("-m", "lowbit", "quantize", model, "-o", out, *command)
        assert done.returncode == 0, done.said
        report = json.loads((out / "report.json").read_text())
        assert report["ranks"] == 2 and not [*out.glob("polish*"), *tmp_path.glob("*.partial")]
        one, two = whole.report["polish"], report["polish"]
        assert two["kept_step"] == one["kept_step"] > 0
        for key in ("kl_before", "kl"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)
        assert one["kl"] < 0.97 * one["kl_before"]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_polish_goes_on_with_another_number_of_ranks(model, tmp_path, before, after):
    """It ends where the whole run does, and leaves nothing behind."""
    own = ["polish.tokens=384", "polish.lr=1e-2", "polish.checks=4", "polish.batch=3"]
    given = {"recipe": "rtn+polish", "settings": own}
    whole = lowbit.quantize(**{**arguments(model, tmp_path / "a"), **given})
    out = tmp_path / "b"
    what = dict(stops="polish: step 3", arguments={**arguments(model, out), **given})
    command = ["--recipe", "rtn+polish", "--scheme", "W2A16g16", "--calib", f"{model}/text.txt"]
    command += ["--samples", "9", "--length", "32", *(x for s in own for x in ("--set", s))]
    if before == 1:

        def stopped(step):
            if step.what.startswith("polish: step 3"):
                raise Stop

        with pytest.raises(Stop):
            lowbit.quantize(**{**arguments(model, out), **given}, watch=stopped)
        assert torchrun("-m", "lowbit", "quantize", model, "-o", out, *command).returncode == 0
    else:
        assert "stopped." in torchrun(WORKER, job(tmp_path, do="quantize", **what)).said
        assert len(list((tmp_path / "b.partial").glob("polish-*"))) == 2
        lowbit.quantize(**{**arguments(model, out), **given})
    report = json.loads((out / "report.json").read_text())
    assert report["polish"]["kl"] == pytest.approx(whole.report["polish"]["kl"], rel=1e-3)
    assert report["polish"]["kept_step"] == whole.report["polish"]["kept_step"]
    assert not [*out.glob("polish*"), *tmp_path.glob("*.partial")]
