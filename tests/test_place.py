"""Where a command's folder is made: places that no rename reaches, two commands in one folder,
damaged notes, interruptions.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.files import NOTES
from lowbit.artifact.lock import LOCK, Lock
from lowbit.artifact.output import INSIDE, Output, claimed, working
from lowbit.artifact.proof import verify
from lowbit.artifact.tree import MOVING, entries
from lowbit.cli import app
from lowbit.errors import DiskFull, Interrupted, LowbitError
from lowbit.export import export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def quantize(model, out, scheme="W4A16g32sym", **more):
    return lowbit.quantize(
        str(model),
        scheme,
        "rtn",
        out=out,
        calib=str(model / "text.txt"),
        samples=8,
        length=32,
        **more,
    )


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
        quantize(model, out)
    return out


def run(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, " ".join(result.output.split())


def files(folder):
    """Contents by name, but for the report, which says when."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "report.json"
    }


@pytest.fixture(autouse=True)
def no_loader(monkeypatch):
    """Codes and hashes only: a runtime in a process of its own is what other files of tests
    check.
    """
    for place in ("lowbit.run.closing.verify", "lowbit.export.place.verify"):
        monkeypatch.setattr(place, partial(verify, loader=False))


def stop(done):
    if not done.resumed:
        raise KeyboardInterrupt


# --- places ---------------------------------------------------------------------------------------


def _empty(at: Path) -> Path:
    (at / "out").mkdir()
    return at / "out"


def _here(at: Path) -> Path:
    os.chdir(_empty(at))
    return Path(".")


def _link(at: Path) -> Path:
    (at / "link").symlink_to(_empty(at))
    return at / "link"


def _dangling(at: Path) -> Path:
    (at / "link").symlink_to("deep/out")
    return at / "link"


def _mounted(at: Path) -> Path:
    (_empty(at) / "lost+found").mkdir()  # as on a new ext4
    return at / "out"


PLACES = {
    "empty": _empty,
    "here": _here,
    "link": _link,
    "dangling link": _dangling,
    "new file system": _mounted,
    "deep": lambda at: at / "a" / "b" / "out",
}


@pytest.mark.parametrize("place", PLACES)
def test_places(model, made, tmp_path, monkeypatch, place):
    """Also after an interruption; the folder itself is never replaced, so a mount point or the
    current directory works.
    """
    monkeypatch.chdir(tmp_path)
    out = PLACES[place](tmp_path)
    inode = os.stat(out).st_ino if out.exists() else None
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=stop)
    assert not (out / "config.json").exists() and not (out / "report.json").exists()
    resumed = []
    quantize(model, out, progress=lambda d: resumed.append(d.resumed))
    assert resumed == [True, False] and files(out) == files(made)
    assert inode is None or os.stat(out).st_ino == inode
    assert (tmp_path / "link").is_symlink() == ("link" in place)
    assert (
        quantize(model, out).repeated
        and not list(tmp_path.rglob("*.partial"))
        and not list(tmp_path.rglob(LOCK))
    )


@pytest.mark.parametrize("place", ["empty", "here", "link", "new file system"])
def test_places_of_exports(made, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    out = PLACES[place](tmp_path)
    export(made, out, "awq")
    assert (out / "report.json").is_file() and not {*os.listdir(out)} & {INSIDE, LOCK, MOVING}
    assert verify(out, loader=False).tensors > 0


def _file(at: Path) -> Path:
    (at / "out").write_text("")
    return at / "out"


def _within_a_file(at: Path) -> Path:
    return _file(at) / "inner"


def _file_in_the_way(at: Path) -> Path:
    (at / "out.partial").write_text("")
    return at / "out"


def _foreign_in_the_way(at: Path) -> Path:
    (at / "out.partial").mkdir()
    (at / "out.partial" / "mine").write_text("")
    return at / "out"


def _full(at: Path) -> Path:
    (_empty(at) / "mine").write_text("")
    return at / "out"


def _circle(at: Path) -> Path:
    (at / "out").symlink_to("out")
    return at / "out"


def _to_a_file(at: Path) -> Path:
    (at / "out").symlink_to("file")
    (at / "file").write_text("")
    return at / "out"


def _used(at: Path) -> Path:
    """An unfinished run, and something of the user's beside it."""
    (_empty(at) / INSIDE).mkdir()
    (at / "out" / "mine").write_text("")
    return at / "out"


REFUSED = {
    "file": (_file, "is a file, not a folder"),
    "within a file": (_within_a_file, "cannot write"),
    "link to a file": (_to_a_file, "is a file, not a folder"),
    "circle": (_circle, "lead in a circle"),
    "full": (_full, "exists and is not empty"),
    "used": (_used, "holds 'mine' besides an unfinished run"),
    "partial is a file": (_file_in_the_way, "is needed as a folder, but it is a file"),
    "partial is foreign": (_foreign_in_the_way, "Remove it first"),
    "no files there": (lambda at: Path("/proc/out"), "cannot write"),
    "name too long": (lambda at: at / ("n" * 250), "cannot write"),
}


def tree(at):
    return sorted((p.relative_to(at).as_posix(), p.is_dir()) for p in at.rglob("*"))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_places(made, tmp_path, case):
    """Before any work: the model is not even looked for; and nothing is changed."""
    make, words = REFUSED[case]
    out = make(tmp_path)
    before = tree(tmp_path)
    code, text = run("quantize", "no/such/model", "-o", out)
    assert code == 2 and words in text and "no/such/model" not in text
    code, text = run("export", "no/such/artifact", "-o", out)
    assert code == 2 and words in text
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "command", [("compare", "--schemes", "W4A16", "--recipes", "rtn"), ("analyze",), ("demo",)]
)
@pytest.mark.parametrize(
    "case", ["file", "within a file", "link to a file", "circle", "no files there"]
)
def test_refused_places_of_commands_that_fill_a_folder(model, tmp_path, command, case):
    make, words = REFUSED[case]
    out = make(tmp_path)
    given = [] if command[0] == "demo" else [model]
    code, text = run(command[0], *given, *command[1:], "-o", out)
    assert code == 2 and (words in text or "cannot write" in text), text


def test_bad_input_leaves_nothing(model, tmp_path):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "there"):
        with pytest.raises(LowbitError):
            quantize(model, out, scheme="W4A16g24")
        with pytest.raises(LowbitError):
            export(model, out)
    assert tree(tmp_path) == [("there", True)]


def test_a_mount_point(model, made, tmp_path):
    """A real one, in a name space of its own."""
    script = f"""
mount -t tmpfs none {tmp_path}/out || exit 77
{sys.executable} -c "
import lowbit, sys
from pathlib import Path
sys.path.insert(0, '{Path(__file__).parent}')
from test_place import quantize, stop
try: quantize(Path('{model}'), Path('{tmp_path}/out'), progress=stop)
except KeyboardInterrupt: print('stopped')
quantize(Path('{model}'), Path('{tmp_path}/out'))
" && cp -r {tmp_path}/out {tmp_path}/copy && ls -a {tmp_path}/out
"""
    (tmp_path / "out").mkdir()
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout and INSIDE not in done.stdout.split()
    found, expected = files(tmp_path / "copy"), files(made)
    # Which tells of the loader.
    assert found.pop("README.md") and expected.pop("README.md") and found == expected


# --- the last step --------------------------------------------------------------------------------


def refuse_from(count, patch):
    """Interrupt the move out of the partial folder at a file, counted from 1."""
    real, calls = os.replace, []

    def replace(source, target):
        if INSIDE in Path(source).parts and INSIDE not in Path(target).parts:
            calls.append(target)
            if len(calls) >= count:
                raise KeyboardInterrupt
        real(source, target)

    patch.setattr(os, "replace", replace)


@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_a_death_in_the_last_step_is_resumed(model, made, tmp_path, count):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        refuse_from(count, patch)
        quantize(model, out)
    assert not (out / "report.json").exists() and (out / INSIDE / MOVING).is_file()
    with pytest.raises(LowbitError, match="unfinished run with another"):
        quantize(model, out, scheme="W8A16g32sym")
    again = quantize(model, out)
    assert again.repeated and files(out) == files(made)


def test_config_and_report_come_last(model, tmp_path, monkeypatch):
    out, order, real = tmp_path / "out", [], os.replace
    out.mkdir()
    monkeypatch.setattr(os, "replace", lambda a, b: order.append(Path(b)) or real(a, b))
    quantize(model, out)
    moved = [p.name for p in order if out in p.parents and INSIDE not in p.parts]
    assert moved[-2:] == ["config.json", "report.json"] and len(moved) > 8


def test_an_export_killed_in_its_last_step_leaves_nothing_to_the_next(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / INSIDE / "proof").mkdir(parents=True)  # as a kill leaves it
    (out / INSIDE / MOVING).write_text(
        json.dumps(["model-1.safetensors", "proof/tokens.json", "config.json"])
    )
    (out / INSIDE / "config.json").write_text("{}")
    (out / INSIDE / LOCK).write_text('{"command": "export", "pid": 1}')
    (out / "model-1.safetensors").write_text("of another format")
    export(made, out, "awq")
    assert not (out / "model-1.safetensors").exists() and not (out / INSIDE).exists()
    assert verify(out, loader=False).tensors > 0


def test_files_that_come_meanwhile_are_not_overwritten(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LowbitError, match=r"now 'README.md' is in it"):
        quantize(model, out, progress=lambda d: (out / "README.md").write_text("mine"))
    assert (out / "README.md").read_text() == "mine"
    (out / "README.md").unlink()
    quantize(model, out)


def test_an_unfinished_run_beside_a_folder_that_has_come_goes_on(
    model, made, tmp_path, monkeypatch
):
    """And is copied, if the folder lies on another file system."""
    out, real = tmp_path / "out", os.replace
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=stop)
    out.mkdir()

    def across(source, target):
        if Path(source).is_relative_to(tmp_path / "out.partial") and Path(target).is_relative_to(
            out
        ):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", across)
    resumed = []
    quantize(model, out, progress=lambda d: resumed.append(d.resumed))
    assert (
        resumed == [True, False]
        and files(out) == files(made)
        and not (tmp_path / "out.partial").exists()
    )


# --- locks ----------------------------------------------------------------------------------------

HOLD = (
    "import sys, time; from pathlib import Path; from lowbit.artifact.lock import Lock; "
    "Lock(Path(sys.argv[1]), sys.argv[2]); print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(request):
    """Another process that holds the lock of a folder."""
    processes = []

    def hold(folder, command):
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), command], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("command", ["quantize", "export", "compare", "demo", "analyze"])
def test_the_second_command_is_refused_and_touches_nothing(model, made, tmp_path, holder, command):
    out = tmp_path / "out"
    place = out.with_name("out.partial") if command in ("quantize", "export") else out
    first = holder(place, command)
    (place / "x.tmp").write_text("being written")
    before = tree(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    options = {
        "compare": ["--schemes", "W4A16", "--recipes", "rtn"],
        "quantize": ["--scheme", "W4A16g32"],
        "demo": [],
    }.get(command, [])
    given = [] if command == "demo" else [made if command == "export" else model]
    code, text = run(command, *given, *options, "-o", tmp_path / "link" / "out")
    assert code == 2 and f"is in use: lowbit {command} (process {first.pid}) works in it" in text
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before
    first.kill()
    first.wait()
    (place / "x.tmp").unlink()
    Lock(place, command).release()
    assert not (place / LOCK).exists()


def test_a_lock_is_released_by_an_error_too(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out.partial" / LOCK).exists()
    with (
        pytest.raises(LowbitError, match="in use"),
        claimed(tmp_path / "out", "quantize", resumes=("run.json",)),
    ):
        quantize(model, tmp_path / "out")
    quantize(model, tmp_path / "out")


def test_a_lock_file_that_its_holder_removes_locks_nothing(tmp_path, monkeypatch):
    """The second has opened the file before the first one removes it and lets go."""
    first, real = Lock(tmp_path, "quantize"), fcntl.flock

    def flock(handle, how):
        monkeypatch.setattr(fcntl, "flock", real)
        first.release()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = Lock(tmp_path, "quantize")
    assert os.path.samestat(os.stat(tmp_path / LOCK), os.fstat(second._handle))
    second.release()


def test_without_locks_the_work_goes_on_after_a_warning(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.warns(RuntimeWarning, match=r"cannot be locked \(No locks available\)"),
        working(tmp_path, "compare") as folder,
    ):
        assert folder == tmp_path


def test_notes_do_not_leave_the_house(made):
    assert (
        LOCK in NOTES
        and MOVING in NOTES
        and not {*entries(made)} & {LOCK, MOVING, INSIDE, "run.json"}
    )
    assert LOCK not in json.dumps(json.loads((made / "report.json").read_text())["files"])


# --- damage ---------------------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "a list": lambda raw: b"[]",
    "null": lambda raw: b"null",
    "no keys": lambda raw: b"{}",
    "zeros": lambda raw: bytes(len(raw)),
    "not utf-8": lambda raw: b"\xff" + raw,
    "a key less": lambda raw: json.dumps(dict(list(json.loads(raw).items())[1:])).encode(),
}


@pytest.fixture(scope="module")
def unfinished(model, tmp_path_factory):
    """One block of two."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=stop)
    return out.with_name("out.partial")


def copied(folder, to):
    subprocess.run(["cp", "-r", folder, to], check=True)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name, kept", [("shard-00000.json", True), ("shard-00001.json", False), ("run.json", True)]
)
def test_damaged_notes(model, made, unfinished, tmp_path, damage, name, kept):
    copied(unfinished, tmp_path / "out.partial")
    path = tmp_path / "out.partial" / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    resumed = []
    quantize(model, tmp_path / "out", progress=lambda d: resumed.append(d.resumed))
    assert resumed == [kept, False] and files(tmp_path / "out") == files(made)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_a_damaged_shard_is_made_again(model, made, unfinished, tmp_path, damage):
    copied(unfinished, tmp_path / "out.partial")
    path = next((tmp_path / "out.partial").glob("model-00002*"))
    raw = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": raw[:-9],
            "flipped": raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
        }[damage]
    )
    quantize(model, tmp_path / "out")
    assert files(tmp_path / "out") == files(made)


def test_a_record_changed_by_hand_is_made_again(model, unfinished, tmp_path):
    copied(unfinished, tmp_path / "out.partial")
    path = tmp_path / "out.partial" / "shard-00001.json"
    note = json.loads(path.read_text())
    del note["record"]["linears"]
    path.write_text(json.dumps(note))
    resumed = []
    quantize(model, tmp_path / "out", progress=lambda d: resumed.append(d.resumed))
    assert resumed == [False, False]


@pytest.mark.parametrize("lost", [b"", None])
def test_without_a_fingerprint_two_runs_are_never_mixed(model, unfinished, tmp_path, lost):
    copied(unfinished, tmp_path / "out.partial")
    state = tmp_path / "out.partial" / "run.json"
    state.unlink() if lost is None else state.write_bytes(lost)
    before = files(tmp_path)
    with pytest.raises(
        LowbitError,
        match=r"run.json' is missing or damaged, .* Remove '.*out.partial' to start anew",
    ):
        quantize(model, tmp_path / "out", scheme="W8A16g32sym")
    assert files(tmp_path) == before
    quantize(model, tmp_path / "out")


def test_a_run_that_died_before_its_first_shard_starts_again(model, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "run.json").write_text("")
    quantize(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["compare.json", "cells/W4A16-rtn.json"])
@pytest.mark.parametrize("damage", ["empty", "a list", "no keys"])
def test_damaged_comparisons(model, tmp_path, name, damage):
    from lowbit.cli.compare import Cell, Terms, opened
    from lowbit.model.calibration import Calibration

    text = str(model / "text.txt")
    terms, cell = Terms(str(model), Calibration(text, 4, 32), text, 32, 2), Cell("W4A16", "rtn")
    with opened(terms, tmp_path / "c") as comparison:
        row = {
            "scheme": cell.scheme,
            "recipe": cell.recipe,
            "made_with": comparison.bench.made_with(cell),
        }
        (tmp_path / "c" / "cells" / "W4A16-rtn.json").write_text(json.dumps(row))
        assert comparison.finished(cell) == row
    path = tmp_path / "c" / name
    path.write_bytes(DAMAGE[damage](b""))
    if name == "compare.json":
        with (
            pytest.raises(LowbitError, match="is damaged: it no longer says"),
            opened(terms, tmp_path / "c"),
        ):
            pass
        (tmp_path / "c" / "cells" / "W4A16-rtn.json").unlink()
    with opened(terms, tmp_path / "c") as comparison:
        assert comparison.finished(cell) is None


@pytest.mark.parametrize(
    "error, kind", [(KeyboardInterrupt(), Interrupted), (DiskFull("no space."), DiskFull)]
)
def test_an_interrupted_comparison_says_what_is_kept(model, tmp_path, error, kind):
    from lowbit.cli.compare import Terms, opened
    from lowbit.model.calibration import Calibration

    text = str(model / "text.txt")
    with (
        pytest.raises(
            kind, match="Cells measured and kept in '.*c': 1. The same command continues"
        ),
        opened(Terms(str(model), Calibration(text, 4, 32), text, 32, 2), tmp_path / "c"),
    ):
        (tmp_path / "c" / "cells" / "W4A16-rtn.json").write_text("{}")
        (tmp_path / "c" / "cells" / "W4A16-awq.json").write_text('{"error": "no"}')
        raise error


# --- interruptions and full disks -----------------------------------------------------------------


def test_ctrl_c_says_what_is_kept(model, tmp_path, monkeypatch):
    with pytest.raises(
        Interrupted,
        match="1 of 2 blocks is finished and kept in '.*out.partial': the same command continues",
    ):
        quantize(model, tmp_path / "out", progress=stop)

    def interrupted(block, recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.stages.blocks.apply_methods", interrupted)
    with pytest.raises(
        Interrupted, match="No block is finished yet: the same command starts again"
    ):
        quantize(model, tmp_path / "other")


def test_ctrl_c_and_a_full_disk_leave_nothing_of_an_export(made, tmp_path, monkeypatch):
    for error, kind in (
        (KeyboardInterrupt(), Interrupted),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
    ):

        def fail(*a, error=error, **k):
            raise error

        monkeypatch.setattr("lowbit.artifact.files.save_file", fail)
        with pytest.raises(
            kind, match="Nothing of the export is kept: the same command starts anew"
        ):
            export(made, tmp_path / "e", "awq")
        assert tree(tmp_path) == []


def test_a_full_disk_says_what_is_kept_of_a_run(model, tmp_path, monkeypatch):
    from lowbit.artifact.files import save_file

    calls = []

    def third(tensors, path, **options):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr("lowbit.artifact.files.save_file", third)
    with pytest.raises(
        DiskFull, match="free some and run the same command. 1 of 2 blocks is finished and kept"
    ):
        quantize(model, tmp_path / "out")


def test_a_full_disk_promises_nothing_of_a_file_that_was_asked_for(tmp_path, monkeypatch):
    from lowbit.cli.places import write_json

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull) as told:
        write_json(tmp_path / "r.json", {})
    assert "continue" not in str(told.value)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_with_a_sentence(model, tmp_path, number, code):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "lowbit",
        "quantize",
        model,
        "--scheme",
        "W2A16g16",
        "-o",
        out,
        "--calib",
        model / "text.txt",
    ]
    command += ["--samples", "8", "--length", "32", "--set", "tesseraq.iters=2000"]
    process = subprocess.Popen(
        [str(c) for c in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with it ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        first = out.with_name("out.partial") / "shard-00000.json"
        while not first.exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(number)
        said = " ".join(process.communicate(timeout=120)[1].split())
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "interrupted. No block is finished yet" in said and "Traceback" not in said
    assert not (out.with_name("out.partial") / LOCK).exists()


def test_an_output_is_where_others_are_told(tmp_path):
    """Ranks but the first neither lock nor make anything."""
    with claimed(tmp_path / "out", "quantize", writes=False) as output:
        assert isinstance(output, Output) and output.lock is None
    assert tree(tmp_path) == []
