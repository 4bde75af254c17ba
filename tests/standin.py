"""A small server that takes uploads, and gives them back, by the endpoints that huggingface_hub
calls.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0" * 40


class Hub:
    """Repositories in memory.

    Attributes:
        files: (repository, branch) -> path -> bytes. private: repository -> whether it was made
            private.
        token: the one that may write, None to take everybody. status: answered to whoever wants to
            make a repository, 200 to do it.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.token: str | None = None
        self.status = 200
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=lambda: self._server.serve_forever(0.02), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def rebuilt(self, repo: str, folder: Path, branch: str = "main") -> Path:
        """A folder with what was uploaded."""
        for path, data in self.files[repo, branch].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    def answer(self, method: str, path: str, body: bytes, bearer: str | None) -> tuple[int, object]:
        """(status, what goes back as JSON, or bytes of a file)."""
        parts = [unquote(p) for p in path.split("?")[0].strip("/").split("/")]
        if method == "PUT":
            self._large[parts[-1]] = body
            return 200, {}
        if parts[2:3] == ["resolve"]:
            branch = "main" if parts[3] == COMMIT else parts[3]
            data = self.files.get(("/".join(parts[:2]), branch), {}).get("/".join(parts[4:]))
            return (404, {}) if data is None else (200, data)
        if method == "GET":
            repo = "/".join(parts[2:4])
            listed = [{"rfilename": path} for path in self.files.get((repo, "main"), ())]
            return (
                (200, {"id": repo, "sha": COMMIT, "siblings": listed})
                if self.known(repo)
                else (404, {})
            )
        if self.token is not None and bearer != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if parts == ["api", "validate-yaml"]:
            return 200, {}
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.address}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {
                "transfer": "basic",
                "objects": [{k: o[k] for k in ("oid", "size", "actions")} for o in objects],
            }
        repo, what, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "branch":
            found = (repo, branch) in self.files
            self.files.setdefault((repo, branch), dict(self.files[repo, "main"]))
            return (409 if found else 200), {}
        if what == "preupload":
            names = [f["path"] for f in json.loads(body)["files"]]
            return 200, {
                "files": [
                    {
                        "path": n,
                        "uploadMode": "lfs" if n.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for n in names
                ]
            }
        assert what == "commit"
        return self._commit(repo, branch, [json.loads(line) for line in body.splitlines()])

    def known(self, repo: str) -> bool:
        return (repo, "main") in self.files

    def _create(self, given: dict[str, object]) -> tuple[int, object]:
        repo = f"{given['organization'] or 'me'}/{given['name']}"
        if self.status != 200:
            return self.status, {
                "error": "You don't have the rights to create a model under this namespace"
            }
        found = self.known(repo)
        self.files.setdefault((repo, "main"), {})
        self.private.setdefault(
            repo, given.get("visibility") == "private" or given.get("private") is True
        )
        return (409 if found else 200), {"url": f"{self.address}/{repo}"}

    def _commit(
        self, repo: str, branch: str, lines: list[dict[str, dict[str, str]]]
    ) -> tuple[int, object]:
        held = self.files[repo, branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                data = self._large[value["oid"]]
                assert (
                    hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                )
                held[value["path"]] = data
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = self.headers.get("Content-Length")
                if length is not None:
                    body = self.rfile.read(int(length))
                else:
                    body = (
                        b"".join(self._chunks())
                        if self.headers.get("Transfer-Encoding") == "chunked"
                        else b""
                    )
                status, data = hub.answer(
                    self.command, self.path, body, self.headers.get("Authorization")
                )
                answer = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(answer).hexdigest()}"')
                if status == 404:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            def _chunks(self):
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            do_GET = do_POST = do_PUT = do_HEAD = _answer

            def log_message(self, *args: object) -> None:
                pass

        return Handler
