"""What the demo hands to its job, and what it makes of an endpoint that refuses: without a cluster."""

from http.server import HTTPServer

import pytest

from configs.errors import RunError
from configs.loader import ROOT, load_chatbot
from data.ask import Endpoint, accuracy, ask_all, first_token
from data.conversations import Conversation, Message
from serve.demo import _absolute_paths, _own_key, _reachable
from serve.keys import KeyFile
from tests.helpers.json_door import JsonDoor, listening

ASKED = Conversation((Message("user", "Where?"), Message("assistant", "Here.")), keys=("here",))


@pytest.fixture
def refusing():
    """An endpoint that answers every request with 400, as one does whose model is too short for the question."""

    class Door(JsonDoor):
        def do_POST(self) -> None:
            self.send_json(400, {"error": {"message": "too long", "type": "invalid_request_error"}})

    with listening(HTTPServer(("127.0.0.1", 0), Door)) as address:
        yield f"{address}/v1"


def test_a_refused_question_is_a_wrong_answer(refusing):
    answers = ask_all(Endpoint(refusing), "bot", [ASKED, ASKED], max_tokens=4)
    assert [answer.right for answer in answers] == [False, False]
    assert "too long" in answers[0].text
    assert accuracy(answers) == 0.0


def test_an_endpoint_that_is_not_there_is_one_clear_error(refusing):
    with pytest.raises(RunError, match="no answer from"):
        first_token(Endpoint(refusing), "bot", ASKED)
    with pytest.raises(RunError, match="no answer from"):
        ask_all(Endpoint("http://127.0.0.1:9/v1"), "bot", [ASKED], max_tokens=4)


def test_a_job_gets_paths_that_its_copy_of_the_checkout_has(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert _reachable("configs/helpdesk.yaml") == "configs/helpdesk.yaml"
    assert _reachable(".tandem/models/mine") == str(ROOT / ".tandem" / "models" / "mine"), "git ignores it, so it is not uploaded"
    assert _reachable(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")


def test_only_local_paths_outside_the_upload_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert _absolute_paths(load_chatbot("configs/helpdesk.yaml")) == []
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    assert _absolute_paths(load_chatbot("configs/helpdesk.yaml", [f"data.source={rows}"])) == []
    monkeypatch.chdir(tmp_path)
    config = load_chatbot(ROOT / "configs" / "helpdesk.yaml", ["data.source=rows.jsonl", "model.name=meta-llama/Llama-3.1-8B"])
    assert _absolute_paths(config) == [f"data.source={rows}"]


def test_the_demo_keeps_its_key_while_it_is_valid(home):
    first = _own_key("http://here/v1")
    assert (home / "client.env").read_text() == f"export OPENAI_BASE_URL=http://here/v1\nexport OPENAI_API_KEY={first}\n"
    assert (home / "client.env").stat().st_mode & 0o077 == 0
    assert _own_key("http://here/v1") == first, "whoever uses it goes on"
    KeyFile().revoke("demo")
    second = _own_key("http://here/v1")
    assert second != first
    (home / "client.env").write_text("garbled")
    assert _own_key("http://here/v1") != second, "a secret that is lost cannot be shown again"
    assert [key.is_valid() for key in KeyFile().read()] == [False, False, True]
