"""Which arithmetic is taken: by the device, the checkpoint, what was asked, and what was measured."""

import json
from itertools import count

import pytest
import torch
from helpers import save_tiny
from transformers import PretrainedConfig
from typer.testing import CliRunner

from lowbit import arithmetic
from lowbit.arithmetic import compute_dtype, measured_gain, multiplies_bfloat16
from lowbit.cli import app, evaluation
from lowbit.errors import LowbitError
from lowbit.run.quantize import quantize

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A processor with or without instructions, and how much faster it was measured to be."""
    measured = []

    def make(avx: bool, amx: bool, gain: float) -> list[float]:
        monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(arithmetic, "measured_gain", lambda: measured.append(gain) or gain)
        arithmetic._gain.cache_clear()
        return measured

    yield make
    arithmetic._gain.cache_clear()


@pytest.mark.parametrize(
    ("device", "avx", "amx", "gain", "found"),
    [
        ("cpu", False, False, 9.0, False),
        ("cpu", True, False, 2.0, True),
        ("cpu", True, False, 0.5, False),  # there are such processors
        ("cpu", False, True, 4.3, True),
        ("cpu", True, True, 1.1, False),
        ("cuda", False, False, 0.1, True),
    ],
)
def test_where_products_in_bfloat16_are_faster(processor, device, avx, amx, gain, found) -> None:
    measured = processor(avx, amx, gain)
    assert multiplies_bfloat16(torch.device(device)) is found
    assert bool(measured) is (device == "cpu" and (avx or amx))


@pytest.mark.parametrize("left", [None, "no json", "[1, 2]", '{"other": 3.0}'])
def test_what_was_measured_is_remembered(processor, tmp_path, left) -> None:
    measured = processor(True, False, 2.0)
    cpu, path = torch.device("cpu"), tmp_path / "cache" / "bfloat16.json"
    if left is not None:
        path.parent.mkdir()
        path.write_text(left)
    assert multiplies_bfloat16(cpu)
    arithmetic._gain.cache_clear()  # as another process
    processor(True, False, 0.5)
    assert multiplies_bfloat16(cpu)
    assert measured == [2.0]
    assert 2.0 in json.loads(path.read_text()).values()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written(processor, monkeypatch, tmp_path) -> None:
    processor(True, False, 2.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    assert multiplies_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("seconds", "gain"),
    [((3.0, 1.0), 3.0), ((1.0, 2.0), 0.5)],  # of a product in float32, in bfloat16
)
def test_the_gain_is_a_ratio_of_the_shortest_turns(seconds, gain) -> None:
    turns = count()

    def clock() -> float:  # read before and after every product; odd turns are disturbed
        at = next(turns)
        product, after = divmod(at, 2)
        disturbed = 5.0 if product // 2 % 2 else 0.0
        clock.now += (seconds[product % 2] + disturbed) if after else 0.1
        return clock.now

    clock.now = 0.0
    assert measured_gain(clock) == pytest.approx(gain)


@pytest.mark.parametrize(
    ("asked", "device", "stored", "hidden", "faster", "found"),
    [
        ("auto", "cpu", BF16, 576, True, BF16),
        ("auto", "cpu", F16, 4096, True, BF16),
        ("auto", "cpu", BF16, 576, False, F32),
        ("auto", "cpu", BF16, 256, True, F32),  # narrow
        ("auto", "cpu", F32, 4096, True, F32),
        ("auto", "cuda", F16, 64, True, F16),
        ("auto", "cuda", F32, 4096, True, F32),
        ("float32", "cuda", BF16, 4096, True, F32),
        ("bfloat16", "cpu", F32, 64, False, BF16),
        ("float16", "cpu", BF16, 64, False, F16),
    ],
)
def test_the_dtype_of_forward_passes(
    processor, asked, device, stored, hidden, faster, found
) -> None:
    processor(True, False, 2.0 if faster else 0.5)
    assert compute_dtype(asked, torch.device(device), stored, hidden) is found


def test_another_dtype_is_refused() -> None:
    with pytest.raises(LowbitError, match="float8"):
        compute_dtype("float8", torch.device("cpu"), BF16, 64)


# --- from the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("m") / "m")


def lowbit(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize(
    ("words", "computed"),
    [((), "torch.float32"), (("--dtype", "bfloat16"), "torch.bfloat16")],
    ids=["auto", "bfloat16"],
)
def test_quantize(model, tmp_path, words, computed) -> None:
    given = ("--recipe", "rtn", "--scheme", "W4A16g8", "--samples", 4, "--length", 16)
    out = tmp_path / "out"
    code, said = lowbit("quantize", model, *given, "--calib", model / "text.txt", *words, "-o", out)
    assert code == 0, said
    report = json.loads((out / "report.json").read_text())
    assert report["compute"] == computed
    assert ("--dtype" in report["command"]) is bool(words)


def test_a_run_is_continued_only_by_the_same_arithmetic(model, tmp_path) -> None:
    def stopped(done):
        raise KeyboardInterrupt

    given = ("W4A16g8", "rtn")
    more = {"samples": 4, "length": 16, "calib": str(model / "text.txt"), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        quantize(model, *given, **more, dtype="bfloat16", progress=stopped)
    with pytest.raises(LowbitError, match="arithmetic in torch.bfloat16 where this run's is in"):
        quantize(model, *given, **more)
    assert quantize(model, *given, **more, dtype="bfloat16").report["compute"] == "torch.bfloat16"


@pytest.mark.parametrize("load", ["whole", "blocks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eval_says_what_it_computed_in(model, tmp_path, dtype, load) -> None:
    file = tmp_path / "e.json"
    given = ("--text", model / "text.txt", "--length", 16, "--windows", 2, "--load", load)
    code, said = lowbit("eval", model, *given, "--dtype", dtype, "--json", file)
    assert code == 0 and f"in {dtype}" in said, said
    assert json.loads(file.read_text())["dtype"] == dtype


@pytest.mark.parametrize("command", ["quantize", "plan", "eval"])
def test_a_dtype_that_is_not_there(model, tmp_path, command) -> None:
    more = {
        "quantize": ("--recipe", "rtn", "--scheme", "W4A16g8", "-o", tmp_path / "o"),
        "plan": ("--scheme", "W4A16g8"),
        "eval": ("--text", model / "text.txt", "--length", 16),
    }[command]
    code, said = lowbit(command, model, *more, "--dtype", "float8")
    assert code == 2 and "unknown dtype 'float8'" in said, said
    assert not (tmp_path / "o").exists()


def test_a_config_that_names_no_hidden_size_is_computed_in_float32(processor) -> None:
    processor(True, False, 2.0)
    config = PretrainedConfig(dtype=BF16)
    assert evaluation._arithmetic("auto", "cpu", config) == "float32"
    config.hidden_size = 576
    assert evaluation._arithmetic("auto", "cpu", config) == "bfloat16"
