"""Models by hub id: through huggingface_hub against a small server that answers as the hub does,
then from the cache alone.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import save_tiny

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(address, cache folder, calibration text) of a hub with the one repository some/tiny."""
    folder = save_tiny(tmp_path_factory.mktemp("hub"), max_shard_size="60KB")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(False)

        def do_GET(self):
            self._answer(True)

        def _answer(self, body):
            path = folder / self.path.split("?")[0].rsplit("/", 1)[1]
            known = self.path.startswith(
                ("/some/tiny/resolve/main/", f"/some/tiny/resolve/{COMMIT}/")
            )
            data = path.read_bytes() if known and path.is_file() else b""
            if self.path.startswith("/api/models/some/tiny"):
                listed = [{"rfilename": p.name} for p in folder.iterdir() if p.name != "text.txt"]
                data = json.dumps({"id": "some/tiny", "sha": COMMIT, "siblings": listed}).encode()
            self.send_response(200 if data else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            if not data:
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield (
        f"http://127.0.0.1:{server.server_port}",
        tmp_path_factory.mktemp("cache"),
        folder / "text.txt",
    )
    server.shutdown()


def lowbit(hub, *arguments, **more):
    address, cache, _ = hub
    env = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }
    env.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in more else None
    env.pop("TRANSFORMERS_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", "lowbit", *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
    )


def test_a_sharded_model_is_fetched_by_name_and_found_again_offline(hub, tmp_path):
    command = [
        "quantize",
        "some/tiny",
        "--scheme",
        "W4A16g16",
        "--recipe",
        "rtn",
        "--calib",
        hub[2],
        "--samples",
        "4",
        "--length",
        "32",
    ]
    first = lowbit(hub, *command, "-o", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    again = lowbit(hub, *command, "-o", tmp_path / "b", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(list(hub[1].rglob("model-*.safetensors"))) > 1
    for path in (*(tmp_path / "a").glob("*.safetensors"), tmp_path / "a" / "README.md"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    card = (tmp_path / "a" / "README.md").read_text()
    assert (
        "\nbase_model: some/tiny\n" in card
        and "\nlicense: apache-2.0\n" in card
        and "\nlowbit quantize some/tiny " in card
    )


@pytest.mark.parametrize("name, offline", [("some/other", False), ("some/other", True)])
def test_a_repository_that_is_not_there_is_an_error(hub, tmp_path, name, offline):
    result = lowbit(
        hub,
        "quantize",
        name,
        "-o",
        tmp_path / "out",
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
    )
    assert result.returncode == 2
    assert name in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
