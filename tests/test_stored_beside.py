"""A finished block is stored in a thread while its outputs are computed: the same files, the same
errors, and nothing is left behind that does not count.
"""

import json
import threading
from functools import partial

import pytest
import torch
from helpers import save_tiny
from test_place import files, quantize

import lowbit.stages.blocks as blocks
from lowbit.artifact.disk import disk
from lowbit.artifact.proof import verify
from lowbit.errors import DiskFull, LowbitError, VerificationError
from lowbit.run.beside import beside
from lowbit.run.workplace import Workplace


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(autouse=True)
def no_loader(monkeypatch):
    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))


def around(monkeypatch, before):
    """Call ``before`` with a shard's number where its writing begins."""
    own = Workplace.finish

    def finish(self, number, *more):
        before(number)
        return own(self, number, *more)

    monkeypatch.setattr(Workplace, "finish", finish)


def noted(out):
    return sorted(p.name for p in out.with_name(out.name + ".partial").glob("shard-*.json"))


def test_work_is_done_beside():
    go = threading.Event()

    def work():
        assert go.wait(60)
        return torch.is_grad_enabled(), threading.current_thread() is threading.main_thread()

    done = beside(work, "some work")
    assert torch.is_grad_enabled() and any(
        t.name.startswith("some work") for t in threading.enumerate()
    )
    go.set()
    assert done() == (False, False)
    with pytest.raises(ZeroDivisionError):
        beside(lambda: 1 / 0, "no work")()


def test_a_block_is_stored_while_its_outputs_are_computed(model, tmp_path, monkeypatch):
    """Writing waits for the pass that follows, and the pass ends only when writing has begun."""
    passing, writing, own, most = threading.Event(), threading.Event(), blocks.advance, []

    def advance(*given):
        passing.set()
        assert writing.wait(60)
        writing.clear()
        return own(*given)

    def before(number):
        most.append(sum(t.name.startswith("store ") for t in threading.enumerate()))
        if number:
            writing.set()
            assert passing.wait(60)
            passing.clear()

    monkeypatch.setattr(blocks, "advance", advance)
    around(monkeypatch, before)
    told = []
    quantize(model, tmp_path / "a", progress=lambda d: told.append(d.index))
    assert told == [0, 1] and most == [0, 1, 1]
    monkeypatch.undo()
    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
    quantize(model, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def full(number):
    if number == 2:
        with disk("model-00003"):
            raise OSError(28, "No space left on device")


def differs(number):
    if number == 2:
        raise VerificationError("'model.layers.1.x': codes read back from disk differ")


def fails(number):
    if number == 2:
        raise MemoryError


@pytest.mark.parametrize(
    "before, error, words",
    [
        (full, DiskFull, "no space left on disk while writing 'model-00003'"),
        (differs, VerificationError, "'model.layers.1.x': codes read back"),
        (fails, LowbitError, r"'cpu' is out of memory \(MemoryError\)"),
    ],
)
def test_what_fails_in_the_thread_stops_the_run_at_its_block(
    model, tmp_path, monkeypatch, before, error, words
):
    told = []
    with monkeypatch.context() as patch:
        around(patch, before)
        with pytest.raises(error, match=words):
            quantize(model, tmp_path / "a", progress=lambda d: told.append((d.index, d.resumed)))
    assert told == [(0, False)] and noted(tmp_path / "a") == [
        "shard-00000.json",
        "shard-00001.json",
    ]
    quantize(model, tmp_path / "a", progress=lambda d: told.append((d.index, d.resumed)))
    assert told[1:] == [(0, True), (1, False)]
    quantize(model, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, LowbitError("in the pass")])
def test_what_stops_the_pass_waits_for_the_file(model, tmp_path, monkeypatch, error):
    """The block is finished, and counts; no thread writes on."""
    started = threading.Event()

    def advance(*_):
        assert started.wait(60)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "advance", advance)
        around(patch, lambda number: number and started.set())
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else LowbitError):
            quantize(model, tmp_path / "a")
    assert not [t for t in threading.enumerate() if t.name.startswith("store ")]
    assert noted(tmp_path / "a") == ["shard-00000.json", "shard-00001.json"]
    told = []
    quantize(model, tmp_path / "a", progress=lambda d: told.append((d.index, d.resumed)))
    assert told == [(0, True), (1, False)]


def test_the_bytes_in_the_report_are_those_of_the_files(model, tmp_path, monkeypatch):
    quantize(model, tmp_path / "a")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    entries = [e for e in report["linears"] if "skipped" not in e]
    assert all(e["bytes"] > 0 for e in entries)
    assert list(entries[0])[:5] == ["name", "scheme", "shape", "bytes", "bits_per_weight"]
    for e in entries:
        assert e["bits_per_weight"] == 8 * e["bytes"] / (e["shape"][0] * e["shape"][1])
