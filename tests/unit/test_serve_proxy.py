"""What Serve's own proxy is wrapped in: it speaks where the proxy ends without a word, and is silent otherwise."""

import asyncio
from typing import Any

import pytest

from serve.protocols import PROTOCOLS
from serve.proxy import LastWords
from serve.refusal import engine_lost
from tests.helpers.front import Answer

CHAT = "/v1/chat/completions"
PIECE = {"type": "http.response.body", "body": b"data: one\n\n", "more_body": True}
END = {"type": "http.response.body", "body": b""}


def start(kind: bytes = b"text/event-stream; charset=utf-8", status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def ask(messages: list[dict[str, Any]], path: str = CHAT, kind: str = "http") -> Answer:
    """Ask a proxy that says no more than these messages."""
    answer = Answer()

    async def proxy(scope, receive, send) -> None:
        for message in messages:
            await send(message)

    asyncio.run(LastWords(proxy)({"type": kind, "path": path}, None, answer.send))
    return answer


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_stream_that_is_given_up_ends_with_its_routes_error(path):
    answer = ask([start(), PIECE], path)
    assert answer.pieces == [b"data: one\n\n", PROTOCOLS[path].error_event(engine_lost())]


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_request_without_any_answer_may_be_asked_again(path):
    answer = ask([], path)
    assert answer.status == 503
    assert int(answer.headers[b"retry-after"]) > 0
    assert answer.json["error"]["message"] == engine_lost().message


@pytest.mark.parametrize(
    "messages",
    [[start(), PIECE, END], [start(b"application/json"), PIECE], [start(status=400), PIECE], [start(b"application/json"), END]],
    ids=["whole stream", "cut answer", "refusal", "answer"],
)
def test_what_ends_by_itself_or_cannot_be_mended_is_left_alone(messages):
    answer = ask(messages)
    assert answer.pieces == [message["body"] for message in messages[1:]]


def test_other_routes_are_left_alone():
    assert ask([], "/-/healthz").status == 0
    assert ask([], CHAT, kind="websocket").status == 0
