"""Datasets of the Hugging Face hub, by the real client against a small hub of our own: no network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.conversations import to_jsonl
from tests.helpers.data import chat

COMMIT = "a" * 40
FILES = {
    "train.jsonl": to_jsonl(chat(f"q{number}", "a") for number in range(12)).encode(),
    "test.jsonl": to_jsonl([chat("t", "a")]).encode(),
}
READ = """
import sys
from configs.errors import DataError
from configs.schema import DataConfig
from data.formats import read_conversations
for split in ("row", "marked"):
    found = read_conversations(DataConfig(source="owner/name", split=split))
    print(split, len(found.conversations), len(found.bad), found.conversations[-1].origin, found.conversations[-1].split)
try:
    read_conversations(DataConfig(source="owner/other"))
except DataError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """What the client asks of the hub for one public dataset of two files."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            self._send_file(path.rpartition("/")[2])
        elif "/tree/" in path:
            self._send_json([{"type": "file", "oid": _digest(body), "size": len(body), "path": name} for name, body in FILES.items()])
        elif path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send_json({"id": "owner/name", "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": siblings})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_file(self, name: str) -> None:
        if name in FILES:
            self._send(200, FILES[name], {"ETag": f'"{_digest(FILES[name])}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hub_dataset_is_read_and_a_missing_one_is_named(hub, tmp_path):
    """In a process of its own, because the hub's address is read when its library is first imported."""
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    ended = subprocess.run([sys.executable, "-c", READ], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "row 12 0 owner/name/train:12 None",
        "marked 13 0 owner/name/test:1 heldout",
        "no dataset 'owner/other'",
        "no file or folder of this name, and the hub has none that you may see",
        "Try: check data.source; a private dataset needs HUGGINGFACE_TOKEN",
    ]
