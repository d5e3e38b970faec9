"""The judge over HTTP, and the page that shows answers: against an endpoint of the test's own."""

import json
import re
import time
from http.server import ThreadingHTTPServer

import pytest

from cluster.registry import Version
from configs.errors import DataError, RunError
from configs.schema import JudgeConfig
from data.ask import Answer, Endpoint, token_logprobs
from data.conversations import Conversation, Message
from data.template import NO_LOSS, TokenRow
from tests.helpers.json_door import JsonDoor, listening
from train.contenders import Contender, Measured, as_asked, spread, surprise
from train.evaluate import Evaluation
from train.judge import judge, read_verdict, sample_of
from train.report_page import page
from train.scores import Sample, measure_all


def answer(text: str, asked: str = "Where?", wanted: str = "Here.", group: str | None = None) -> Answer:
    return Answer(Conversation((Message("user", asked), Message("assistant", wanted)), keys=("here",), group=group), text, "here" in text)


@pytest.fixture
def asked_of_judge():
    """A judge that likes the longer answer, always takes A of two equally long, and is told what nobody else is."""
    requests = []

    class Door(JsonDoor):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.headers["Authorization"], body))
            text = body["messages"][0]["content"]
            first, second = (re.search(f"<answer_{name}>\n(.*?)\n</answer_{name}>", text, re.DOTALL)[1] for name in "AB")
            said = "I cannot say." if "mumble" in first else f"Longer.\nVerdict: {'B' if len(second) > len(first) else 'A'}"
            self.send_json(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [_choice(said)]})

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Door)) as address:
        yield f"{address}/v1", requests


def _choice(text: str) -> dict:
    return {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}


def test_each_pair_is_judged_in_both_orders_and_a_change_of_mind_is_a_tie(asked_of_judge, tmp_path, monkeypatch):
    address, requests = asked_of_judge
    monkeypatch.setenv("JUDGE_API_KEY", "sk-judge")
    (tmp_path / "rubric.md").write_text("Longer is {better}.")
    config = JudgeConfig(address=address, model="m", rubric=str(tmp_path / "rubric.md"))
    ours = [answer("a long answer"), answer("no"), answer("same"), answer("mumble"), answer("longest")]
    theirs = [answer("short"), answer("a long answer"), answer("size"), answer("x"), answer("long")]
    verdicts = judge(config, ours, theirs)
    assert [(verdict.points, verdict.unclear) for verdict in verdicts] == [(1, False), (0, False), (0.5, False), (0.5, True), (1, False)]
    assert len(requests) == 10
    assert {key for key, _ in requests} == {"Bearer sk-judge"}
    assert "Longer is {better}." in requests[0][1]["messages"][0]["content"]
    assert "<reference_answer>\nHere.\n" in requests[0][1]["messages"][0]["content"]


def test_a_judge_that_mostly_gives_no_verdict_is_no_judge(asked_of_judge):
    config = JudgeConfig(address=asked_of_judge[0], model="m")
    with pytest.raises(RunError, match=r"gave no verdict on 1 of 2 questions(.|\n)*I cannot say"):
        judge(config, [answer("mumble"), answer("a long answer")], [answer("x"), answer("short")])


def test_wordings_of_one_question_count_as_one_for_the_judge(asked_of_judge):
    config = JudgeConfig(address=asked_of_judge[0], model="m")
    ours = [answer("a long answer", group="where"), answer("a longer answer", group="where"), answer("no"), answer("mumble"), answer("yes")]
    sample = sample_of(judge(config, ours, [answer("short"), answer("short"), answer("a long answer"), answer("x"), answer("no")]))
    assert (sample.tops, sample.drawn()) == ((1, 1, 0, 1), ((2, 0, 1), (2, 1, 1)))


def test_a_judge_that_is_away_or_has_no_rubric_is_one_clear_error(asked_of_judge):
    with pytest.raises(DataError, match=r"cannot read the rubric nowhere\.md"):
        judge(JudgeConfig(address=asked_of_judge[0], model="m", rubric="nowhere.md"), [answer("a")], [answer("b")])
    with pytest.raises(RunError, match=r"no answer from http://127\.0\.0\.1:9/v1"):
        judge(JudgeConfig(address="http://127.0.0.1:9/v1", model="m"), [answer("a")], [answer("b")])


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("Verdict: A", 1),
        ("**Verdict:** B.", 0),
        ("verdict: TIE", 0.5),
        ("Verdict: A? No.\nVerdict: B", 0),
        ("A", 1),
        ("A fine one", None),
        ("Verdict: a tie.", 0.5),
        ("Verdict: A\nB is far off", 1),
        ("", None),
    ],
)
def test_the_last_verdict_holds(text, points):
    assert read_verdict(text) == points


def test_an_endpoint_that_is_not_vllms_cannot_measure_perplexity():
    class Door(JsonDoor):
        def do_POST(self) -> None:
            self.send_json(200, {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [{"index": 0, "text": ""}]})

    row = TokenRow([1, 2, 3], [NO_LOSS, 2, 3])
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Door)) as address, pytest.raises(RunError, match="cannot measure perplexity"):
        token_logprobs(Endpoint(f"{address}/v1"), "m", [row])


def test_only_the_assistants_tokens_surprise():
    row = TokenRow([7, 8, 9], [NO_LOSS, 8, 9])
    assert surprise([{8: -0.5, 1: -9.0}, {9: -0.25}], row) == 0.75


def test_each_is_asked_with_its_own_system_message():
    plain = Conversation((Message("user", "Hi"), Message("assistant", "Ho")))
    prepared = Conversation((Message("system", "Ours"), *plain.messages))
    special = Conversation((Message("system", "Of this row"), *plain.messages))
    assert as_asked(prepared, "Ours", "Theirs").messages[0] == Message("system", "Theirs")
    assert as_asked(prepared, "Ours", None) == plain
    assert as_asked(plain, "Ours", "Ours") == prepared
    assert as_asked(special, "Ours", "Theirs") == special
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == [0, 1, 2]


def test_the_page_escapes_what_anybody_wrote_and_has_no_outside_address():
    evil = "<script>alert(1)</script>"
    said = {name: [answer(f"{name} says here {evil}", asked=evil)] for name in ("bot:2", "bot:1")}
    samples = {"accuracy": Sample.of_shares("accuracy", [1.0, 0.0])}
    measured = {name: Measured(Contender(name), answers, [], samples, measure_all(samples)) for name, answers in said.items()}
    found = Evaluation(Version("bot", 2, "r" * 32, {}), "bot:1", measured, {}, notes=[evil], began_s=time.time())
    text = page(found)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 4
    assert "50.0%" in text
    assert "http" not in text
