"""Feedback at the front: which answers it may be about, and what is kept of them."""

import asyncio
import json
import re
from typing import Any

import pytest

from configs.schema import FeedbackConfig
from data.feedback_store import read_feedback
from serve.keys import KeyFile
from tests.helpers.front import ASKED, NOWHERE, OPERATOR_SECRET, PROMPT, QUESTION, Answer, chat, make_front, refused

KEEPS = FeedbackConfig(keep_conversations=True)


def events(*texts: str, end: str | None = "stop") -> tuple[bytes, ...]:
    """An answer as vLLM streams it; without an end, as far as it came."""
    said: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}, *({"delta": {"content": text}} for text in texts)]
    if end:
        said.append({"delta": {}, "finish_reason": end})
    chunks = [{"id": "chatcmpl-ID", "choices": [{"index": 0, **choice}]} for choice in said]
    return tuple(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks) + ((b"data: [DONE]\n\n",) if end else ())


def whole(text: str) -> tuple[bytes, ...]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return (json.dumps({"id": "chatcmpl-ID", "choices": [choice]}).encode(),)


def say(ask, completion_id: str, secret: str | None = None, **said: Any) -> Answer:
    headers = [(b"authorization", f"Bearer {secret}".encode())] if secret else ()
    return ask("POST", "/v1/feedback", {"completion_id": completion_id, "rating": "up", **said}, headers)


def keyed(ask, secret: str, **changes: Any) -> Answer:
    return ask("POST", "/v1/chat/completions", {**ASKED, **changes}, [(b"authorization", f"Bearer {secret}".encode())])


@pytest.fixture
def rows(keys):
    return lambda: read_feedback(f"sqlite:///{keys.file.with_name('feedback.db')}")


def test_an_answer_is_rated_by_its_id_which_says_the_version(ask, engine, rows):
    chat(ask)
    answer = say(ask, engine.completion_id, comment=" Clear. 😀 ")
    said = {"rating": "up", "comment": "Clear. 😀", "better_answer": None}
    assert answer.json == {"object": "feedback", "id": engine.completion_id, "model": "helpdesk:2", **said}
    (row,) = rows()
    assert row.items() >= {"completion_id": engine.completion_id, "version": "helpdesk:2", "key_name": None, **said}.items()
    assert row["messages"] is row["answer"] is None, "no conversation is kept unless the operator wants it"


def test_who_says_it_again_has_changed_their_mind(ask, engine, rows):
    chat(ask)
    first = engine.completion_id
    chat(ask)
    for completion_id in (first, engine.completion_id):
        say(ask, completion_id)
    assert say(ask, first, rating="down", better_answer="Forty-two.").status == 200
    assert sorted((row["rating"], row["better_answer"]) for row in rows()) == [("down", "Forty-two."), ("up", None)]


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"rating": "good"}, "rating"),
        ({"rating": None}, "rating"),
        ({"rating": ["up"]}, "rating"),
        ({"completion_id": 7}, "completion_id"),
        ({"completion_id": "x" * 10_000}, "completion_id"),
        ({"comment": 5}, "comment"),
        ({"comment": "x" * 4001}, "comment"),
        ({"comment": "half \ud83d"}, "comment"),
        ({"better_answer": "a NUL \x00"}, "better_answer"),
        ({"better_answer": "x" * 4001}, "better_answer"),
        ({"stars": 5}, "stars"),
    ],
)
def test_mistakes_are_named(said, param, ask, engine, rows):
    chat(ask)
    answer = ask("POST", "/v1/feedback", {"completion_id": engine.completion_id, "rating": "up", **said}, max_body_bytes=10**6)
    error = refused(answer, 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"]
    assert len(error["message"]) < 200
    assert rows() == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"rating": "up"}', b'{"completion_id": "x"}'])
def test_a_body_that_lacks_something_is_refused(body, ask, rows):
    refused(ask("POST", "/v1/feedback", body), 400)
    assert rows() == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_feedback_takes_post_alone(method, ask):
    refused(ask(method, "/v1/feedback"), 405)


def test_ids_that_are_not_ours_are_unknown(ask, engine, rows):
    chat(ask)
    good = engine.completion_id
    nonce, seal, version = good.split(".")
    forged = ["", "chatcmpl-", "nothing", good[:-1], good + "0", f"{good}\n", good.removeprefix("chatcmpl-"), good.replace("chatcmpl", "x")]
    forged += [
        f"{nonce}.{seal}.helpdesk:1",
        f"{nonce}A.{seal}.{version}",
        f"{nonce}.{seal[::-1]}.{version}",
        f"{nonce}..{version}",
        "ä.ä.ä",
    ]
    for completion_id in forged:
        error = refused(say(ask, completion_id), 404)
        assert (error["type"], error["param"]) == ("not_found_error", "completion_id")
    assert rows() == []
    assert say(ask, good).status == 200


def test_a_key_speaks_of_its_own_answers_alone(ask, engine, keys, rows):
    alice, bob = keys.create("alice"), keys.create("bob")
    keyed(ask, alice)
    assert say(ask, engine.completion_id).status == 401
    refused(say(ask, engine.completion_id, bob), 404)
    assert say(ask, engine.completion_id, alice).status == 200
    assert [row["key_name"] for row in rows()] == ["alice"]


def test_any_name_of_a_base_stands_in_an_id(ask, shelf, keys):
    """A folder may be named as it likes; what an id holds goes into a header."""
    ids = make_front(None, shelf, keys).feedback.ids
    for name in ("meta-llama/Llama-3.1-8B", "mein Modell.gguf", "模型", "a.b.c"):
        made = ids.make(name, None, "asked")
        assert re.fullmatch(r"[\w.%:-]+", made, re.ASCII)
        assert ids.version_of(f"cmpl-{made}", None) == name


STREAMED, WHOLE = events("For", "ty", "-two."), whole("Forty-two.")


@pytest.mark.parametrize(("stream", "pieces"), [(True, STREAMED), (False, WHOLE)], ids=["streamed", "whole"])
def test_a_conversation_is_kept_where_the_operator_wants_it(stream, pieces, ask, engine, rows):
    engine.pieces = pieces
    answer = ask("POST", "/v1/chat/completions", {**ASKED, "stream": stream}, feedback=KEEPS)
    assert engine.request["messages"][0]["content"] == PROMPT
    assert engine.passed_on == list(range(1, len(pieces) + 1)), "each piece is with the client before the next one is made"
    assert len(answer.pieces) == len(pieces) + 1
    say(ask, engine.completion_id)
    (row,) = rows()
    assert (row["messages"], row["answer"], row["finish_reason"]) == ([QUESTION], "Forty-two.", "stop"), "as the client asked"


@pytest.mark.parametrize("with_keys", [False, True])
def test_what_an_evaluation_asks_is_nobodys_conversation(with_keys, ask, engine, keys, rows):
    if with_keys:
        keys.create("ada")
    engine.pieces = WHOLE
    shown = [(b"authorization", f"Bearer {OPERATOR_SECRET}".encode())]
    ask("POST", "/v1/chat/completions", ASKED, shown, feedback=KEEPS)
    assert say(ask, engine.completion_id, OPERATOR_SECRET).status == 200
    assert [row["messages"] for row in rows()] == [None]


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(ask, engine, rows):
    engine.pieces = events("For", "ty", end=None)
    ask("POST", "/v1/chat/completions", ASKED, feedback=KEEPS)
    say(ask, engine.completion_id)
    assert [(row["answer"], row["finish_reason"]) for row in rows()] == [("Forty", None)]


@pytest.mark.parametrize(
    ("status", "pieces"),
    [
        (400, whole("No.")),
        (200, (b'{"id": "chatcmpl-ID", "choi',)),
        (200, events("x" * 3000) * 1500),
        (200, (b"[]",)),
        (200, ()),
        (200, events(end=None)),
    ],
    ids=["refused", "cut", "huge", "odd", "empty", "wordless"],
)
def test_what_is_no_answer_is_not_kept(status, pieces, ask, engine, rows):
    engine.status, engine.pieces = status, pieces
    assert ask("POST", "/v1/chat/completions", ASKED, feedback=KEEPS).status == status
    say(ask, engine.completion_id)
    assert [row["answer"] for row in rows()] == [None]


@pytest.mark.parametrize("stream", [True, False])
def test_a_plain_completion_is_no_conversation(stream, ask, engine, keys):
    engine.pieces = STREAMED if stream else WHOLE
    fields = {"model": "helpdesk", "prompt": "Hi", "stream": stream, "max_tokens": 5}
    assert ask("POST", "/v1/completions", fields, feedback=KEEPS).status == 200
    assert not keys.file.with_name("feedback.db").exists(), "nothing was written at all"


def named(*told: dict[str, Any]) -> tuple[bytes, ...]:
    """Events with names, as responses and messages have them."""
    return tuple(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in told)


def response(status: str, *texts: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text} for text in texts]
    return {
        "id": "chatcmpl-ID",
        "status": status,
        "output": [{"type": "reasoning"}, {"type": "message", "content": content}] if texts else [],
    }


def message(reason: str | None, *texts: str) -> dict[str, Any]:
    return {"id": "chatcmpl-ID", "type": "message", "content": [{"type": "text", "text": text} for text in texts], "stop_reason": reason}


RESPONSE = [{"type": "response.created", "response": response("in_progress")}]
RESPONSE += [{"type": "response.output_text.delta", "delta": text} for text in ("For", "ty-two.")]
MESSAGE = [{"type": "message_start", "message": message(None)}]
MESSAGE += [{"type": "content_block_start", "content_block": {"type": "text", "text": ""}}]
MESSAGE += [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}} for text in ("For", "ty-two.")]
ENDED = {"type": "response.completed", "response": response("incomplete", "Forty-two.")}
STOPPED = {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("path", "pieces", "reason"),
    [
        ("/v1/responses", (json.dumps(response("completed", "Forty", "-two.")).encode(),), "stop"),
        ("/v1/responses", named(*RESPONSE, ENDED), "length"),
        ("/v1/responses", named(*RESPONSE), None),
        ("/v1/messages", (json.dumps(message("end_turn", "Forty", "-two.")).encode(),), "stop"),
        ("/v1/messages", named(*MESSAGE, STOPPED, {"type": "message_stop"}), "length"),
        ("/v1/messages", named(*MESSAGE), None),
    ],
)
def test_responses_and_messages_are_kept_as_chats_are(path, pieces, reason, ask, engine, rows):
    engine.pieces = pieces
    asked = {"model": "helpdesk", "max_tokens": 5, "stream": len(pieces) > 1}
    turn = {"role": "user", "content": [{"type": "input_text" if path == "/v1/responses" else "text", "text": "Hi"}]}
    asked |= {"input": [turn], "instructions": "Be kind."} if path == "/v1/responses" else {"messages": [turn], "system": "Be kind."}
    assert ask("POST", path, asked, feedback=KEEPS).status == 200
    say(ask, engine.completion_id)
    (row,) = rows()
    assert row["messages"] == [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert (row["answer"], row["finish_reason"]) == ("Forty-two.", reason)


def test_a_response_to_a_plain_text_is_a_chat_of_one_turn(ask, engine, rows):
    engine.pieces = (json.dumps(response("completed", "Hello.")).encode(),)
    ask("POST", "/v1/responses", {"model": "helpdesk", "input": "Hi"}, feedback=KEEPS)
    say(ask, engine.completion_id)
    assert [row["messages"] for row in rows()] == [[{"role": "user", "content": "Hi"}]]


def test_a_database_that_is_gone_fails_no_answer(shelf, engine, caplog):
    """Feedback itself is told so; and no word that was said gets into the log."""
    front = make_front(engine, shelf, KeyFile(NOWHERE), feedback=KEEPS)
    engine.pieces = events("Forty-two.")

    async def ask_one(path: str, body: dict[str, Any]) -> Answer:
        coming = iter([{"type": "http.request", "body": json.dumps(body).encode()}, {"type": "http.disconnect"}])
        answer = engine.answer = Answer()

        async def receive() -> dict[str, Any]:
            return next(coming)

        await front({"type": "http", "method": "POST", "path": path, "headers": []}, receive, answer.send)
        return answer

    async def ask_several() -> None:
        await front.adapters.refresh()
        for _ in range(3):
            assert (await ask_one("/v1/chat/completions", ASKED)).status == 200
        answer = await ask_one("/v1/feedback", {"completion_id": engine.completion_id, "rating": "up", "comment": "secret comment"})
        assert refused(answer, 503)["message"] == "feedback cannot be stored now"
        assert int(answer.headers[b"retry-after"]) > 0

    asyncio.run(ask_several())
    front.feedback.store.close()
    assert front.feedback.store.num_dropped == 3
    assert caplog.text.count("conversations are not kept") == 1
    assert "unable to open database file" in caplog.text
    for word in ("Wie geht", "Forty", "secret comment"):
        assert word not in caplog.text


def test_the_page_is_told_whether_conversations_are_kept(ask, keys):
    keys.create("alice")
    assert ask("GET", "/page.json").json == {"consent": None, "max_letters": 4000}
    told = ask("GET", "/page.json", feedback=FeedbackConfig(keep_conversations=True, consent="All is stored.", max_letters=50)).json
    assert told == {"consent": "All is stored.", "max_letters": 50}
