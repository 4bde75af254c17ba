"""Files of an artifact, one by one: written whole or not at all, moved in an order, locked, hashed;
and what a run tells of itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import save_tiny

from lowbit.artifact.disk import copy_atomic, disk, write_atomic
from lowbit.artifact.files import file_hash, read_shard, save_shard, shard_name, tensor_hash
from lowbit.artifact.lock import LOCK, Lock
from lowbit.artifact.proof import compare_logits, read_report
from lowbit.artifact.tree import MOVING, emptied, entries, move_up, take_back
from lowbit.errors import DiskFull, LowbitError, VerificationError
from lowbit.grid import Affine
from lowbit.model.calibration import Rows
from lowbit.model.checkpoint import Checkpoint, Stored
from lowbit.recipe import Recipe
from lowbit.run.asked import Asked
from lowbit.run.closing import proof_ids
from lowbit.run.identity import Original, state_of, versions
from lowbit.run.record import sizes

# --- whole or not at all --------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def copied(path: Path, data: bytes) -> None:
    source = path.parent.parent / "source"
    source.write_bytes(data)
    copy_atomic(source, path)


def saved(path: Path, data: bytes) -> None:
    save_shard(path, {"x": torch.tensor(list(data), dtype=torch.uint8)})


WRITERS = [write_atomic, copied, saved]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_written_and_written_anew(tmp_path: Path, write) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for data in (b"one", b"other bytes"):
        write(folder / "a", data)
        held = read_shard(folder / "a")["x"].numpy().tobytes() if write is saved else None
        assert (held or (folder / "a").read_bytes()) == data
        assert listing(folder) == ["a"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("step", "error", "kind", "words"),
    [
        ("fsync", OSError(errno.ENOSPC, "No space left on device"), DiskFull, "no space left on disk"),
        ("fsync", OSError(errno.EDQUOT, "Quota exceeded"), DiskFull, "free some and run the same command"),
        ("fsync", OSError(errno.EIO, "Input/output error"), LowbitError, "Input/output error."),
        ("replace", OSError(errno.EROFS, "Read-only file system"), LowbitError, "Read-only file system."),
        ("replace", OSError(errno.ENOSPC, "No space left on device"), DiskFull, "no space left on disk"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch, write, step: str, error: OSError, kind, words: str
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    write(folder / "a", b"before")
    held = (folder / "a").read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(LowbitError) as e:
        write(folder / "a", b"after")
    monkeypatch.undo()
    assert type(e.value) is kind and words in str(e.value) and f"'{folder / 'a'}'" in str(e.value)
    assert (folder / "a").read_bytes() == held and listing(folder) == ["a"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "x"), DiskFull, "no space left on disk while writing 'p': free some"),
        (OSError("No space left on device (os error 28)"), DiskFull, "no space left on disk"),
        (OSError(errno.EACCES, "Permission denied"), LowbitError, "cannot write 'p': Permission denied."),
        (OSError("odd"), LowbitError, "cannot write 'p': odd."),
    ],
)  # fmt: skip
def test_what_a_file_system_refuses_is_one_sentence(error: OSError, kind, words: str) -> None:
    with pytest.raises(LowbitError) as e, disk(Path("p")):
        raise error
    assert type(e.value) is kind and str(e.value).startswith(words)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="^mine$"), disk(Path("p")):
        raise ValueError("mine")


def test_a_shard_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_shard(tmp_path / "a", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_tensors_of_any_layout_come_back_from_a_shard(tmp_path: Path) -> None:
    x = torch.arange(12, dtype=torch.int32).view(3, 4)
    given = {"t": x.T, "s": x[:, 1], "e": x[:0], "n": torch.tensor(3.5), "b": x.bfloat16()}
    save_shard(tmp_path / "new" / "a", given)
    held = read_shard(tmp_path / "new" / "a")
    assert held.keys() == given.keys()
    for name, t in given.items():
        assert held[name].dtype == t.dtype and torch.equal(held[name], t)


@pytest.mark.parametrize(
    "data", [None, b"", b"\x01", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"{]"]
)
def test_a_shard_that_cannot_be_read(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "a").write_bytes(data)
    with pytest.raises(VerificationError, match="a' is missing or not a readable safetensors file"):
        read_shard(tmp_path / "a")


@pytest.mark.parametrize(
    ("number", "shards", "name"),
    [(0, 1, "model-00001-of-00001.safetensors"), (41, 128, "model-00042-of-00128.safetensors")],
)
def test_shards_have_the_usual_names(number: int, shards: int, name: str) -> None:
    assert shard_name(number, shards) == name


# --- hashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 1000, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_the_hash_of_a_file_is_sha256(tmp_path: Path, count: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (count // 1000) + b"x" * (count % 1000)
    (tmp_path / "a").write_bytes(data)
    assert file_hash(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.tensor([1, 2], dtype=torch.int16), b"torch.int16(2,)\x01\x00\x02\x00"),
        (torch.tensor([[1], [2]], dtype=torch.uint8), b"torch.uint8(2, 1)\x01\x02"),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T, b"torch.uint8(2, 2)\x01\x03\x02\x04"),
        (torch.tensor(1.0), b"torch.float32()\x00\x00\x80\x3f"),
        (torch.tensor([1.0]).bfloat16(), b"torch.bfloat16(1,)\x80\x3f"),
        (torch.zeros(0, 3), b"torch.float32(0, 3)"),
    ],
)
def test_the_hash_of_a_tensor_is_of_dtype_shape_and_bytes(tensor, text: bytes) -> None:
    assert tensor_hash(tensor) == hashlib.sha256(text).hexdigest()[:32]


# --- folders --------------------------------------------------------------------------------------


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_folder_is_listed_and_emptied_but_for_what_is_not_ours(tmp_path: Path) -> None:
    folder = tree(tmp_path / "f", "b", "a/c/d", LOCK, "lost+found/x")
    tree(tmp_path / "other", "keep")
    (folder / "link").symlink_to(tmp_path / "other")
    assert entries(folder) == ["a", "b", "link"]
    emptied(folder)
    assert entries(folder) == [] and listing(folder) == ["lost+found", "lost+found/x", LOCK]
    assert listing(tmp_path / "other") == ["keep"]  # a link goes, what it leads to stays


def test_files_move_up_those_last_that_make_a_model(tmp_path: Path, monkeypatch) -> None:
    names = ["report.json", "a", "config.json", "proof/p", "z"]
    partial, folder = tree(tmp_path / "p", *names, "run.json", LOCK), tmp_path / "f"
    folder.mkdir()
    order: list[str] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        if Path(target).is_relative_to(folder):
            order.append(Path(target).relative_to(folder).as_posix())
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    move_up(partial, folder, ("run.json",))
    assert order == ["a", "proof/p", "z", "config.json", "report.json"]
    assert all((folder / n).read_text() == n for n in names)
    assert entries(partial) == [MOVING, "proof", "run.json"]


@pytest.mark.parametrize("moved", range(4))
def test_a_move_that_was_cut_off_goes_on_or_is_taken_back(
    tmp_path: Path, monkeypatch, moved: int
) -> None:
    names = ["a", "config.json", "proof/p"]
    for way in ("on", "back"):
        partial, folder = tree(tmp_path / way / "p", *names), tmp_path / way / "f"
        folder.mkdir()
        replace, count = os.replace, [moved]

        def dies(source: Path, target: Path, replace=replace, folder=folder, count=count) -> None:
            if Path(target).is_relative_to(folder):
                if not count[0]:
                    raise KeyboardInterrupt
                count[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", dies)
        if moved < len(names):
            with pytest.raises(KeyboardInterrupt):
                move_up(partial, folder, ())
        else:
            move_up(partial, folder, ())
        monkeypatch.undo()
        if way == "on":
            move_up(partial, folder, ())
            assert listing(folder) == ["a", "config.json", "proof", "proof/p"]
        else:
            take_back(partial, folder)
            assert listing(folder) in ([], ["proof"])


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    partial, folder = tree(tmp_path / "p", "a", "b"), tree(tmp_path / "f", "b")
    (folder / "b").write_text("somebody's")
    with pytest.raises(LowbitError, match="was empty when the work began, now 'b' is in it"):
        move_up(partial, folder, ())
    assert listing(partial) == ["a", "b"] and (folder / "b").read_text() == "somebody's"
    take_back(partial, folder)  # which was not begun
    assert listing(folder) == ["b"]


def test_files_move_between_file_systems(tmp_path: Path, monkeypatch) -> None:
    partial, folder = tree(tmp_path / "p", "a", "config.json"), tmp_path / "f"
    folder.mkdir()
    replace = os.replace

    def refuses(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    move_up(partial, folder, ())
    assert listing(folder) == ["a", "config.json"] and entries(partial) == [MOVING]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b'{"command": "quantize", "pid": 7}', "lowbit quantize (process 7) works in it."),
        (
            b'{"command": "export", "pid": 7, "host": "other"}',
            "export (process 7 on other) works in it.",
        ),
        (b"{}", "is in use: another command of lowbit works in it. Wait until it ends"),
        (b"[1]", "another command of lowbit works in it"),
        (b'{"comm', "another command of lowbit works in it"),
        (b"\xff\xfe", "another command of lowbit works in it"),
    ],
)
def test_a_lock_says_who_holds_it(tmp_path: Path, said: bytes, words: str) -> None:
    lock = Lock(tmp_path, "first")
    held = json.loads((tmp_path / LOCK).read_text())
    assert held == {"command": "first", "pid": os.getpid(), "host": socket.gethostname()}
    (tmp_path / LOCK).write_bytes(said)
    with pytest.raises(LowbitError) as e:
        Lock(tmp_path, "second")
    assert words in str(e.value) and f"'{tmp_path}'" in str(e.value)
    lock.release()
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("left", "before"),
    [(None, None), ("{}", None), ("", None), ("[]", None), ('{"command": "export"}', "export")],
)
def test_a_lock_tells_who_died_there(tmp_path: Path, left: str | None, before: str | None) -> None:
    if left is not None:
        (tmp_path / LOCK).write_text(left)
    lock = Lock(tmp_path, "quantize")
    assert lock.before == before
    lock.release()


# --- what a run tells of itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(recipe="awq"), "--recipe awq --seed 3 -o OUT"),
        (
            dict(recipe="awq", scheme="W2", samples=4),
            "--recipe awq --scheme W2 --samples 4 --seed 3 -o OUT",
        ),
        (
            dict(recipe="awq", settings=("awq.rows=3", "kv.clip=1"), device="cpu", plain=True),
            "--recipe awq --set awq.rows=3 --set kv.clip=1 --seed 3 --device cpu --plain -o OUT",
        ),
        # Of a recipe without a name all lies in the artifact's own file.
        (
            dict(recipe="a/mine.toml", scheme="W2", settings=("awq.rows=3",)),
            "--recipe recipe.toml --seed 3 -o OUT",
        ),
        (
            dict(recipe=Recipe(Affine(4)), plain=True),
            "--recipe recipe.toml --seed 3 --plain -o OUT",
        ),
    ],
)
def test_the_command_that_makes_the_same(given, words: str) -> None:
    usual = Asked("a model", None, "", None, None, None, 3, "auto", (), False)
    found = replace(usual, **given).command
    assert found[:3] == ["lowbit", "quantize", "a model"] and " ".join(found[3:]) == words


def test_sizes_are_counted_from_bytes() -> None:
    stored = {
        "a": Stored((4, 8), "BF16"),
        "b": Stored((10,), "F32"),
        "gone": Stored((6,), "BF16"),
    }
    assert [t.nbytes for t in stored.values()] == [64, 40, 12]
    records = [
        {"bytes": 40},
        {"bytes": 30, "linears": [{"bytes": 20, "shape": [4, 4]}]},
        {"bytes": 14, "linears": [{"bytes": 10, "shape": [4, 2]}, {"bytes": 4, "shape": [4, 2]}]},
    ]
    found = sizes(sum(t.nbytes for t in stored.values()), stored, {"gone"}, records)
    assert found == {
        "before": 116,
        "after": 84,
        "bits_per_weight": 8 * 34 / 32,
        "model_bits_per_weight": 8 * 84 / 42,
    }


@pytest.mark.parametrize(
    ("held_out", "calibration", "expected"),
    [((3, 400), (9, 400), (2, 256)), ((1, 32), (9, 32), (2, 32)), ((0, 32), (1, 32), (1, 32))],
)
def test_the_proof_is_on_text_that_was_not_learned_if_there_is_any(held_out, calibration, expected):
    rows = Rows(
        torch.zeros(calibration, dtype=torch.int64), torch.ones(held_out, dtype=torch.int64), "t", 0
    )
    found = proof_ids(rows)
    assert tuple(found.shape) == expected and bool((found == (held_out[0] >= 2)).all())


def test_the_hash_of_rows_tells_calibration_from_held_out() -> None:
    one, none = torch.arange(6).view(2, 3), torch.empty(0, 3, dtype=torch.int64)
    hashes = {
        Rows(*pair, "t", 0).sha256
        for pair in ((one, none), (none, one), (one[:1], one[1:]), (one.flip(0), none), (one, one))
    }
    assert len(hashes) == 5
    assert Rows(one, none, "t", 0).sha256 == Rows(one.clone(), none, "u", 9, 4).sha256
    data = struct.pack("<6q", *range(6))
    assert Rows(one, none, "t", 0).sha256 == hashlib.sha256(data + b"|").hexdigest()


def test_what_changes_a_text_changes_its_state(tmp_path: Path) -> None:
    folder = tree(tmp_path / "f", "a", "b/c")
    os.utime(folder / "a", ns=(1, 1))
    states = [state_of(str(folder)), state_of(str(folder / "a"))]
    assert states[1] == hashlib.sha256(b"a").hexdigest()
    assert state_of("wikitext2-not-here") is None and state_of(str(tmp_path / "none")) is None
    assert [state_of(str(folder)), state_of(str(folder / "a"))] == states
    os.utime(folder / "a", ns=(2, 2))
    assert state_of(str(folder)) != states[0] and state_of(str(folder / "a")) == states[1]
    os.utime(folder / "a", ns=(1, 1))
    assert state_of(str(folder)) == states[0]
    (folder / "b" / "c").rename(folder / "b" / "d")
    assert state_of(str(folder)) != states[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("files") / "m")


@pytest.mark.parametrize(
    ("name", "change", "refused"),
    [
        ("config.json", lambda p: os.utime(p, ns=(1, 1)), False),
        ("config.json", lambda p: p.write_bytes(p.read_bytes()), False),
        ("config.json", lambda p: p.write_bytes(p.read_bytes() + b" "), True),
        ("config.json", lambda p: p.write_bytes(p.read_bytes().replace(b"96", b"97")), True),
        ("config.json", lambda p: p.unlink(), True),
        ("tokenizer.json", lambda p: p.write_bytes(p.read_bytes() + b"\n"), True),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x55"), True),
        ("text.txt", lambda p: p.write_text("other"), False),
    ],
)  # fmt: skip
def test_a_model_that_changes_meanwhile_is_found(
    model, tmp_path, name: str, change, refused: bool
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    original = Original.of(Checkpoint(str(copy))).hashed()
    original.check_unchanged()
    change(copy / name)
    if not refused:
        original.check_unchanged()
        return
    with pytest.raises(
        LowbitError, match=f"^'{name}' of '.*' has changed since this command began"
    ):
        original.check_unchanged()


def test_the_hash_of_a_model_is_over_names_and_hashes(model: Path) -> None:
    found = Original.of(Checkpoint(str(model))).hashed()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found.hashes)
    assert "text.txt" not in found.hashes
    lines = "".join(
        f"{n} {hashlib.sha256((model / n).read_bytes()).hexdigest()}\n"
        for n in sorted(found.hashes)
    )
    assert found.as_dict()["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert set(versions()) == {
        "python", "torch", "transformers", "safetensors", "compressed-tensors",
    }  # fmt: skip


# --- proof ----------------------------------------------------------------------------------------


def test_logits_are_compared_by_their_definition() -> None:
    g = torch.Generator().manual_seed(0)
    tuned = torch.randn(2, 3, 5, generator=g)
    loaded = tuned + 0.5 * torch.randn(2, 3, 5, generator=g)
    a, b = tuned.flatten().tolist(), loaded.flatten().tolist()
    mean = sum(a) / 30
    spread = (sum((x - mean) ** 2 for x in a) / 29) ** 0.5
    rms = (sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 30) ** 0.5
    tops = [[max(range(5), key=x[i : i + 5].__getitem__) for i in range(0, 30, 5)] for x in (a, b)]
    found = compare_logits(tuned, loaded)
    assert found[0] == pytest.approx(rms / spread)
    assert found[1] == pytest.approx(sum(p == q for p, q in zip(*tops, strict=True)) / 6)
    assert compare_logits(tuned, tuned) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (None, LowbitError, "has no report.json: it is not an artifact of lowbit."),
        ("{", VerificationError, "is not readable JSON"),
        ("[]", VerificationError, "is not a complete report: damaged, or made by another version"),
        (
            '{"files": {}, "shards": {}, "linears": []}',
            VerificationError,
            "is not a complete report",
        ),
    ],
)
def test_a_report_that_is_none(tmp_path: Path, content: str | None, kind, words: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(LowbitError) as e:
        read_report(tmp_path)
    assert type(e.value) is kind and words in str(e.value)
    with pytest.raises(LowbitError, match="^no such folder: "):
        read_report(tmp_path / "none")
