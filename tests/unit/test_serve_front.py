"""What stands before vLLM: only the routes that are meant, names that mean versions, and streams that pass through untouched."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import Version
from serve.adapters import Adapters, Base
from serve.front import Front
from serve.keys import KeyFile

NOWHERE = Path("/nowhere/keys.json")
BASE = Base("smollm2-135m", "0123456789abcdef", max_lora_rank=16)
QUESTION = {"role": "user", "content": "Wie geht's? 😀"}
ASKED = {"model": "helpdesk", "messages": [QUESTION], "stream": True, "unknown_setting": {"kept": [1, 2.5, None]}}
PROMPT = "You answer questions about Tandem."


@dataclass
class Shelf:
    """Stands where the registry stands: versions and folders of the test's own."""

    folders: dict[str, Path] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)

    def versions(self) -> list[Version]:
        found = []
        for name in self.folders:
            chatbot, _, number = name.partition(":")
            aliases = ("live",) if self.live.get(chatbot) == int(number) else ()
            found.append(Version(chatbot, int(number), "r" * 32, {"base_fingerprint": BASE.fingerprint}, aliases))
        return found

    def download(self, version: Version) -> Path:
        return self.folders[version.name]


@dataclass
class Engine:
    """Stands where vLLM's application stands: keeps what it was given, and answers in pieces."""

    pieces: tuple[bytes, ...] = (b"data: one\n\n", b"data: two\n\n", b"data: [DONE]\n\n")
    scopes: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    after_body: list[dict[str, Any]] = field(default_factory=list)
    passed_on: list[int] = field(default_factory=list)
    answer: "Answer | None" = None

    async def __call__(self, scope, receive, send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            self.after_body.append(await receive())
            await send({"type": "lifespan.startup.complete"})
            return
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self.passed_on.append(len(self.answer.pieces))
        await send({"type": "http.response.body", "body": b""})
        self.after_body.append(await receive())

    @property
    def request(self) -> dict[str, Any]:
        return json.loads(self.bodies[-1])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.scopes[-1]["headers"])


@dataclass
class Answer:
    """What the client got."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert self.status == 0, "an answer begins once"
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.pieces.append(message["body"])

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(b"".join(self.pieces))


@pytest.fixture
def shelf(tmp_path, write_adapter) -> Shelf:
    """Two versions of `helpdesk`, of which the second is live and has a system prompt; `other` has one that is not live."""
    folders = {name: write_adapter(tmp_path / name.replace(":", "-")) for name in ("helpdesk:1", "helpdesk:2", "other:1")}
    (folders["helpdesk:2"] / "manifest.json").write_text(json.dumps({"system_prompt": PROMPT}))
    return Shelf(folders, {"helpdesk": 2})


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def keys(tmp_path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
def ask(shelf, engine, keys):
    """Send one request to a front before `engine`; the body may come in several pieces."""

    def send(method: str, path: str, body: Any = b"", headers: Any = (), max_body_bytes: int = 4096) -> Answer:
        pieces = body if isinstance(body, list) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
        messages = [{"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1} for number, piece in enumerate(pieces)]
        coming = iter([*messages, {"type": "http.disconnect"}])
        answer = engine.answer = Answer()

        async def receive() -> dict[str, Any]:
            return next(coming)

        async def once() -> None:
            front = Front(engine, Adapters(shelf, BASE), keys, max_body_bytes)
            await front.adapters.refresh()
            scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
            await front(scope, receive, answer.send)

        asyncio.run(once())
        return answer

    return send


def chat(ask, **changes: Any) -> Answer:
    return ask("POST", "/v1/chat/completions", {**ASKED, **changes})


def refused(answer: Answer, status: int) -> dict[str, Any]:
    """Check that an answer is an error in OpenAI's shape, and return it."""
    assert answer.status == status
    assert answer.headers[b"content-type"] == b"application/json"
    assert int(answer.headers[b"content-length"]) == len(b"".join(answer.pieces))
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


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
    "/v1/responses",
    "/invocations",
    "/tokenize",
    "/server_info",
    "/sleep",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/",
    "",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_routes_that_are_not_meant_are_closed(method, path, ask, engine):
    error = refused(ask(method, path, ASKED), 404)
    assert path in error["message"]
    assert engine.scopes == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
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
    asyncio.run(Front(engine, Adapters(shelf, BASE), KeyFile(NOWHERE), 4096)(scope, receive, Answer().send))
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
    sent = [(b"content-type", b"application/json"), (b"x-request-id", b"7")]
    lengths = [
        (b"authorization", b"Bearer x"),
        (b"content-length", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"x-tandem-model", b"forged"),
    ]
    ask("POST", "/v1/chat/completions", {**ASKED, "model": "helpdesk:1"}, [*sent, *lengths])
    assert engine.request == {**ASKED, "model": "helpdesk:1"}
    assert engine.scopes[-1]["headers"] == [*sent, (b"content-length", str(len(engine.bodies[-1])).encode())]
    assert engine.scopes[-1]["path"] == "/v1/chat/completions"


def test_half_a_surrogate_pair_does_not_break_the_front(ask, engine):
    """JSON may write one; Python then cannot encode it."""
    body = b'{"model": "helpdesk:1", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    answer = ask("POST", "/v1/chat/completions", body)
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert engine.request["messages"][0]["content"] == "\ud83d"


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
    assert engine.scopes == []


def test_health_is_the_engines_own(ask, engine):
    assert ask("GET", "/health").status == 200
    assert [scope["path"] for scope in engine.scopes] == ["/health"]


def test_web_sockets_are_closed(shelf, engine):
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    asyncio.run(
        Front(engine, Adapters(shelf, BASE), KeyFile(NOWHERE), 4096)(
            {"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send
        )
    )
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert engine.scopes == []


def test_the_lifespan_is_the_engines_own(shelf, engine):
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    asyncio.run(Front(engine, Adapters(shelf, BASE), KeyFile(NOWHERE), 4096)({"type": "lifespan"}, receive, send))
    assert engine.after_body == [{"type": "lifespan.startup"}]
    assert sent == [{"type": "lifespan.startup.complete"}]


def show(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + secret.encode())]


def keyed(ask, secret: str | None, **changes: Any) -> Answer:
    return ask("POST", "/v1/chat/completions", {**ASKED, **changes}, show(secret) if secret else ())


def test_as_soon_as_there_is_a_key_every_request_shows_one(ask, keys, engine):
    assert chat(ask).status == 200
    secret = keys.create("alice")
    for headers in (
        (),
        show("sk-tandem-wrong"),
        [(b"authorization", b"Basic " + secret.encode())],
        [(b"authorization", b"Bearer ")],
        show(secret[:-1]),
    ):
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
            answer = ask(method, path, ASKED, headers)
            assert answer.status == 401
            assert answer.json["error"]["code"] == "invalid_api_key"
    assert len(engine.bodies) == 1, "nothing refused reaches the engine"
    assert keyed(ask, secret).status == 200
    assert b"authorization" not in engine.headers, "the engine sees no key"


def test_health_needs_no_key(ask, keys):
    keys.create("alice")
    assert ask("GET", "/health").status == 200


def test_a_revoked_or_expired_key_is_out_at_once_and_the_door_stays_shut(ask, keys):
    secret, short = keys.create("alice"), keys.create("bob", lifetime_s=-1)
    assert "expired" in keyed(ask, short).json["error"]["message"]
    KeyFile(keys.file).revoke("alice")  # as another process does it
    assert "revoked" in keyed(ask, secret).json["error"]["message"]
    assert keyed(ask, None).status == 401, "no valid key is left, and still none may ask without"


def test_a_key_opens_its_models_and_knows_of_no_others(ask, keys):
    secret = keys.create("alice", ["helpdesk"])
    listed = ask("GET", "/v1/models", b"", show(secret)).json["data"]
    assert [card["id"] for card in listed] == ["helpdesk", "helpdesk:1", "helpdesk:2"]
    assert keyed(ask, secret, model="helpdesk").status == keyed(ask, secret, model="helpdesk:1").status == 200
    other, nothing = (keyed(ask, secret, model=name).json["error"]["message"] for name in ("other:1", "nothing:1"))
    assert other.replace("other", "nothing") == nothing
    assert BASE.name not in nothing
    assert keyed(ask, secret, model=BASE.name).status == 404, "the base is not among its models"
    assert BASE.name not in keyed(ask, secret, model=None).json["error"]["message"]


def test_a_key_for_one_version_opens_that_version_alone(ask, keys):
    secret = keys.create("alice", ["helpdesk:1"])
    assert keyed(ask, secret, model="helpdesk:1").status == 200
    assert keyed(ask, secret, model="helpdesk").status == keyed(ask, secret, model="helpdesk:2").status == 404


@pytest.mark.parametrize("harm", ["garbled", "gone"])
def test_keys_that_cannot_be_read_shut_the_door(ask, keys, harm):
    secret = keys.create("alice")
    assert keyed(ask, secret).status == 200
    keys.file.unlink() if harm == "gone" else keys.file.write_text("[{}]")
    assert keyed(ask, secret).status == keyed(ask, None).status == 503


def test_where_others_can_reach_the_address_no_key_means_no_entry(ask, keys):
    keys.host = "0.0.0.0"
    assert keyed(ask, None).status == 401
