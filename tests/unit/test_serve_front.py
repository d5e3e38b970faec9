"""What stands before vLLM: only the routes that are meant, names that mean versions, and streams that pass through untouched."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from serve.keys import KeyFile
from serve.last_words import EXTENSION
from serve.protocols import PROTOCOLS
from tests.helpers.front import ASKED, NOWHERE, PROMPT, Answer, chat, make_front, refused

CLOSED = [
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/x/../load_lora_adapter",
    "/v1/../v1/load_lora_adapter",
    "/v1/chat/completions/",
    "/v1/chat/completions/../../load_lora_adapter",
    "//v1/chat/completions",
    "/V1/chat/completions",
    "/v1/chat/completions\x00",
    "/v1/embeddings",
    "/v1/responses/resp_1",
    "/v1/responses/resp_1/cancel",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/batch",
    "/invocations",
    "/tokenize",
    "/server_info",
    "/sleep",
    "/metrics",
    "/docs",
    "/openapi.json/",
    "/index.html",
    "/page.js/",
    "/../page.js",
    "",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_routes_that_are_not_meant_are_closed(method, path, ask, engine):
    error = refused(ask(method, path, ASKED), 404)
    assert path in error["message"]
    assert engine.scopes == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_generation_takes_post_alone(method, path, ask, engine):
    assert f"{path} takes POST, not {method}" in refused(ask(method, path), 405)["message"]
    assert engine.scopes == []


def test_other_methods_on_models_and_health_are_closed(ask):
    for path in ("/v1/models", "/health"):
        refused(ask("POST", path, ASKED), 404)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\xfd", b'{"model": "helpdesk"', b"[" * 100_000, b"9" * 3000 + b"x"])
def test_a_body_that_is_no_json_is_refused(body, ask, engine):
    assert refused(ask("POST", "/v1/chat/completions", body, max_body_bytes=10**6), 400)["message"].startswith("the body is not JSON")
    assert engine.scopes == []


@pytest.mark.parametrize("body", [b"[]", b'"helpdesk"', b"1", b"null"])
def test_a_body_that_is_no_object_is_refused(body, ask, engine):
    assert refused(ask("POST", "/v1/chat/completions", body), 400)["message"] == "the body is not a JSON object"
    assert engine.scopes == []


@pytest.mark.parametrize("model", [5, 0, True, False, ["helpdesk"], [], {}, 1.5])
def test_a_model_that_is_no_name_is_refused(model, ask, engine):
    assert refused(chat(ask, model=model), 400)["param"] == "model"
    assert engine.scopes == []


@pytest.mark.parametrize("model", ["helpdsk", "helpdesk:9", "other", "helpdesk:1\n", "../helpdesk:1", "HELPDESK", "\ud800", "x" * 100_000])
def test_an_unknown_model_is_refused_with_those_there_are(model, ask, engine):
    error = refused(ask("POST", "/v1/chat/completions", {**ASKED, "model": model}, max_body_bytes=10**6), 404)
    assert (error["type"], error["param"]) == ("not_found_error", "model")
    assert "does not exist. There are: smollm2-135m, helpdesk, helpdesk:1, helpdesk:2, other:1" in error["message"]
    assert len(error["message"]) < 500
    assert engine.scopes == []


def test_a_version_that_cannot_be_served_is_refused_with_the_reason(ask, shelf, engine, write_adapter):
    write_adapter(shelf.folders["other:1"], rank=64)
    message = refused(chat(ask, model="other:1"), 400)["message"]
    assert message == "The model `other:1` cannot be served: its rank is 64, and the engine makes room for 16 (serve.max_lora_rank)"
    assert chat(ask, model="helpdesk:1").status == 200, "the others go on"


def test_too_large_a_body_is_refused_however_it_comes(ask, engine):
    piece = b"x" * 1000
    refused(ask("POST", "/v1/chat/completions", b"x" * 4097), 413)
    message = refused(ask("POST", "/v1/chat/completions", [piece] * 5), 413)["message"]
    assert message == "the body is over 4096 bytes (serve.max_body_bytes)"
    assert engine.scopes == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/health", "/"])
def test_too_large_headers_are_refused(path, ask, engine):
    refused(ask("GET", path, headers=[(b"x-large", b"x" * 40_000)] * 2), 431)
    assert engine.scopes == []


def test_a_body_that_just_fits_is_taken_in_pieces(ask, engine):
    body = json.dumps(ASKED).encode()
    body += b" " * (4096 - len(body))
    pieces = [body[:1], b"", body[1:50], body[50:]]
    assert ask("POST", "/v1/chat/completions", pieces).status == 200
    assert engine.request["messages"][-1] == ASKED["messages"][-1]


def test_a_client_that_leaves_before_its_body_came_is_not_answered_by_the_engine(shelf, engine):
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(make_front(engine, shelf, KeyFile(NOWHERE))(scope, receive, Answer().send))
    assert engine.scopes == []


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("helpdesk", "helpdesk:2"),
        ("helpdesk:1", "helpdesk:1"),
        ("smollm2-135m", "smollm2-135m"),
    ],
)
def test_a_name_is_handed_on_as_the_version_that_it_means(model, version, ask, engine):
    answer = chat(ask, model=model)
    assert answer.status == 200
    assert engine.request["model"] == version
    assert answer.headers == {b"content-type": b"text/event-stream", b"x-tandem-model": version.encode()}


@pytest.mark.parametrize("body", [{"prompt": "Hi"}, {"prompt": "Hi", "model": None}, {"prompt": "Hi", "model": ""}])
def test_a_request_without_a_model_is_told_which_there_are(ask, engine, body):
    error = refused(ask("POST", "/v1/completions", body), 400)
    assert "smollm2-135m, helpdesk, helpdesk:1" in error["message"]
    assert error["param"] == "model"
    assert engine.bodies == []


def test_all_else_is_handed_on_as_it_came(ask, engine):
    sent = [(b"content-type", b"application/json"), (b"x-other", b"7")]
    lengths = [
        (b"authorization", b"Bearer x"),
        (b"content-length", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"x-tandem-model", b"forged"),
        (b"x-request-id", b"forged"),
    ]
    ask("POST", "/v1/chat/completions", {**ASKED, "model": "helpdesk:1"}, [*sent, *lengths])
    assert engine.request == {**ASKED, "model": "helpdesk:1", "stream_options": {"include_usage": True}}
    *others, (name, completion_id), length = engine.scopes[-1]["headers"]
    assert (others, length) == (sent, (b"content-length", str(len(engine.bodies[-1])).encode()))
    assert name == b"x-request-id"
    assert completion_id.endswith(b".helpdesk:1")
    assert engine.scopes[-1]["path"] == "/v1/chat/completions"


def test_half_a_surrogate_pair_does_not_break_the_front(ask, engine):
    """JSON may write one; Python then cannot encode it."""
    body = b'{"model": "helpdesk:1", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert "surrogate" in refused(ask("POST", "/v1/chat/completions", body), 400)["message"]
    assert engine.bodies == []


def test_deeply_nested_bodies_do_not_break_the_front(ask):
    for depth in range(880, 980):
        answer = ask("POST", "/v1/chat/completions", b'{"model": "helpdesk:1", "x": ' + b"[" * depth + b"]" * depth + b"}")
        assert answer.status in (200, 400)


SYSTEM, DEVELOPER = {"role": "system", "content": "Mine."}, {"role": "developer", "content": "Mine."}


def test_the_system_prompt_of_a_version_comes_first(ask, engine):
    for model in ("helpdesk", "helpdesk:2"):
        chat(ask, model=model)
        assert engine.request["messages"] == [{"role": "system", "content": PROMPT}, *ASKED["messages"]]


@pytest.mark.parametrize("first", [SYSTEM, DEVELOPER], ids=["system", "developer"])
def test_a_system_message_of_the_request_stays_alone(first, ask, engine):
    chat(ask, messages=[first, *ASKED["messages"]])
    assert engine.request["messages"] == [first, *ASKED["messages"]]


@pytest.mark.parametrize("model", ["helpdesk:1", "smollm2-135m"])
def test_no_system_prompt_is_added_where_the_version_has_none(model, ask, engine):
    chat(ask, model=model)
    assert engine.request["messages"] == ASKED["messages"]


@pytest.mark.parametrize("messages", [[], "Hi", None, {"role": "user"}])
def test_messages_of_the_wrong_shape_are_left_to_the_engine(messages, ask, engine):
    chat(ask, messages=messages)
    assert engine.request["messages"] == messages


def test_a_plain_completion_gets_no_system_prompt(ask, engine):
    ask("POST", "/v1/completions", {"model": "helpdesk", "prompt": "Hi"})
    assert engine.request == {"model": "helpdesk:2", "prompt": "Hi"}


def test_a_stream_passes_through_piece_by_piece(ask, engine):
    answer = chat(ask)
    assert answer.pieces == [*engine.pieces, b""]
    assert engine.passed_on == [1, 2, 3], "each piece is with the client before the next one is made"


def test_the_engine_learns_that_the_client_has_gone(ask, engine):
    chat(ask)
    assert engine.after_body == [{"type": "http.disconnect"}]


def test_models_lists_every_name(ask, engine):
    answer = ask("GET", "/v1/models")
    assert (answer.status, answer.json["object"]) == (200, "list")
    assert [card["id"] for card in answer.json["data"]] == ["smollm2-135m", "helpdesk", "helpdesk:1", "helpdesk:2", "other:1"]
    assert {card["object"] for card in answer.json["data"]} == {"model"}
    assert {card["quantization"] for card in answer.json["data"]} == {"none"}
    assert engine.scopes == []


def test_health_is_the_engines_own(ask, engine):
    assert ask("GET", "/health").status == 200
    assert [scope["path"] for scope in engine.scopes] == ["/health"]


@pytest.mark.parametrize(("path", "kind"), [("/", b"text/html"), ("/page.css", b"text/css"), ("/page.js", b"text/javascript")])
def test_the_page_comes_without_a_key_and_names_no_other_address(path, kind, ask, engine, keys):
    keys.create("alice")
    answer = ask("GET", path)
    assert answer.status == 200
    assert answer.headers[b"content-type"].startswith(kind)
    assert b"default-src 'none'" in answer.headers[b"content-security-policy"]
    assert b"//" not in re.sub(rb"^//.*|[^:]// .*", b"", answer.pieces[0], flags=re.MULTILINE), "an address of somebody else's"
    assert ask("DELETE", path).status == 401
    assert engine.scopes == []


def test_web_sockets_are_closed(shelf, engine):
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    asyncio.run(make_front(engine, shelf, KeyFile(NOWHERE))({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert engine.scopes == []


def test_the_lifespan_is_the_engines_own(shelf, engine):
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    asyncio.run(make_front(engine, shelf, KeyFile(NOWHERE))({"type": "lifespan"}, receive, send))
    assert engine.after_body == [{"type": "lifespan.startup"}]
    assert sent == [{"type": "lifespan.startup.complete"}]


def test_a_conversation_stays_with_the_version_that_began_it(ask, shelf):
    """Whatever is said later, and whatever the system message says today; a client may say itself which conversation it is."""
    shelf.canaries["helpdesk:1"] = 0.5
    seen = set()
    for number in range(20):
        begun = [{"role": "user", "content": f"Question {number}"}]
        first = chat(ask, messages=begun).headers[b"x-tandem-model"]
        greeted = [{"role": "system", "content": "It is Monday."}, {"role": "assistant", "content": "Hello."}, *begun]
        later = [*greeted, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
        assert chat(ask, messages=later).headers[b"x-tandem-model"] == first
        said = [(b"x-tandem-conversation", b"seven")]
        seen.add((first, ask("POST", "/v1/chat/completions", {**ASKED, "messages": begun}, said).headers[b"x-tandem-model"]))
    assert {first for first, _ in seen} == {b"helpdesk:1", b"helpdesk:2"}
    assert len({other for _, other in seen}) == 1


@pytest.mark.parametrize("messages", [None, "x", [1, None], [{"role": "user", "content": [1]}]], ids=["none", "text", "numbers", "parts"])
def test_any_shape_of_messages_can_be_drawn_for(messages, ask, shelf):
    shelf.canaries["helpdesk:1"] = 0.5
    assert chat(ask, messages=messages).status == 200


@pytest.mark.parametrize(("path", "stream", "status", "is_held"), [
    ("/v1/chat/completions", True, 200, True),
    ("/v1/messages", True, 200, True),
    ("/v1/chat/completions", False, 200, False),
    ("/v1/chat/completions", True, 400, False),
])  # fmt: skip
def test_only_a_stream_that_has_begun_is_to_end_with_an_event(path, stream, status, is_held, shelf, engine):
    engine.status = status
    answer, held = Answer(), []
    body = json.dumps({**ASKED, "stream": stream, "max_tokens": 5}).encode()

    async def once() -> None:
        front = make_front(engine, shelf, KeyFile(NOWHERE))
        await front.adapters.refresh()
        coming = iter([{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}])

        async def receive() -> dict[str, Any]:
            return next(coming)

        engine.answer = answer
        extension = {EXTENSION: {"begin_stream": lambda: held.append((answer.status, len(answer.pieces)))}}
        await front({"type": "http", "method": "POST", "path": path, "headers": [], "extensions": extension}, receive, answer.send)
        front.feedback.store.close()

    asyncio.run(once())
    assert held == ([(200, 0)] if is_held else []), "after its head, and before its first piece"


def broken_off() -> Iterator[bytes]:
    yield b"data: one\n\n"
    raise KeyError("a secret of the prompt")


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_stream_that_fails_on_its_way_ends_with_an_error_of_its_route(path, ask, engine, observers, caplog):
    engine.pieces, seen = broken_off(), []
    observers.append(seen.append)
    answer = ask("POST", path, {**ASKED, "max_tokens": 5})
    assert (answer.status, answer.pieces[0], len(answer.pieces)) == (200, b"data: one\n\n", 2)
    names, _, told = answer.pieces[1].decode().rpartition("data: ")
    assert names == ("event: error\n" if PROTOCOLS[path].names_events else "")
    assert json.loads(told)["error"]["message"] == "the endpoint failed (KeyError); its log says more"
    assert not seen[0].is_whole, "the log says that it broke off"
    assert [record.message for record in caplog.records if record.name == "tandem.api"] == ["a request failed"]


def test_an_answer_that_should_come_whole_and_fails_on_its_way_breaks_off(ask, engine):
    """An event would be taken for a piece of its JSON."""
    engine.pieces = broken_off()
    with pytest.raises(KeyError):
        chat(ask, stream=False)
    assert engine.answer.pieces == [b"data: one\n\n"]
