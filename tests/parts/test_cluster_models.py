"""Whether a base model can be had: folders, the hub by its real client against a small hub of our own, and fingerprints."""

import json
import os
import shutil
import socket
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.models import SAMPLE_BYTES, check_model, ensure_model, model_fingerprint
from configs.errors import ModelError
from configs.loader import ROOT
from configs.schema import ModelConfig
from tests.helpers.json_door import JsonDoor, listening

COMMIT = "a" * 40
# Each is name, revision and token; a process of its own asks, because the hub's address is read when its library is first imported.
QUESTIONS = {
    "good": ("owner/good", None, ""),
    "good at a revision": ("owner/good", "main", ""),
    "gated, with a token": ("owner/gated", None, "hf_accepted"),
    "gated, without a token": ("owner/gated", None, ""),
    "gated, not accepted": ("owner/gated", None, "hf_not_accepted"),
    "no such revision": ("owner/good", "v9", ""),
    "unknown": ("owner/none", None, ""),
    "unknown, with a token": ("owner/none", None, "hf_any"),
    "no name": ("no such/name at all", None, ""),
    "a folder's name without ./": ("models/llama/8b", None, ""),
    "pickled": ("owner/pickled", None, ""),
    "expired token": ("owner/good", None, "hf_expired"),
    "failing hub": ("owner/broken", None, ""),
}
ASK = """
import json, os, sys
from cluster.models import check_model
from configs.errors import ModelError
from configs.schema import ModelConfig
answers = {}
for about, (name, revision, token) in json.loads(sys.argv[1]).items():
    os.environ["HUGGINGFACE_TOKEN"] = token
    try:
        check_model(ModelConfig(name=name, revision=revision))
        answers[about] = ["ok", "", ""]
    except ModelError as error:
        answers[about] = [error.what, error.why, error.remedy]
    except Exception as error:
        answers[about] = ["a bug", repr(error), ""]
print(json.dumps(answers))
"""


class Hub(JsonDoor):
    """What the client asks of the hub before a download; a gated model's facts are open to all, its files are not."""

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = self.path.partition("?")[0].removeprefix("/api/models/")
        name, part = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        if token == "hf_expired":
            self.send_json(401, {"error": "Invalid credentials in Authorization header"})
        elif name == "owner/broken":
            self.send_json(500, {"error": "Internal error"})
        elif name not in ("owner/good", "owner/pickled", "owner/gated"):
            self.send_json(401 if not token else 404, {"error": "Repository not found"}, x_error_code="RepoNotFound")
        elif part == "auth-check":
            if name == "owner/gated" and token != "hf_accepted":
                self.send_json(403 if token else 401, {"error": f"Access to model {name} is restricted."}, x_error_code="GatedRepo")
            else:
                self.send_json(200, {})
        elif part and part != "revision/main":
            self.send_json(404, {"error": f"Invalid rev id: {part}"}, x_error_code="RevisionNotFound")
        else:
            weights = "pytorch_model.bin" if name == "owner/pickled" else "model.safetensors"
            siblings = [{"rfilename": file} for file in ("config.json", weights)]
            self.send_json(200, {"id": name, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": siblings})


def ask(endpoint: str, folder: Path, questions: dict) -> dict[str, list[str]]:
    """Check models with an empty cache and nothing of the developer's environment."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env = {**os.environ, **hub, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), "TANDEM_HOME": str(folder)}
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        env.pop(name, None)
    command = [sys.executable, "-c", ASK, json.dumps(questions)]
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Answers to all questions; one process asks them, because its start takes more than a second."""
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as address:
        yield ask(address, tmp_path_factory.mktemp("hub"), QUESTIONS)


@pytest.mark.parametrize("about", ["good", "good at a revision", "gated, with a token"])
def test_a_model_of_the_hub_that_may_be_had_is_taken(about, answers):
    assert answers[about][0] == "ok"


def test_a_gated_model_is_refused_with_the_page_and_the_token_that_it_wants(answers):
    what, why, remedy = answers["gated, without a token"]
    assert (what, why) == ("owner/gated is gated, and there is no token", "HUGGINGFACE_TOKEN is not set")
    assert "https://huggingface.co/owner/gated" in remedy
    assert "HUGGINGFACE_TOKEN=hf_..." in remedy
    assert answers["gated, not accepted"] == [
        "owner/gated is gated, and your token may not read it",
        "its licence is not accepted yet",
        "accept it at https://huggingface.co/owner/gated",
    ]


@pytest.mark.parametrize("about", ["unknown", "unknown, with a token", "no name", "a folder's name without ./"])
def test_an_unknown_model_is_refused(about, answers):
    what, _, remedy = answers[about]
    assert what == f"unknown model {QUESTIONS[about][0]!r}"
    assert "smollm2-135m or a local folder" in remedy


def test_a_revision_that_is_not_there_is_refused(answers):
    assert answers["no such revision"][0] == "owner/good has no revision 'v9'"


def test_a_model_without_safetensors_is_refused(answers):
    assert answers["pickled"][:2] == ["owner/pickled has no safetensors", "other weight formats can run code when read"]


def test_a_token_that_the_hub_refuses_is_named_as_the_reason(answers):
    what, why, remedy = answers["expired token"]
    assert "token" in f"{what} {why}".lower()
    assert "HUGGINGFACE_TOKEN" in remedy


def test_a_hub_that_fails_is_named_as_the_reason(answers):
    assert "the hub did not answer" in answers["failing hub"][1]


def test_a_hub_out_of_reach_is_refused(tmp_path):
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{held.getsockname()[1]}"
        found = ask(closed, tmp_path, {"without": ("owner/good", None, ""), "with": ("owner/good", None, "hf_any")})
    for what, why, remedy in found.values():
        assert what == "unknown model 'owner/good'"
        assert "the hub did not answer" in why
        assert "check model.name and the network" in remedy
    assert "HUGGINGFACE_TOKEN" in found["without"][2]
    assert "HUGGINGFACE_TOKEN" not in found["with"][2]


@pytest.fixture
def folder(home, tmp_path) -> Path:
    """A folder in the layout of a model; its weights are only bytes."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    return made


def refused(name: object) -> ModelError:
    with pytest.raises(ModelError) as error:
        check_model(ModelConfig(name=str(name)))
    return error.value


def test_a_models_folder_is_taken_by_any_way_of_naming_it(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (str(folder), "./model", "model", "~/model"):
        check_model(ModelConfig(name=name))
        assert ensure_model(ModelConfig(name=name)) == folder


def test_folders_that_hold_no_model_are_refused_with_the_reason(folder):
    assert refused(folder.parent / "gone").why == "it has no config.json"
    (folder / "model.safetensors").unlink()
    assert refused(folder).why == "it has no weights"
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert refused(folder).why == "it has weights in another format, which can run code when read"
    (folder / "config.json").write_text('{"architectures": []}')
    assert refused(folder).why == "its config.json names no model_type"
    (folder / "config.json").unlink()
    assert refused(folder).why == "it has no config.json"


@pytest.mark.parametrize("text", ["{", "[]", "", "\x00"])
def test_a_broken_config_of_a_model_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    assert str(folder) in refused(folder).what


def test_the_small_model_needs_no_hub(home):
    check_model(ModelConfig())


def test_the_fingerprint_changes_with_the_weights_and_not_with_the_folder(folder, tmp_path):
    large = bytearray(os.urandom(1024) * (3 * SAMPLE_BYTES // 1024))
    weights = folder / "model.safetensors"
    weights.write_bytes(large)
    prints = {"as it was": model_fingerprint(folder)}
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert model_fingerprint(tmp_path / "elsewhere") == prints["as it was"]
    for place in (0, SAMPLE_BYTES - 1, len(large) - SAMPLE_BYTES, len(large) - 1):
        changed = bytearray(large)
        changed[place] ^= 1
        weights.write_bytes(changed)
        prints[f"byte {place}"] = model_fingerprint(folder)
    weights.write_bytes(large + b"x")
    prints["longer"] = model_fingerprint(folder)
    weights.write_bytes(large)
    (folder / "second.safetensors").write_bytes(b"")
    prints["another file"] = model_fingerprint(folder)
    (folder / "second.safetensors").unlink()
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 5}')
    prints["another config"] = model_fingerprint(folder)
    assert len(set(prints.values())) == len(prints)
    assert all(len(entry) == 16 and int(entry, 16) >= 0 for entry in prints.values())


def test_the_fingerprint_of_a_folder_does_not_read_what_is_no_weight(folder):
    before = model_fingerprint(folder)
    (folder / "README.md").write_text("words")
    assert model_fingerprint(folder) == before
