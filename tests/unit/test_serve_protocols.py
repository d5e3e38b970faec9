"""OpenAI's responses and Anthropic's messages go the way of chats: names, system prompt, conversation, tokens, errors."""

import json
from typing import Any

import pytest

from serve.protocols import PROTOCOLS
from serve.refusal import engine_lost
from tests.helpers.front import PROMPT, Answer, refused

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "Hi"}


def respond(ask, given: Any = "Hi", headers=(), **fields: Any) -> Answer:
    return ask("POST", RESPONSES, {"model": "helpdesk", "input": given, **fields}, headers)


def message(ask, turns: Any = (USER,), headers=(), **fields: Any) -> Answer:
    return ask("POST", MESSAGES, {"model": "helpdesk", "messages": list(turns), "max_tokens": 5, **fields}, headers)


@pytest.mark.parametrize("send", [respond, message])
def test_a_name_is_handed_on_as_the_version_that_it_means(send, ask, engine):
    answer = send(ask)
    assert engine.request["model"] == "helpdesk:2"
    assert answer.headers[b"x-tandem-model"] == b"helpdesk:2"


@pytest.mark.parametrize(("send", "field"), [(respond, "instructions"), (message, "system")])
def test_the_system_prompt_has_a_field_of_its_own(send, field, ask, engine):
    send(ask)
    assert engine.request[field] == PROMPT
    send(ask, **{field: "Mine."})
    assert engine.request[field] == "Mine."
    send(ask, [{"role": "system", "content": "Mine."}, USER])
    assert field not in engine.request
    send(ask, model="helpdesk:1")
    assert field not in engine.request


@pytest.mark.parametrize("given", [None, "", [], 5, {"role": "user"}])
def test_turns_of_the_wrong_shape_are_left_to_the_engine(given, ask, engine):
    for path, field in ((RESPONSES, "input"), (MESSAGES, "messages")):
        sent = {"model": "helpdesk", field: given}
        ask("POST", path, sent)
        assert {name: said for name, said in engine.request.items() if name != "request_id"} == {**sent, "model": "helpdesk:2"}


def test_a_response_has_an_id_by_which_it_can_be_spoken_of(ask, engine):
    ask("POST", RESPONSES, {"model": "helpdesk", "input": "Hi"})
    completion_id = engine.request["request_id"]
    assert completion_id.startswith("resp_")
    said = ask("POST", "/v1/feedback", {"completion_id": completion_id, "rating": "up"})
    assert (said.status, said.json["model"]) == (200, "helpdesk:2")


def test_a_conversation_stays_with_its_version_in_whatever_shape_it_grows(ask, shelf):
    shelf.canaries["helpdesk:1"] = 0.5
    seen = set()
    for number in range(20):
        text = f"Question {number}"
        first = respond(ask, text).headers[b"x-tandem-model"]
        begun = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
        assert respond(ask, [begun, {"role": "assistant", "content": "Yes."}, USER]).headers[b"x-tandem-model"] == first
        assert message(ask, [{"role": "user", "content": text}]).headers[b"x-tandem-model"] == first, "one question, one draw"
        seen.add(first)
    assert seen == {b"helpdesk:1", b"helpdesk:2"}
    users = {message(ask, [{"role": "user", "content": str(n)}], metadata={"user_id": "7"}).headers[b"x-tandem-model"] for n in range(20)}
    assert len(users) == 1


STREAMS = {
    RESPONSES: (
        b'event: response.created\ndata: {"response":{"usage":null},"type":"response.created"}\n\n',
        b'event: response.output_text.delta\ndata: {"delta":"a","type":"response.output_text.delta"}\n\n',
        b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":200,"output_tokens":100,"total_tokens":300}}}\n\n',
    ),
    MESSAGES: (
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":200,"output_tokens":0}}}\n\n',
        b'event: content_block_delta\ndata: {"delta":{"text":"a"}}\n\n',
        b'event: message_delta\ndata: {"usage":{"input_tokens":150,"cache_read_input_tokens":50,"output_tokens":100}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}
WHOLE = {
    RESPONSES: {"usage": {"input_tokens": 200, "output_tokens": 100, "total_tokens": 300}},
    MESSAGES: {"usage": {"input_tokens": 150, "cache_read_input_tokens": 50, "cache_creation_input_tokens": None, "output_tokens": 100}},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("send", [respond, message])
def test_tokens_are_counted_from_the_usage_and_every_event_is_shown(send, stream, ask, keys, engine):
    path = RESPONSES if send is respond else MESSAGES
    door = [(b"authorization", f"Bearer {keys.create('alice', tpm=1000)}".encode())]
    engine.pieces = STREAMS[path] if stream else (json.dumps(WHOLE[path]).encode(),)
    answer = send(ask, headers=door, stream=stream)
    assert answer.pieces == [*engine.pieces, b""]
    assert "stream_options" not in engine.request
    engine.pieces = ()
    left = int(send(ask, headers=door).headers[b"x-ratelimit-remaining-tokens"])
    assert 1000 - 300 - 60 < left < 1000 - 300, "the next one's prompt is guessed and taken off"


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_stream_that_is_left_is_counted_by_its_pieces_of_text(path, ask, keys, engine):
    door = [(b"authorization", f"Bearer {keys.create('alice', tpm=1000)}".encode())]
    send = respond if path == RESPONSES else message
    left = int(send(ask, headers=door).headers[b"x-ratelimit-remaining-tokens"])
    engine.pieces = STREAMS[path][:2] + STREAMS[path][1:2] * 99
    after = [int(send(ask, headers=door, stream=True).headers[b"x-ratelimit-remaining-tokens"]) for _ in range(2)]
    assert after[0] - after[1] == 100 + (left - after[0]), "100 pieces and the prompt"


def test_anthropics_client_shows_its_key_in_its_own_header(ask, keys, engine):
    secret = keys.create("alice").encode()
    assert message(ask, headers=[(b"x-api-key", secret)]).status == 200
    assert b"x-api-key" not in engine.headers, "nothing that the engine should see"
    assert b"authorization" not in engine.headers
    assert message(ask, headers=[(b"x-api-key", b"sk-wrong")]).status == 401
    assert message(ask, headers=[(b"x-api-key", secret), (b"authorization", b"Bearer sk-wrong")]).status == 401


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"model": "nobody"}, 404, "not_found_error"),
        ({"stream": 1}, 400, "invalid_request_error"),
        ({"system": "x" * 5000}, 413, "request_too_large"),
    ],
)
def test_anthropics_client_gets_errors_in_its_own_shape(changes, status, kind, ask):
    answer = message(ask, **changes)
    assert answer.status == status
    assert (answer.json["type"], answer.json["error"]["type"]) == ("error", kind)
    assert answer.json["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
def test_anthropics_route_takes_post_alone(method, ask):
    assert ask(method, MESSAGES).json["error"]["type"] == "invalid_request_error"


def test_nothing_is_stored_for_another_key_to_read(ask, engine):
    for field in ("previous_response_id", "conversation"):
        assert refused(respond(ask, **{field: "resp_1"}), 400)["param"] == field
    assert refused(respond(ask, background=True), 400)["param"] == "background"
    assert refused(ask("GET", "/v1/responses/resp_1"), 404)
    assert engine.scopes == []


def test_embeddings_are_refused_with_the_reason(ask, engine):
    assert "smollm2-135m generates text, and makes no embeddings" in refused(ask("POST", "/v1/embeddings", {"input": "Hi"}), 404)["message"]
    assert engine.scopes == []


def test_a_streams_failure_is_an_event_of_its_route():
    told = {path: protocol.error_event(engine_lost()).decode() for path, protocol in PROTOCOLS.items()}
    error = {"message": engine_lost().message, "type": "service_unavailable", "param": None, "code": "engine_lost"}
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert told[path] == f"data: {json.dumps({'error': error})}\n\n"
    assert told[RESPONSES] == f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"
    anthropics = {"type": "error", "error": {"type": "overloaded_error", "message": engine_lost().message}}
    assert told[MESSAGES] == f"event: error\ndata: {json.dumps(anthropics)}\n\n"
