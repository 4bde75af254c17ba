"""An export reads, compares and hashes every byte once, and misses nothing by it."""

import errno
import json
from collections import Counter
from functools import partial

import pytest
import torch
from helpers import save_tiny
from test_export import artifact, export

import lowbit.artifact.proof.contents as contents
from lowbit.artifact.files import file_hash, same_bytes
from lowbit.artifact.hashing import Hashing
from lowbit.artifact.proof import verify
from lowbit.export import place
from lowbit.formats import gguf
from lowbit.formats.ggml import BLOCKS
from lowbit.model.raw import raw_tensors

TARGETS = ("gptq_v2", "awq", "mlx", "gguf", "compressed-tensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Target -> an artifact that can go there."""
    root = tmp_path_factory.mktemp("once")
    model = save_tiny(root / "m")
    plain = artifact(model, root / "plain", "W4A16g32", "rtn", ())
    rotated = artifact(model, root / "rotated")
    blocks = artifact(model, root / "blocks", "W4A16g32sym", "rtn", ())
    return dict.fromkeys(TARGETS, plain) | {"compressed-tensors": rotated, "gguf": blocks}


@pytest.fixture(autouse=True)
def no_loader(monkeypatch):
    monkeypatch.setattr("lowbit.run.closing.verify", partial(verify, loader=False))
    monkeypatch.setattr(place, "verify", partial(verify, loader=False))


@pytest.mark.parametrize("to", TARGETS)
def test_every_file_is_hashed_once(made, tmp_path, monkeypatch, to):
    count, read = Counter(), Counter()

    def counted(path):
        count[path.name if path.parent == made[to] else f"out/{path.name}"] += 1
        return file_hash(path)

    monkeypatch.setattr("lowbit.artifact.hashing.file_hash", counted)
    monkeypatch.setattr(contents, "check_tensors", lambda *_: read.update("c"))
    monkeypatch.setattr("lowbit.export.source.check_tensors", lambda *_: read.update("c"))
    code, text = export(made[to], tmp_path / "e", "--to", to)
    assert code == 0, text
    shards = json.loads((made[to] / "report.json").read_text())["shards"]
    files = json.loads((tmp_path / "e" / "report.json").read_text())["shards"]
    written = () if to == "gguf" else files  # a GGUF file is hashed as it grows
    once = [f"out/{n}" for n in written] + ([] if to == "compressed-tensors" else [*shards])
    assert count == Counter(once) and not read
    monkeypatch.undo()
    assert verify(tmp_path / "e", loader=False).linears == 14


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("tensor", ["down_proj", "norm"])
def test_damage_in_the_artifact_is_named(made, tmp_path, monkeypatch, to, tensor):
    source = tmp_path / "a"
    source.mkdir()
    for path in made[to].rglob("*"):
        if path.is_file():
            (source / path.relative_to(made[to])).parent.mkdir(exist_ok=True)
            (source / path.relative_to(made[to])).write_bytes(path.read_bytes())
    shard = sorted(source.glob("model-*.safetensors"))[-1]
    name, raw = max((n, r) for n, r in raw_tensors(shard).items() if tensor in n)
    data = bytearray(shard.read_bytes())
    data[raw.start + raw.nbytes - 1] ^= 1
    shard.write_bytes(data)
    code, text = export(source, tmp_path / "e", "--to", to)
    assert code == 1 and f"tensor '{name}'" in text and "its bytes have changed" in text
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("e")]


@pytest.mark.parametrize("to", [t for t in TARGETS if t not in ("gguf", "compressed-tensors")])
@pytest.mark.parametrize("tensor", ["qweight", "scales", "norm.weight", "weight"])
def test_a_file_that_is_not_what_was_written(made, tmp_path, monkeypatch, to, tensor):
    own = place.read_shard

    def faulty(path):
        held = own(path)
        for name in [n for n in held if n.endswith(tensor)][-1:]:
            t = held[name] = held[name].clone()
            t.view(torch.uint8).view(-1)[-1] ^= 1
        return held

    monkeypatch.setattr(place, "read_shard", faulty)
    code, text = export(made[to], tmp_path / "e", "--to", to)
    assert (code == 1 and "read back from disk differs from what was made" in text) or (
        code == 0 and tensor == "qweight" and to == "mlx"  # has no such tensor
    )


def test_a_gguf_file_that_is_not_what_was_written(made, tmp_path, monkeypatch):
    own = gguf.Writer.back

    def faulty(self, name, part=None):
        held = own(self, name, part)
        held[-1] ^= name == "blk.1.ffn_down.weight"
        return held

    monkeypatch.setattr(gguf.Writer, "back", faulty)
    code, text = export(made["gguf"], tmp_path / "e", "--to", "gguf")
    assert code == 1 and "'blk.1.ffn_down.weight' read back from disk differs" in text
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("e")]


@pytest.mark.parametrize(
    "to, at",
    [
        ("gptq_v2", "lowbit.formats.gptq.turned"),
        ("awq", "lowbit.formats.awq.nibbles_turned"),
        ("gguf", "lowbit.formats.ggml._in_blocks"),
    ],
)
def test_codes_laid_out_wrongly_are_found(made, tmp_path, monkeypatch, to, at):
    module, _, name = at.rpartition(".")
    own, calls = getattr(__import__(module, fromlist=[name]), name), []

    def wrong(words, *more):
        out = own(words, *more)
        calls.append(1)
        if len(calls) == 1:
            out.view(-1)[0] ^= 4
        return out

    monkeypatch.setattr(at, wrong)
    code, text = export(made[to], tmp_path / "e", "--to", to)
    assert code == 1 and "codes read back from the export differ from what was tuned" in text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["file_hash", "shard_hashes"])
def test_what_fails_in_a_thread_is_one_sentence(made, tmp_path, monkeypatch, number, function):
    def fails(path):
        raise OSError(number, "of the thread")

    monkeypatch.setattr(f"lowbit.artifact.hashing.{function}", fails)
    code, text = export(made["awq"], tmp_path / "e", "--to", "awq")
    words = "no space left on disk" if number == errno.ENOSPC else "of the thread"
    assert code == 2 and words in text and "Traceback" not in text
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("e")]


def test_a_file_is_hashed_as_far_as_it_is_finished(tmp_path):
    """Tensors come in any order, parts of one as well."""
    f32, rows = BLOCKS["F32"], torch.arange(24, dtype=torch.uint8)
    entries = [
        gguf.Entry("a", (2, 3), f32),
        gguf.Entry("b", (2, 1, 3), f32),
        gguf.Entry("c", (6,), f32),
    ]
    path = tmp_path / "x.gguf"
    with Hashing() as hashing, gguf.Writer(path, {"general.name": "x"}, entries) as file:
        growing, seen = hashing.growing(path), []
        for name, part in (("c", None), ("b", 1), ("a", None), ("b", 0)):
            file.add(name, rows if part is None else rows[:12], part)
            growing.up_to(file.finished)
            seen.append(file.finished)
        assert seen[0] == seen[1] < seen[2] < seen[3] == path.stat().st_size
        digest = growing.digest()
        assert file.whole("b")[1] == (2, 12)
    assert digest == file_hash(path)


@pytest.mark.parametrize(
    "a, b, same",
    [
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), False),
        (torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int8), False),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.arange(7).to(torch.bfloat16), torch.arange(7).to(torch.bfloat16), True),
    ],
)
def test_bytes_are_compared(a, b, same):
    assert same_bytes(a, b) == same
