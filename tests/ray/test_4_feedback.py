"""Feedback on a real engine: by the official client, on ids of streams and of whole answers."""

import json

import anthropic
import openai
import pytest

from data.feedback_store import read_feedback
from tests.ray.stack import Stack

QUESTION = [{"role": "user", "content": "What is number 3?"}]


@pytest.fixture(scope="module")
def clients(stack: Stack, live_guide) -> dict[str, openai.OpenAI]:
    """The clients of two people, each with a key."""
    made = {name: stack.make_key(name) for name in ("ada", "ben")}
    return {name: openai.OpenAI(base_url=stack.endpoint, api_key=secret, max_retries=0) for name, secret in made.items()}


def rate(client: openai.OpenAI, completion_id: str, **said: str) -> dict[str, str]:
    return client.post("/feedback", body={"completion_id": completion_id, "rating": "up", **said}, cast_to=dict[str, str])


def test_an_answer_is_rated_by_its_id_streamed_or_whole(stack: Stack, live_guide, clients):
    ada = clients["ada"]
    chunks = list(ada.chat.completions.create(model="guide", messages=QUESTION, max_tokens=6, stream=True))
    (streamed,) = {chunk.id for chunk in chunks}
    whole = ada.chat.completions.create(model=live_guide, messages=QUESTION, max_tokens=6)
    plain = ada.completions.create(model="guide", prompt="What is number 3?", max_tokens=6)
    response = ada.responses.create(model="guide", input="What is number 3?", instructions="Be kind.", max_output_tokens=6)
    other = anthropic.Anthropic(base_url=stack.endpoint.removesuffix("/v1"), api_key=ada.api_key)
    message = other.messages.create(model="guide", messages=QUESTION, max_tokens=6)
    for completion_id in (streamed, whole.id, plain.id, response.id, message.id):
        assert rate(ada, completion_id, comment="Good.")["model"] == live_guide
    rows = {row["completion_id"]: row for row in read_feedback(f"sqlite:///{stack.home}/feedback.db")}
    assert {(rows[one]["version"], rows[one]["key_name"]) for one in (streamed, whole.id, plain.id)} == {(live_guide, "ada")}
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert (rows[streamed]["messages"], rows[streamed]["answer"]) == (QUESTION, said)
    assert rows[whole.id]["answer"] == whole.choices[0].message.content
    assert rows[plain.id]["messages"] is None, "a plain completion is no conversation"
    kept = rows[response.id]
    assert (kept["messages"], kept["answer"]) == ([{"role": "system", "content": "Be kind."}, *QUESTION], response.output_text)
    assert (rows[message.id]["messages"], rows[message.id]["answer"]) == (QUESTION, message.content[0].text)
    (ended,) = {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason}
    reasons = [rows[one]["finish_reason"] for one in (streamed, whole.id, response.id, message.id)]
    of_response, of_message = {"incomplete": "length", "completed": "stop"}, {"max_tokens": "length", "end_turn": "stop"}
    told = [of_response[response.status], of_message[message.stop_reason]]
    assert reasons == [ended, whole.choices[0].finish_reason, *told], "a random answer may end by itself"


def test_an_id_that_a_client_makes_up_or_was_given_to_another_is_unknown(clients):
    ada, ben = clients["ada"], clients["ben"]
    answer = ada.chat.completions.create(model="guide", messages=QUESTION, max_tokens=2, extra_headers={"X-Request-Id": "mine"})
    assert answer.id != "chatcmpl-mine"
    for client, completion_id in ((ben, answer.id), (ada, "chatcmpl-mine"), (ada, answer.id + "0")):
        with pytest.raises(openai.NotFoundError) as refusal:
            rate(client, completion_id)
        assert refusal.value.body["param"] == "completion_id"


def test_it_becomes_rows_to_review_without_personal_data(stack: Stack, config, clients):
    ada = clients["ada"]
    asked = {"role": "user", "content": "I am Martha Okonkwo. What is number 3?"}
    answer = ada.chat.completions.create(model="guide", messages=[asked], max_tokens=2)
    rate(ada, answer.id, rating="down", better_answer="It is 21.")
    done = stack.run("data", "feedback", str(config), "name=guide", "--since", "1h")
    assert done.returncode == 0, done.stderr
    waiting = [json.loads(line) for line in (stack.home / "feedback" / "guide" / "pending.jsonl").read_text().splitlines()]
    (row,) = [row for row in waiting if row["completion_id"] == answer.id]
    assert [message["content"] for message in row["messages"]] == ["I am <PERSON>. What is number 3?", "It is 21."]
    assert "Martha" not in done.stdout + done.stderr
