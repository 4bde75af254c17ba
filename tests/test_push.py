"""`lowbit push` against a small server that takes uploads as the Hub does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import verify
from lowbit.cli import app

# Of huggingface_hub's own client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
KEPT = {"README.md", "report.json", "recipe.toml", "proof/logits.safetensors", "config.json"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny(folder / "m")
    lowbit.quantize(
        str(model),
        "W4A16g16",
        "rtn",
        out=folder / "a",
        calib=str(model / "text.txt"),
        samples=4,
        length=32,
    )
    return folder / "a"


def push(*arguments):
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_what_arrives_is_what_was_made_and_loads(server, artifact, tmp_path):
    code, text = push(artifact, "some/tiny")
    report = json.loads((artifact / "report.json").read_text())
    assert code == 0 and f"{server.address}/some/tiny " in text and f"hash {report['hash']}" in text
    files = server.files["some/tiny", "main"]
    assert set(files) == {
        p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file()
    }
    assert set(files) >= KEPT
    assert all(data == (artifact / name).read_bytes() for name, data in files.items())
    assert server.private == {"some/tiny": False}
    assert server.messages == [f"W4A16g16, compressed-tensors, hash {report['hash'][:16]}"]
    copy = server.rebuilt("some/tiny", tmp_path / "copy")
    assert verify(copy, loader=False).tensors == 62
    ids = torch.randint(3, 280, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits
            for f in (artifact, copy)
        ]
    assert torch.equal(*logits)


def test_a_private_repository_a_branch_and_a_second_push(server, artifact, tmp_path):
    assert push(artifact, "tiny", "--private")[0] == 0
    assert server.private == {"me/tiny": True}
    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    for words in ("one", "two"):
        (other / "LICENSE").write_text(words)
        code, text = push(other, "me/tiny", "--revision", "w4")
        assert code == 0 and f"{server.address}/me/tiny/tree/w4 " in text
        assert server.files["me/tiny", "w4"] == {
            **server.files["me/tiny", "main"],
            "LICENSE": words.encode(),
        }
    assert "LICENSE" not in server.files["me/tiny", "main"]


def test_an_export_is_pushed_and_notes_of_a_run_are_not(server, artifact, tmp_path):
    lowbit_export = CliRunner().invoke(
        app, ["export", str(artifact), "-o", str(tmp_path / "e"), "--to", "gptq_v2"]
    )
    assert lowbit_export.exit_code == 0, lowbit_export.output
    for note in ("run.json", "shard-00001.json", "config.json.tmp"):
        (tmp_path / "e" / note).write_text("{}")
    (tmp_path / "e" / "LICENSE").write_text("mine")
    assert push(tmp_path / "e", "some/gptq")[0] == 0
    files = server.files["some/gptq", "main"]
    assert "quantize_config.json" in files
    assert "LICENSE" in files
    assert not {"run.json", "shard-00001.json", "config.json.tmp"} & set(files)


def test_a_token_goes_along(server, artifact, monkeypatch):
    server.token = "right"
    code, text = push(artifact, "some/tiny")
    assert code == 2 and "wants to know who pushes" in text and "hf auth login" in text
    code, text = push(artifact, "some/tiny", "--token", "wrong")
    assert code == 2 and "does not take the token" in text
    assert not server.files
    assert push(artifact, "some/tiny", "--token", "right")[0] == 0
    monkeypatch.setenv("HF_TOKEN", "right")
    assert push(artifact, "some/tiny")[0] == 0


@pytest.mark.parametrize(
    "status, words",
    [(403, "may not write to 'some/tiny'"), (500, "refuses 'some/tiny' with status 500")],
)
def test_what_the_hub_refuses(server, artifact, status, words):
    server.status = status
    code, text = push(artifact, "some/tiny", "--token", "x")
    assert code == 2
    assert words in text
    assert "You don't have the rights" in text
    assert "Traceback" not in text


def test_no_network_and_offline_mode(server, artifact, monkeypatch):
    from huggingface_hub import constants

    server.stop()
    code, text = push(artifact, "some/tiny")
    assert code == 2 and f"cannot reach {server.address}" in text and "HF_ENDPOINT" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, text = push(artifact, "some/tiny")
    assert code == 2 and "HF_HUB_OFFLINE is set" in text


@pytest.mark.parametrize(
    "repo", ["a/b/c", "so--me/x", "some/ti ny", "", "https://huggingface.co/some/tiny"]
)
def test_names_that_are_none(server, artifact, repo):
    code, text = push(artifact, repo)
    assert code == 2 and f"'{repo}' is no name of a repository" in text and not server.files


def test_only_what_is_finished_and_unchanged_is_pushed(server, artifact, tmp_path):
    assert "no such folder" in push(tmp_path / "none", "some/tiny")[1]
    (tmp_path / "empty").mkdir()
    assert "not an artifact of lowbit" in push(tmp_path / "empty", "some/tiny")[1]
    shutil.copytree(artifact, tmp_path / "a.partial")
    assert "is not finished" in push(tmp_path / "a.partial", "some/tiny")[1]
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(
        json.dumps({k: v for k, v in report.items() if k != "verification"})
    )
    assert "is not finished" in push(copy, "some/tiny")[1]
    (copy / "report.json").write_text(json.dumps(report))
    (copy / "recipe.toml").write_text("")
    code, text = push(copy, "some/tiny")
    assert code == 1 and "recipe.toml" in text
    assert not server.files


def test_pushed_and_used_by_its_name(server, artifact, tmp_path):
    env = {
        **os.environ,
        "HF_ENDPOINT": server.address,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path),
    }
    env.pop("HF_HUB_OFFLINE", None)
    done, used = (
        subprocess.run(
            [sys.executable, "-m", "lowbit", *map(str, command)],
            env=env,
            capture_output=True,
            text=True,
        )
        for command in (
            ["push", artifact, "some/tiny"],
            ["generate", "some/tiny", "--prompt", "def ", "--tokens", "8"],
        )
    )
    assert done.returncode == 0 and done.stdout.startswith(f"{server.address}/some/tiny\n"), (
        done.stderr
    )
    assert server.files["some/tiny", "main"]["README.md"] == (artifact / "README.md").read_bytes()
    here = CliRunner().invoke(app, ["generate", str(artifact), "--prompt", "def ", "--tokens", "8"])
    assert used.returncode == 0 and used.stdout == here.stdout, used.stderr
