"""Where activation streams live: bytes of the result, space on disk, what is left behind, and how
many there are at a time.
"""

import errno
import gc
import json
import os
import resource
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, apply_methods, begin, model_of, needs_of, planned, run, save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import verify
from lowbit.cli import app
from lowbit.errors import LowbitError
from lowbit.grid.names import parse_scheme
from lowbit.machine import control_groups, free_memory
from lowbit.model import storage as module
from lowbit.model.block import Block
from lowbit.model.model import Streams
from lowbit.model.storage import Storage
from lowbit.model.stream import ModelStream
from lowbit.plan import memory
from lowbit.plan.memory import Needs
from lowbit.recipe.presets import load_recipe
from lowbit.run import closing
from lowbit.run import quantize as job

CPU = torch.device("cpu")
ARGS = dict(samples=8, length=32)
FAST = ["tesseraq.schedule=exponential-4-2", "tesseraq.iters=2", "awq.exponents=3", "awq.shrinks=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True, scope="module")
def no_loader():
    """Where streams live is over when the loader comes, and it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing, "verify", partial(verify, loader=False))
        yield


def quantized(model, out, recipe="tesseraq", settings=FAST, scheme="W2A16g16", **more):
    return lowbit.quantize(
        str(model),
        scheme,
        recipe,
        out=out,
        calib=str(model / "text.txt"),
        settings=settings,
        **{**ARGS, **more},
    )


def hashes(report):
    return {name: s["sha256"] for name, s in report["shards"].items()}


def disk(folder):
    return Storage("disk", CPU, folder)


# --- the tensors ----------------------------------------------------------------------------------


def test_a_tensor_on_disk_is_a_plain_one(tmp_path):
    x = disk(tmp_path).empty((5, 3, 7), torch.bfloat16)
    y = torch.randn(5, 3, 7).bfloat16()
    for at in range(0, 5, 2):
        x[at : at + 2] = y[at : at + 2]
    assert torch.equal(x, y)
    assert torch.equal(x[torch.tensor([3, 1])], y[torch.tensor([3, 1])])
    assert type(x) is torch.Tensor and x.is_contiguous()


def test_a_file_has_no_name_and_its_space_goes_with_the_tensor(tmp_path):
    before = os.statvfs(tmp_path).f_bfree
    x = disk(tmp_path).empty((64, 1 << 20), torch.uint8)
    assert list(tmp_path.iterdir()) == []
    block = os.statvfs(tmp_path).f_frsize
    assert (
        before - os.statvfs(tmp_path).f_bfree
    ) * block > 32 << 20  # reserved before a page is written
    view = x[3:4]
    del x
    gc.collect()
    view.fill_(1)  # a view keeps the mapping
    del view
    gc.collect()
    assert (before - os.statvfs(tmp_path).f_bfree) * block < 32 << 20
    assert not [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]


def test_an_empty_stream_needs_no_file(tmp_path):
    assert disk(tmp_path / "none").empty((0, 4, 2), torch.float32).shape == (0, 4, 2)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_is_an_error_before_a_page_is_written(tmp_path):
    """A real limit rather than a patched call: this process may not make files larger than 1
    MiB.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            LowbitError,
            match=r"no room for .*4\.0 MiB wanted, more than one file may have there.*--offload-dir.*--offload host.*--samples",
        ) as caught:
            disk(tmp_path).empty((4, 1 << 20), torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        LowbitError, match=r"cannot keep activations in '.*file/below'.*--offload-dir"
    ):
        disk(tmp_path / "file" / "below").empty((1, 1), torch.float32)


def test_where_open_files_keep_their_names_they_lose_them_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_unlinked", lambda path: path)
    x = disk(tmp_path).empty((1, 1), torch.float32)
    assert len(list(tmp_path.iterdir())) == 1
    del x
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_next_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "_willneed", lambda address, size: asked.append((address - x.data_ptr(), size))
    )
    x = disk(tmp_path).empty((10, 8), torch.float32)
    disk(tmp_path).prefetch(x, slice(4, 20))
    disk(tmp_path).prefetch(x, slice(10, 12))
    disk(tmp_path).prefetch(x, torch.tensor([7, 2]))
    Storage("host", CPU).prefetch(x, slice(0, 10))
    assert asked == [(4 * 32, 6 * 32), (7 * 32, 32), (2 * 32, 32)]


def test_asking_the_system_does_not_change_what_is_there(tmp_path):
    x = disk(tmp_path).empty((3000, 33), torch.float32)
    x.copy_(torch.arange(99000.0).view(3000, 33))
    disk(tmp_path).prefetch(x, slice(17, 2900))
    disk(tmp_path).prefetch(x, torch.tensor([0, 2999]))
    assert torch.equal(x.flatten(), torch.arange(99000.0))


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_host(model, tmp_path_factory):
    return quantized(model, tmp_path_factory.mktemp("host") / "out", offload="host").report


def test_the_artifact_does_not_depend_on_where_streams_live(model, on_host, tmp_path):
    report = quantized(model, tmp_path / "out", offload="disk").report
    assert hashes(report) == hashes(on_host)
    assert report["quality"] == on_host["quality"]
    width = 2 * 24 * 32 * 64  # bfloat16; 8 rows and 16 held out
    assert on_host["offload"] == {"asked": "host", "used": "host", "bytes": 3 * width}
    assert report["offload"] == {"asked": "disk", "used": "disk", "bytes": 3 * width}
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize(
    "recipe, scheme, settings",
    [
        ("omniquant", "W2A16g16", ["omniquant.epochs=1"]),
        ("claq-ap", "W2A16", []),
        ("gptq", "W4A16g16", []),
    ],
)
def test_nor_with_other_recipes(model, tmp_path, recipe, scheme, settings):
    made = [
        quantized(model, tmp_path / place, recipe, settings, scheme, offload=place).report
        for place in ("host", "disk")
    ]
    assert hashes(made[0]) == hashes(made[1])


def test_auto_on_a_cpu_is_the_host_while_there_is_room_and_then_the_disk(
    model, tmp_path, monkeypatch
):
    wanted = []
    monkeypatch.setattr(memory, "free_memory", lambda device: wanted.append(device) or 1 << 40)
    assert quantized(model, tmp_path / "a", "rtn", []).report["offload"]["used"] == "host"
    assert wanted
    config = FAMILIES["llama"]()
    need = needs_of(
        config, load_recipe("rtn", scheme=parse_scheme("W2A16g16")), 24, 32, CPU, torch.bfloat16
    )
    monkeypatch.setattr(
        memory, "free_memory", lambda device: need.block + need.outer + need.streams - 1
    )
    assert quantized(model, tmp_path / "b", "rtn", []).report["offload"] == {
        "asked": "auto",
        "used": "disk",
        "bytes": need.streams,
    }


def test_a_disk_that_fills_up_stops_the_run_and_the_same_command_goes_on(
    model, on_host, tmp_path, monkeypatch
):
    real, calls = os.posix_fallocate, []

    def full_from(count):
        def fallocate(handle, offset, size):
            calls.append(size)
            if len(calls) >= count:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(handle, offset, size)

        return fallocate

    # Entry, target, next xq; then the second block's target.
    monkeypatch.setattr(os, "posix_fallocate", full_from(4))
    with pytest.raises(
        LowbitError, match="no room for a stream of activations .*the same command: it continues"
    ):
        quantized(model, tmp_path / "out", offload="disk")
    partial = tmp_path / "out.partial"
    assert len(list(partial.glob("shard-*.json"))) == 2  # outside the blocks, and the first block
    monkeypatch.setattr(os, "posix_fallocate", real)
    resumed = []
    elsewhere = tmp_path / "elsewhere"
    report = quantized(
        model,
        tmp_path / "out",
        offload="disk",
        offload_dir=elsewhere,
        progress=lambda b: resumed.append(b.resumed),
    ).report
    assert resumed == [True, False]
    assert hashes(report) == hashes(on_host)
    assert list(elsewhere.iterdir()) == []


def test_nothing_is_left_of_a_killed_run(model, tmp_path):
    code = (
        "import os, signal, sys, lowbit\n"
        "def stop(done): print([l for l in open('/proc/self/maps') if 'streams-' in l], "
        "flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "lowbit.quantize(sys.argv[1], 'W2A16g16', 'rtn', out=sys.argv[2], calib=sys.argv[1] + "
        "'/text.txt', samples=8, length=32,\n"
        "                offload='disk', offload_dir=sys.argv[3], progress=stop)\n"
    )
    kept = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(tmp_path / "out"), str(kept)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9
    assert f"{kept}/streams-" in done.stdout and "(deleted)" in done.stdout
    assert list(kept.iterdir()) == []


class Counting(Storage):
    """Knows which of its tensors live."""

    def empty(self, shape, dtype):
        out = super().empty(shape, dtype)
        ALIVE.append(weakref.ref(out.untyped_storage()))
        return out


ALIVE: list = []


def alive():  # no garbage collection: what waits for one takes memory
    return sum(ref() is not None for ref in ALIVE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", lambda: config)
        return save_tiny(tmp_path_factory.mktemp("deep"))


def count_after_every_pass(monkeypatch, counts):
    """Streams alive, noted when a block has run over a whole one."""
    whole = Block.run

    def counted(self, *args, **more):
        out = whole(self, *args, **more)
        counts.append(alive())
        return out

    monkeypatch.setattr(Block, "run", counted)


@pytest.mark.parametrize("name, most", [("tesseraq", 3), ("gptq", 3), ("omniquant", 4)])
def test_how_many_streams_live_at_a_time(deep, monkeypatch, name, most):
    """As `plan` counts them, in every announced step of blocks that have others before them; none
    is made after the second block.
    """
    stream = ModelStream(deep)
    settings = {"tesseraq": FAST, "omniquant": ["omniquant.epochs=1"]}.get(name, [])
    recipe = load_recipe(name, scheme=parse_scheme("W2A16g16"), settings=settings)
    storage = Counting("host", CPU)
    ALIVE.clear()
    x = stream.embed(
        torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)), storage=storage
    )
    streams = Streams(x, x, 8, storage=storage)
    del x
    counts, made = [], []
    count_after_every_pass(monkeypatch, counts)
    seen = model_of(stream, recipe, announce=lambda _: counts.append(alive()))
    blocks = run(seen, streams)
    del streams  # as a run lets go of what entered
    for after in blocks:
        made.append(len(ALIVE))
        del after
    assert max(counts) == most == planned(stream, recipe).memory.copies
    if most == 3:
        assert made == [3, 4, 4, 4]


@pytest.mark.parametrize("recipe, scheme", [("gptq", "W4A16g16"), ("claq-ap", "W3A16")])
def test_a_whole_run_holds_no_more(deep, tmp_path, monkeypatch, recipe, scheme):
    """From the first block to the last, also when it goes on after a stop, and in the pass that
    surveys a model before its first block.
    """
    counts = []
    ALIVE.clear()
    monkeypatch.setattr(job, "Storage", Counting)
    count_after_every_pass(monkeypatch, counts)

    def stop(done):
        if done.index == 2 and not done.resumed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(deep, tmp_path / "out", recipe, [], scheme, progress=stop)
    assert max(counts) == 3
    counts.clear()
    ALIVE.clear()
    report = quantized(deep, tmp_path / "out", recipe, [], scheme).report
    assert max(counts) == 3
    assert hashes(report) == hashes(quantized(deep, tmp_path / "again", recipe, [], scheme).report)


def test_tensors_used_again_hold_what_new_ones_would(deep):
    """The streams of four blocks, and what is learned from them, against a loop that gives every
    block fresh copies.
    """
    stream, recipe = ModelStream(deep), load_recipe("gptq", scheme=parse_scheme("W3A16g16"))
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    kwargs = stream.block_kwargs(32)
    fresh = Streams(x.clone(), x.clone(), 8)
    made = []
    tuned = run(model_of(stream, recipe), Streams(x, x, 8), made.append)
    for i, after in enumerate(tuned):
        block = made.pop()
        alone = apply_methods(begin(stream, i, recipe, fresh, kwargs[i], 0), recipe)
        fresh = Streams(alone.target.clone(), alone.run(alone.xq, alone.decoded()), 8)
        assert all(torch.equal(block.coded[n].codes, alone.coded[n].codes) for n in block.coded)
        assert torch.equal(after.x, fresh.x) and torch.equal(after.xq, fresh.xq)


def test_streams_of_the_caller_are_not_written_over(model):
    stream = ModelStream(model)
    x = stream.embed(torch.randint(3, 280, (12, 32), generator=torch.Generator().manual_seed(0)))
    before = x.clone()
    recipe = load_recipe("rtn", scheme=parse_scheme("W2A16g16"))
    for _ in run(model_of(stream, recipe), Streams(x, x, 8)):
        pass
    assert torch.equal(x, before)


# --- what is free, what is wanted -----------------------------------------------------------------


def test_control_groups_of_both_versions(tmp_path):
    def group(path, **files):
        path.mkdir(parents=True)
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(text)

    group(
        tmp_path / "two" / "a",
        memory__max="1000\n",
        memory__current="700\n",
        memory__stat="anon 5\ninactive_file 100\nactive_file 3\nslab_reclaimable 2\nslab_unreclaimable 50\n",
    )
    group(tmp_path / "two" / "a" / "b", memory__max="max\n", memory__current="10\n")
    (tmp_path / "in2").write_text("0::/a/b\n")
    # The parent's limit binds; files that can be dropped are room.
    assert control_groups(tmp_path / "in2", tmp_path / "two") == [405]
    group(
        tmp_path / "one" / "memory" / "x",
        memory__limit_in_bytes="5000",
        memory__usage_in_bytes="5500",
        memory__stat="inactive_file 9\ntotal_inactive_file 200\ntotal_active_file 100\n",
    )
    (tmp_path / "in1").write_text("3:cpu,cpuacct:/\n4:memory:/x\n")
    assert control_groups(tmp_path / "in1", tmp_path / "one") == [0]
    assert control_groups(tmp_path / "nothing", tmp_path) == []


def test_free_memory_is_between_nothing_and_all():
    assert 0 < free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_files_that_take_memory_are_told_from_those_on_disk(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/b /tmp/big xfs rw 0 0\n/dev/c /srv "
        "ext4 rw 0 0\ntmpfs /srv tmpfs rw 0 0\n"
    )
    found = {
        p: module.lies_in_memory(Path(p), mounts)
        for p in ("/home/x", "/tmp", "/tmp/none/yet", "/tmp/big/x", "/tmpx", "/srv/x")
    }
    assert found == {
        "/home/x": False,
        "/tmp": True,
        "/tmp/none/yet": True,
        "/tmp/big/x": False,
        "/tmpx": False,
        "/srv/x": True,
    }
    assert not module.lies_in_memory(Path("/tmp"), tmp_path / "nothing")


def test_a_place_that_certainly_has_no_room_is_refused(monkeypatch, tmp_path):
    cuda, need = torch.device("cuda"), Needs({"rtn": 1000}, 100, 300, 3, 50, processes=2)
    free = {"cuda": 1000, "cpu": 2 * 3 * 512}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    monkeypatch.setattr(memory, "disk_free", lambda folder: 1800)
    assert [need.placed(p, cuda, tmp_path).used for p in ("device", "host", "disk")] == [
        "device",
        "host",
        "disk",
    ]
    free.update(cuda=999, cpu=2 * 3 * 512 - 1)
    monkeypatch.setattr(memory, "disk_free", lambda folder: 1799)
    for place, said in (
        ("device", "'cuda': 1000 bytes"),
        ("host", "this machine's memory: 3.0 KiB"),
        ("disk", "1.8 KiB are wanted"),
    ):
        with pytest.raises(LowbitError, match=f"the activations do not fit .*{said}"):
            need.placed(place, cuda, tmp_path)
    monkeypatch.setattr(memory, "disk_free", lambda folder: 1 << 40)
    monkeypatch.setattr(memory, "lies_in_memory", lambda folder: True)
    with pytest.raises(LowbitError, match="nowhere is room"):  # not in a file that takes memory
        need.placed("auto", cuda, tmp_path)


def test_processes_on_a_cpu_share_its_memory(monkeypatch, tmp_path):
    need = Needs({"rtn": 1000}, 100, 300, 3, 50, processes=4)
    free = [4 * (900 + 1000 + 50)]
    monkeypatch.setattr(memory, "free_memory", lambda device: free[0])
    monkeypatch.setattr(memory, "disk_free", lambda folder: 1 << 40)
    assert need.placed("auto", CPU, tmp_path).used == "host"
    free[0] -= 1
    assert need.placed("auto", CPU, tmp_path).used == "disk"
    free[0] = 399
    with pytest.raises(LowbitError, match="at least 100 bytes in each of 4 processes"):
        need.check(CPU)
    need.check(torch.device("cuda"))  # where each has a device of its own
    config = FAMILIES["llama"]()
    one, three = (
        needs_of(
            config,
            load_recipe("gptq", scheme=parse_scheme("W2A16g16")),
            25,
            32,
            CPU,
            torch.bfloat16,
            n,
            n,
        )
        for n in (1, 3)
    )
    assert three.stream == -(-25 // 3) * one.stream // 25 and three.processes == 3


def test_streams_do_not_lie_in_the_folder_of_the_artifact(model, tmp_path):
    with pytest.raises(LowbitError, match="--offload-dir .* lies in the artifact's own folder"):
        quantized(
            model,
            tmp_path / "out",
            "rtn",
            [],
            offload="disk",
            offload_dir=tmp_path / "out" / "streams",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_finished_artifact_is_verified_whatever_memory_is_free(model, tmp_path, monkeypatch):
    quantized(model, tmp_path / "out", "rtn", [])
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    assert quantized(model, tmp_path / "out", "rtn", []).repeated
    with pytest.raises(LowbitError, match="does not fit"):
        quantized(model, tmp_path / "other", "rtn", [])


def test_auto_on_an_accelerator(monkeypatch, tmp_path):
    cuda, need = torch.device("cuda"), Needs({"rtn": 1000}, 100, 300, 3, 50)
    free = {"cuda": 1950, "cpu": 3 * 512}  # page-locked: rounded up to powers of two
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    monkeypatch.setattr(memory, "disk_free", lambda folder: free.get("disk", 10**6))
    assert need.placed("auto", cuda, tmp_path).used == "device"
    free["cuda"] -= 1
    assert need.placed("auto", cuda, tmp_path).used == "host"
    free["cpu"] -= 1
    assert need.placed("auto", cuda, tmp_path).used == "disk"
    free["disk"] = 899
    with pytest.raises(LowbitError, match="nowhere is room for the activations of 900 bytes"):
        need.placed("auto", cuda, tmp_path)
    free["cuda"] = None  # nobody tells: as if there were room
    assert need.placed("auto", cuda, tmp_path).used == "device"
    free["cpu"] += 1
    assert need.placed("host", cuda, tmp_path).used == "host"
    with pytest.raises(LowbitError, match="unknown place for --offload 'dsk': did you mean 'disk'"):
        need.placed("dsk", cuda, tmp_path)


def test_a_block_that_cannot_fit_is_refused_before_any_work(model, tmp_path, monkeypatch):
    need = needs_of(
        FAMILIES["llama"](),
        load_recipe("tesseraq", scheme=parse_scheme("W2A16g16")),
        24,
        32,
        CPU,
        torch.bfloat16,
    )
    monkeypatch.setattr(memory, "free_memory", lambda device: need.least)
    need.check(CPU)
    monkeypatch.setattr(memory, "free_memory", lambda device: need.least - 1)
    with pytest.raises(
        LowbitError,
        match=r"one block of this model does not fit this machine: .* at least .*'tesseraq'.* are free\. What helps: a recipe that takes less \(--recipe gptq or awq or rtn\)",
    ):
        quantized(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    config = tmp_path / "config.json"
    config.write_text(json.dumps(FAMILIES["llama"]().to_dict()))
    result = CliRunner().invoke(
        app, ["plan", str(config), "--scheme", "W2A16g16", "--samples", "24", "--length", "32"]
    )
    assert result.exit_code == 2 and "does not fit this machine" in " ".join(result.output.split())


def test_begin_takes_the_room_it_is_given(model):
    stream = ModelStream(model)
    recipe = load_recipe("rtn", scheme=parse_scheme("W2A16g16"))
    x = stream.embed(torch.randint(3, 280, (4, 32), generator=torch.Generator().manual_seed(0)))
    room = torch.full_like(x, float("nan"))
    kwargs = stream.block_kwargs(32)[0]
    plain = begin(stream, 0, recipe, Streams(x, x, 4), kwargs, 0).target
    reused = begin(stream, 0, recipe, Streams(x, x, 4, scratch=room), kwargs, 0).target
    assert reused.data_ptr() == room.data_ptr()
    assert torch.equal(plain, reused)
