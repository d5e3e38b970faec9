"""What a request may not ask for: the engine's inside, files and addresses, schemas that hold it up; and bodies that are no request."""

import json
from typing import Any

import pytest

from serve.bounds import CLOSED
from serve.grammar import counts_within_counts
from serve.protocols import PROTOCOLS
from tests.helpers.front import ASKED, QUESTION, Answer, chat, refused


@pytest.mark.parametrize("field", CLOSED)
@pytest.mark.parametrize("path", PROTOCOLS)
def test_fields_that_are_closed_are_refused_unless_they_say_nothing(field, path, ask, engine):
    answer = ask("POST", path, {"model": "helpdesk:1", field: {"x": 1}})
    assert answer.status == 400
    assert f"{field} is not taken here" in answer.json["error"]["message"]
    assert engine.bodies == []
    for nothing in (None, False, 0, ""):
        assert ask("POST", path, {"model": "helpdesk:1", field: nothing}).status == 200


FETCHED = [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"image_url": "http://127.0.0.1:8265/"},
    {"type": "text", "text": "Hi", "video_url": {"url": "file:///x"}},
    {"type": "audio_url", "audio_url": {"url": "x"}},
    {"type": "input_audio", "input_audio": {"data": "x"}},
    {"type": "image_embeds", "image_embeds": "x"},
    {"type": "input_image", "image_url": "file:///etc/passwd"},
    {"type": "input_file", "file_url": "http://127.0.0.1/"},
    {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}},
    {"type": "document", "source": {"type": "url", "url": "http://127.0.0.1/"}},
    {"type": "tool_result", "content": [{"type": "image", "source": {}}]},
    {"type": "function_call_output", "output": [{"type": "input_image", "image_url": "x"}]},
]


@pytest.mark.parametrize("part", FETCHED, ids=str)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_nothing_is_fetched_or_opened_for_a_request(part, path, ask, engine):
    turns = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, part]}]
    for request in ({"messages": turns, "input": turns}, {"messages": [part], "input": [part]}):
        answer = ask("POST", path, {"model": "helpdesk:1", **request})
        assert answer.status == 400
        assert "text alone" in answer.json["error"]["message"]
    assert ask("POST", "/v1/messages", {"model": "helpdesk:1", "messages": [QUESTION], "system": [part]}).status == 400
    assert engine.bodies == []


def test_texts_and_tools_results_pass(ask, engine):
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "file:///etc/passwd"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"image_url": "x"}}]},
    ]
    chat(ask, model="helpdesk:1", messages=turns)
    assert engine.request["messages"] == turns


@pytest.mark.parametrize(
    "turn",
    [
        None,
        "Hi",
        {"type": "web_search_call", "id": "1"},
        {"type": "mcp_approval_response"},
        {"type": []},
        {"content": "Hi"},
        {"role": "assistant", "content": []},
        {"type": "message", "role": "user"},
        {"role": "user", "content": None},
    ],
    ids=str,
)
def test_turns_of_a_response_that_make_vllm_stumble_are_refused(turn, ask, engine):
    assert refused(ask("POST", "/v1/responses", {"model": "helpdesk:1", "input": [QUESTION, turn]}), 400)["param"] == "input"
    assert engine.bodies == []


def test_a_turn_of_a_response_may_be_an_empty_text(ask):
    turns = [QUESTION, {"role": "assistant", "content": ""}, QUESTION]
    assert ask("POST", "/v1/responses", {"model": "helpdesk:1", "input": turns}).status == 200


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def formats(schema: Any) -> list[dict[str, Any]]:
    return [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a|b|aa){1,100}){1,100}c$"},
        {"type": "object", "patternProperties": {"(a{2}){3}": {}}},
        {"type": "string", "pattern": "a" * 513},
        {"enum": ["x" * 40_000]},
        nested(41),
        *({"type": "string", "pattern": f"[a-z]{{{count}}}"} for count in ("129", "129,", "1,30000", " 1 , 3000", "01,129")),
        {"type": "array", "items": [{"type": "string", "pattern": "[a-z]{1,128}"}] * 20},
        {"type": "string", "pattern": f"({'[a-z]?' * 75}){{1,15}}"},
        {"type": "array", "items": [{"type": "string", "format": "ipv6"}] * 129},
        {"type": "object", "properties": {f"p{n}": {} for n in range(100)}, "minProperties": 1},
    ],
    ids=["pattern", "names", "long", "large", "deep", "exact", "open", "count", "spaces", "zero", "sum", "group", "formats", "properties"],
)
def test_a_schema_that_would_hold_up_the_engine_is_refused(schema, ask, engine):
    for wanted in formats(schema):
        answer = ask("POST", "/v1/chat/completions", {**ASKED, "model": "helpdesk:1", **wanted}, max_body_bytes=10**6)
        assert refused(answer, 400)["param"] in wanted
    assert engine.bodies == []


def test_a_schema_of_the_usual_kind_passes(ask, engine):
    pattern = {"type": "string", "pattern": r"^[0-9]{4}-[0-9]{2}\({1,2}[)]{1,3}$"}
    text = {"type": "string", "minLength": 1, "maxLength": 30_000}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": 1000, "minProperties": "a name"}
    properties = {"pattern": pattern, "list": nested(5), "texts": texts, "format": {"type": "string", "format": "date"}}
    schema = {"type": "object", "properties": properties, "required": ["pattern"], "minProperties": 1, "maxProperties": 3}
    for wanted in formats(schema):
        assert chat(ask, model="helpdesk:1", **wanted).status == 200


@pytest.mark.parametrize(
    ("schema", "num_tools", "said"),
    [
        ({}, 129, "129 tools; 128 at most"),
        ({"enum": ["x" * 30_000]}, 5, "bytes together"),
        ({"type": "array", "items": [{"type": "string", "format": "date"}] * 30}, 5, "formats together"),
        ({"type": "string", "pattern": f"[a-z]{{128}}{'x' * 20}"}, 5, "repeat too much"),
    ],
    ids=["tools", "bytes", "patterns", "counts"],
)
def test_schemas_are_bounded_all_together(schema, num_tools, said, ask, engine):
    def send(tools: list[dict[str, Any]], **fields: Any) -> Answer:
        return ask("POST", "/v1/chat/completions", {**ASKED, "tools": tools, **fields}, max_body_bytes=10**6)

    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert said in refused(send([tool] * num_tools), 400)["message"]
    assert engine.bodies == []
    assert send([tool] * (num_tools - 2), **formats({"type": "object"})[0]).status == 200
    if schema:
        wanted = formats(schema)[0]
        assert refused(send([tool] * (num_tools - 1), **wanted), 400)["param"] == "tools"


@pytest.mark.parametrize("kind", ["structural_tag", "grammar", "", 5, []])
def test_other_formats_are_refused(kind, ask):
    assert refused(chat(ask, response_format={"type": kind}), 400)["param"] == "response_format"


@pytest.mark.parametrize(
    ("pattern", "is_nested"),
    [
        ("(a{1,9}){1,9}", True),
        ("((a{2})+){,3}", True),
        ("(?:x(?:y(?:z{3}))*)*{4}", True),
        (r"([)]a{2}){3}", True),
        ("a{9}{9}", True),
        ("a{1,9}(b){1,9}", False),
        (r"(a\{1\}){9}", False),
        ("([{1}]){9}", False),
        ("(((", False),
        ("", False),
    ],
)
def test_repetitions_within_repetitions_are_found(pattern, is_nested):
    assert counts_within_counts(pattern) is is_nested


LISTED = [{"logit_bias": {str(n): 1 for n in range(1025)}}, {"bad_words": ["x"] * 1025}, {"allowed_token_ids": [1] * 1025}]
BELOW = [{"n": 0}, {"n": -1}, {"top_logprobs": -1}, {"prompt_logprobs": -1}, {"prompt_logprobs": 21}, {"stop_sequences": ["x"] * 17}]


@pytest.mark.parametrize("fields", LISTED + BELOW, ids=lambda fields: str(fields)[:30])
def test_numbers_and_lists_have_bounds(fields, ask, engine):
    answer = ask("POST", "/v1/chat/completions", {**ASKED, **fields}, max_body_bytes=10**6)
    assert refused(answer, 400)["param"] in fields
    assert engine.bodies == []


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_tools_are_refused_where_the_model_calls_none(ask, engine):
    def send(**fields: Any) -> Answer:
        return ask("POST", "/v1/chat/completions", {**ASKED, **fields}, tool_parser="none")

    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": {"type": "any"}}):
        assert "serve.tool_parser=none" in refused(send(tools=[TOOL], **choice), 400)["message"]
    assert engine.bodies == []
    for choice in ("none", {"type": "none"}):
        assert send(tools=[TOOL], tool_choice=choice).status == 200
    assert send(tools=[]).status == 200


def test_tools_that_the_endpoint_itself_would_use_are_refused(ask, engine):
    for kind in ("web_search", "mcp", "code_interpreter", "file_search", ["function"]):
        tool = {"type": kind, "server_url": "http://127.0.0.1:8265"}
        assert refused(ask("POST", "/v1/responses", {"model": "helpdesk:1", "input": "Hi", "tools": [tool]}), 400)["param"] == "tools"
    assert engine.bodies == []
    assert ask("POST", "/v1/messages", {"model": "helpdesk:1", "messages": [QUESTION], "tools": [{"name": "f"}]}).status == 200


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_json_does_not_know_are_refused(number, ask, engine):
    body = b'{"model": "helpdesk:1", "messages": [], "temperature": ' + number + b"}"
    assert "a number that JSON does not know" in refused(ask("POST", "/v1/chat/completions", body), 400)["message"]
    assert engine.bodies == []


def test_of_a_field_given_twice_the_last_is_looked_at_and_handed_on(ask, engine, keys):
    door = [(b"authorization", f"Bearer {keys.create('alice', models=['other:1'])}".encode())]
    body = b'{"model": "other:1", "model": "helpdesk:1", "messages": []}'
    assert refused(ask("POST", "/v1/chat/completions", body, door), 404)["param"] == "model"
    body = b'{"model": "helpdesk:1", "n": 1, "n": 9, "model": "other:1", "messages": []}'
    assert refused(ask("POST", "/v1/chat/completions", body, door), 400)["param"] == "n"
    assert engine.bodies == []


def test_the_queue_cannot_be_jumped_by_headers(ask, engine):
    sent = [(b"x-vllm-priority", b"-9"), (b"x-data-parallel-rank", b"1"), (b"x-api-key", b"secret"), (b"accept", b"*/*")]
    ask("POST", "/v1/chat/completions", ASKED, sent)
    assert [name for name, _ in engine.scopes[-1]["headers"]] == [b"accept", b"x-request-id", b"content-length"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_other_encodings_of_unicode_are_read_and_handed_on_as_utf8(encoding, ask, engine):
    answer: Answer = ask("POST", "/v1/chat/completions", json.dumps(ASKED, ensure_ascii=False).encode(encoding))
    assert answer.status == 200
    assert json.loads(engine.bodies[-1].decode("utf-8"))["messages"][-1] == QUESTION
