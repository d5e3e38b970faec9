"""Datasets of the Hugging Face hub, by the real client against a small hub of our own: no network."""

import hashlib
import os
import subprocess
import sys
from http.server import ThreadingHTTPServer

import pytest

from data.conversations import to_jsonl
from tests.helpers.data import chat
from tests.helpers.json_door import JsonDoor, listening

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


class Hub(JsonDoor):
    """What the client asks of the hub for one public dataset of two files."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            self._send_file(path.rpartition("/")[2])
        elif "/tree/" in path:
            self.send_json(200, [{"type": "file", "oid": _digest(body), "size": len(body), "path": name} for name, body in FILES.items()])
        elif path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": name} for name in FILES]
            self.send_json(200, {"id": "owner/name", "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": siblings})
        else:
            self.send_json(404, {}, x_error_code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_file(self, name: str) -> None:
        if name in FILES:
            self.send_body(200, FILES[name], etag=f'"{_digest(FILES[name])}"', x_repo_commit=COMMIT)
        else:
            self.send_body(404, b"", x_error_code="EntryNotFound", x_repo_commit=COMMIT)


def _digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub():
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as address:
        yield address


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
