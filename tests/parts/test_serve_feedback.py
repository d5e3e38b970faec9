"""Feedback at the front: which answers it may be about, and what is kept of them."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.schema import DataConfig, FeedbackConfig
from data.feedback import as_conversation
from data.feedback_store import FeedbackStore, read_feedback
from data.formats import read_conversations
from serve.feedback import FeedbackDesk
from serve.keys import KeyFile
from tests.helpers.front import ASKED, NOWHERE, PROMPT, QUESTION, Answer, chat, make_front, refused

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
        made = ids.make(name, None)
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
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/completions"])
def test_other_routes_conversations_are_not_kept(path, stream, ask, engine, keys):
    engine.pieces = STREAMED if stream else WHOLE
    fields = {"messages": [QUESTION], "input": [QUESTION], "prompt": "Hi", "stream": stream}
    assert ask("POST", path, {"model": "helpdesk", "max_tokens": 5, **fields}, feedback=KEEPS).status == 200
    assert not keys.file.with_name("feedback.db").exists(), "nothing was written at all"


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


def exported(command, *words: str) -> tuple[str, list[dict[str, Any]]]:
    ended = command("serve", "feedback", "export", "out.jsonl", *words)
    assert ended.status == 0, ended.err
    return ended.out, [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_feedback_is_exported_with_what_can_be_trained_on(command, home):
    asyncio.run(fill(FeedbackDesk.of_home(KEEPS).store))
    out, lines = exported(command)
    assert out == "written  4 of 4 to out.jsonl\n"
    assert [line["rating"] for line in lines] == ["up", "down", "down", "up"]
    assert lines[0]["messages"] == [QUESTION]
    assert "messages" not in lines[3]
    out, lines = exported(command, "--train")
    assert out == "written  2 of 4 to out.jsonl; 2 have no conversation that could be trained on\n"
    assert [line["messages"][0] for line in lines] == [QUESTION] * 2
    read = read_conversations(DataConfig(source="out.jsonl"))
    assert ([one.messages[-1].content for one in read.conversations], read.bad) == (["Forty-two.", "Forty-three."], [])
    assert {file.stat().st_mode & 0o777 for file in (home / "feedback.db", Path("out.jsonl"))} == {0o600}


@pytest.mark.parametrize("words", [(), ("--train",)], ids=["all", "train"])
def test_an_export_says_that_the_database_is_away(words, command, home, monkeypatch):
    monkeypatch.setenv("FEEDBACK_URL", "sqlite:////nowhere/feedback.db")
    ended = command("serve", "feedback", "export", "out.jsonl", *words)
    assert ended.status == 2
    for said in ("feedback cannot be read from sqlite:////nowhere/feedback.db", "unable to open database file", "FEEDBACK_URL"):
        assert said in ended.err
    assert not Path("out.jsonl").exists()


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SYSTEM, ANSWERED = {"role": "system", "content": PROMPT}, {"role": "assistant", "content": "Gut."}
UNTRAINABLE: list[list[Any]] = [
    [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "42"}],
    [QUESTION, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}, QUESTION],
    [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "refusal", "refusal": "No."}]}],
    [QUESTION, SYSTEM],
    [SYSTEM, {"role": "developer", "content": "Mine."}, QUESTION],
    [SYSTEM],
    [ANSWERED, QUESTION],
    [QUESTION, {"role": "assistant", "content": ""}, QUESTION],
    [QUESTION, "Hi"],
]


def test_what_is_exported_for_training_is_what_data_reads(tmp_path):
    row = {"rating": "up", "finish_reason": "stop", "answer": "Gut.", "better_answer": None, "completion_id": "x", "version": "helpdesk:2"}
    assert [as_conversation({**row, "messages": messages}) for messages in UNTRAINABLE] == [None] * len(UNTRAINABLE)
    parts = {"role": "user", "content": [{"type": "text", "text": "Wie "}, {"type": "text", "text": "geht's?"}], "name": "Ann"}
    good = [[{"role": "developer", "content": PROMPT}, QUESTION], [parts, ANSWERED, QUESTION]]
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(as_conversation({**row, "messages": messages})) + "\n" for messages in good))
    read = read_conversations(DataConfig(source=str(file)))
    assert read.bad == []
    assert [[turn.role for turn in one.messages] for one in read.conversations] == [
        ["system", "user", "assistant"],
        ["user", "assistant", "user", "assistant"],
    ]
    assert read.conversations[1].messages[0].content == "Wie geht's?"


async def fill(store: FeedbackStore) -> None:
    """Three opinions with their conversations, and one of an answer that was not kept."""
    opinions: list[dict[str, Any]] = [{"rating": "up"}, {"rating": "down"}, {"rating": "down", "better_answer": "Forty-three."}]
    for number, opinion in enumerate([*opinions, {"rating": "up"}]):
        about = {"completion_id": f"chatcmpl-{number}", "version": "helpdesk:2", "key_name": None, "created_s": float(number)}
        if number < len(opinions):
            row = {**about, "messages": [QUESTION], "answer": "Forty-two.", "finish_reason": "stop"}
            store.keep(lambda row=row: row)
        await store.save({**about, "comment": None, "better_answer": None, **opinion})
    store.close()
