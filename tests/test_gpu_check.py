"""The rehearsal of `benchmarks/gpu.py`: every section runs, and one that fails stops no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        import gpu

        return gpu
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def bench(gpu):
    return gpu.Bench(torch.device("cpu"), True)


def section(gpu, run, seconds=5):
    return gpu.Section(run, seconds)


def test_the_rehearsal_runs_every_section(gpu, tmp_path):
    out = tmp_path / "made" / "gpu.json"
    command = [sys.executable, FOLDER / "gpu.py", out, "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = json.loads(out.read_text())
    assert list(found) == list(gpu.SECTIONS)
    assert done.returncode == 0 and gpu.failures(found) == [], (gpu.failures(found), done.stderr)
    assert all(len(v) > 1 or v == {"left out": "no CUDA"} for v in found.values())
    assert found["tiles"]["left out"] == "no CUDA"
    assert [*found["runs"]][:2] == ["fast", "default"]
    assert all(
        r["peak_GiB"] > 0 < r["planned_GiB"]["peak"]
        for r in map(found["runs"].get, ("fast", "default"))
    )
    assert sum(s.seconds for s in gpu.SECTIONS.values()) <= 480


def broken(b, out):
    out["first"] = 1
    raise RuntimeError("broken on purpose")


def slow(b, out):
    out["first"] = 1
    while True:
        time.sleep(0.01)


def swallows(b, out):
    try:
        slow(b, out)
    except Exception:
        out["second"] = 2


@pytest.mark.parametrize(
    "run, seconds, words",
    [
        (broken, 5, "broken on purpose"),
        (slow, 1, "longer than it may"),
        (swallows, 1, "longer than it may"),
    ],
)
def test_a_section_that_fails_keeps_what_it_had(gpu, bench, run, seconds, words):
    found = gpu.found(section(gpu, run, seconds), bench, 60)
    assert found["first"] == 1 and "second" not in found
    assert words in found["failed"].splitlines()[-1] and found["took"] >= 0
    assert gpu.failures({"a": found, "b": {"took": 1}}) == ["a"]


def test_a_section_without_time_is_left_out(gpu, bench):
    assert "left out" in gpu.found(section(gpu, broken, 30), bench, 29)


def test_what_does_not_agree_is_a_failure(gpu):
    found = {"agreement": {"beyond": ["gptq: float16"], "grams": {"failed": "why"}}}
    assert gpu.failures(found) == ["agreement: gptq: float16", "agreement/grams"]


@pytest.mark.parametrize("usable", [True, False])
def test_the_others_run_though_one_fails(gpu, monkeypatch, tmp_path, usable):
    """In a process of its own where the device is no longer to be used in this one."""
    ran, out = [], tmp_path / "gpu.json"
    sections = {n: section(gpu, lambda b, out, n=n: ran.append(n)) for n in "xyz"}
    sections["x"] = section(gpu, broken)
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "usable", lambda b: usable)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(out), "--rehearse", "--only", "x,y,z"])

    def execv(program, command):
        monkeypatch.setattr(sys, "argv", command[1:])
        monkeypatch.setattr(gpu, "usable", lambda b: True)
        raise SystemExit(gpu.main())

    monkeypatch.setattr(gpu.os, "execv", execv)
    if usable:
        assert gpu.main() == 1
    else:
        with pytest.raises(SystemExit, match="1"):
            gpu.main()
    assert ran == ["y", "z"]
    assert list(json.loads(out.read_text())) == ["x", "y", "z"]


@pytest.mark.parametrize(
    "arguments, words",
    [(["--only", "steps"], "no section is called 'steps'"), ([], "no CUDA GPU is here")],
)
def test_what_cannot_be_run_is_said(gpu, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "out.json", *arguments])
    with pytest.raises(SystemExit) as e:
        gpu.main()
    assert e.value.code == 2 and words in capsys.readouterr().err
