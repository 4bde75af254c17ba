"""The machine as a run finds it, and the standard streams as they are found."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowbit.console import Console, Table, lose_nothing
from lowbit.errors import LowbitError
from lowbit.machine import (
    control_groups,
    device_of_rank,
    forget_peaks,
    free_memory,
    give_back_memory,
    peak_memory,
    pick_device,
    reserved_memory,
)

CPU = torch.device("cpu")

# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mps", "device 'mps' has no float64, which folding factors into 16-bit norms needs. Use"),
        ("mps:0", "has no float64"),
        ("gpu", "device 'gpu' is not available here ("),
        ("", "device '' is not available here ("),
        ("cpu:x", "device 'cpu:x' is not available here ("),
        ("cuda:99", "device 'cuda:99' is not available here ("),
    ],
)
def test_a_device_that_is_not_here_is_one_sentence(name: str, words: str) -> None:
    with pytest.raises(LowbitError) as e:
        pick_device(name)
    said = str(e.value)
    assert words in said
    assert "Use --device cpu" in said and "\n" not in said


def test_a_cpu_is_always_here() -> None:
    assert pick_device("cpu") == device_of_rank("cpu", 3) == CPU


@pytest.mark.parametrize(
    ("found", "device"), [(None, "cpu"), ("mps", "cpu"), ("xpu", "xpu"), ("cuda", "cuda")]
)
def test_auto_is_an_accelerator_with_float64(monkeypatch, found: str | None, device: str) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(found))
    assert pick_device("auto").type == device


@pytest.mark.parametrize(
    ("name", "found", "local", "expected"),
    [
        ("cuda", "cuda", 0, "cuda:0"),
        ("auto", "cuda", 1, "cuda:1"),
        ("auto", "cpu", 7, "cpu"),
        ("cuda", "cuda", 2, "process 3 on this machine has no GPU, there are 2: give torchrun --nproc"),
        ("cuda:1", "cuda:1", 0, "--device cuda:1 is one GPU for all processes: use --device cuda"),
        ("xpu", "xpu", 0, "share a run on CUDA GPUs or on the CPU, not on 'xpu'. Use --device cpu"),
    ],
)  # fmt: skip
def test_each_rank_gets_a_device(monkeypatch, name, found, local: int, expected: str) -> None:
    monkeypatch.setattr("lowbit.machine.pick_device", lambda name: torch.device(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if " " not in expected:
        assert device_of_rank(name, local) == torch.device(expected)
        return
    with pytest.raises(LowbitError) as e:
        device_of_rank(name, local)
    assert expected in str(e.value)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "free"),
    [
        (SimpleNamespace(mem_get_info=lambda device: (1000, 9000)), 1000 + 300 - 100),
        (SimpleNamespace(), None),  # a kind that does not tell
    ],
)
def test_memory_of_an_accelerator_is_what_is_free_and_what_is_cached(
    monkeypatch, kind, free
) -> None:
    monkeypatch.setattr(torch, "xpu", kind)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 100)
    assert free_memory(torch.device("xpu")) == free


@pytest.mark.parametrize(
    ("groups", "text", "found"),
    [
        ([], "MemFree: 9 kB\nMemAvailable:    5 kB\n", 5120),
        ([9999, 6000], "MemAvailable: 5 kB\n", 5120),
        ([9999, 60], "MemAvailable: 5 kB\n", 60),
        ([60], "MemFree: 9 kB\n", None),
        ([60], "", None),
    ],
)
def test_memory_of_a_host_is_what_no_limit_takes_away(monkeypatch, groups, text, found) -> None:
    monkeypatch.setattr("lowbit.machine.control_groups", lambda: groups)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert free_memory(CPU) == found


@pytest.mark.parametrize(
    ("limit", "used", "stat", "left"),
    [
        ("1000", "300", "", [700]),
        ("1000", "300", "inactive_file 50\nactive_file 20\nslab_reclaimable 5\n", [775]),
        ("1000", "1300", "", [0]),
        ("1000", "1300", "inactive_file 400\n", [100]),
        ("max", "300", "", []),
        ("", "300", "", []),
        ("1000", "", "", []),
        ("1000", "300", "xinactive_file 50\ninactive_file_x 9\n", [700]),
    ],
)
def test_what_a_control_group_leaves(tmp_path: Path, limit, used, stat, left) -> None:
    group = tmp_path / "a"
    group.mkdir()
    for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
        (group / name).write_text(text)
    (tmp_path / "in").write_text("0::/a\n")
    assert control_groups(tmp_path / "in", tmp_path) == left


def test_the_peak_of_this_process_grows_with_what_it_touches() -> None:
    give_back_memory()
    before = peak_memory(CPU)
    held = torch.ones(48 << 20, dtype=torch.uint8)
    assert 0 < before <= peak_memory(CPU)
    assert peak_memory(CPU) >= held.nbytes
    del held
    give_back_memory()
    assert peak_memory(CPU) >= before


def test_the_peaks_of_an_accelerator_are_of_what_follows(monkeypatch) -> None:
    held = {"allocated": 7, "reserved": 9}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: held["allocated"])
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda _: held["reserved"])
    monkeypatch.setattr(
        torch.accelerator,
        "reset_peak_memory_stats",
        lambda _: held.update(allocated=2, reserved=3),
    )
    gpu = torch.device("cuda")
    assert (peak_memory(gpu), reserved_memory(gpu)) == (7, 9)
    forget_peaks(CPU)
    assert (peak_memory(gpu), reserved_memory(gpu)) == (7, 9)
    forget_peaks(gpu)
    assert (peak_memory(gpu), reserved_memory(gpu)) == (2, 3)
    assert reserved_memory(CPU) is None


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "errors", "text", "written"),
    [
        ("ascii", "strict", "a\u00fc\u4f60", b"a\\xfc\\u4f60"),
        ("latin-1", "strict", "\u00fc\u4f60", b"\xfc\\u4f60"),
        ("utf-8", "strict", "\u4f60\udcff", "\u4f60".encode() + b"\xff"),
        ("utf-8", "surrogateescape", "x\udc80\ud800y", b"x\x80\\ud800y"),
        ("ascii", "backslashreplace", "\U0001f600\udcff", b"\\U0001f600\xff"),
        ("ascii", "replace", "\u00fc", b"?"),  # as somebody has chosen it
        ("ascii", "ignore", "a\u00fc", b"a"),
    ],
)
def test_a_stream_loses_no_character(
    monkeypatch, encoding, errors, text: str, written: bytes
) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which has no encoding to change
    lose_nothing()
    stream.write(text)
    assert raw.getvalue() == written
    stream.detach()


@pytest.mark.parametrize("width", [20, 33, 80])
def test_a_table_on_a_terminal_loses_no_character(width: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    table = Table("head", "other")
    table.add_row("x" * 50, "y" * 7)
    Console(file=file, force_terminal=True, no_color=True, width=width).print(table)
    said = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert said.count("x") == 50 and said.count("y") == 7
    assert max(map(len, said.splitlines())) <= width


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (("a", "b"), "a b\n"),
        (("[red]a[/red]",), "[red]a[/red]\n"),
        ((":smile:",), ":smile:\n"),
        (("x" * 500,), "x" * 500 + "\n"),
        (("a\tb",), "a\tb\n"),
        ((), "\n"),
        (("",), "\n"),
    ],
)
def test_strings_are_printed_as_they_are(given: tuple[str, ...], written: str) -> None:
    file = io.StringIO()
    Console(file=file, width=20).print(*given)
    assert file.getvalue() == written
